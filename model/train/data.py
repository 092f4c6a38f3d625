"""Latent batches as a torchtitan dataloader. Its whole state is a step number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch
from torchtitan.components.dataloader import BaseDataLoader

from model.latents import Batch, LatentDataset, SampleOrder, read_batch


class LatentDataLoader(BaseDataLoader):
    """Yields this rank's micro-batches, step after step, for ever; `step` counts the steps handed out in full."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        directory: str
        global_batch_size: int
        seed: int
        tier_weights: dict[str, float] = field(default_factory=dict)
        caption_dropout: float = 0.0

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any):
        self.dataset = LatentDataset(config.directory)
        self.order = SampleOrder(
            self.dataset, config.global_batch_size, config.seed, config.tier_weights, config.caption_dropout
        )
        self.ranks, self.rank = dp_world_size, dp_rank
        self.accumulation = config.global_batch_size // (local_batch_size * dp_world_size)
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            plan = self.order.batch(self.step).part(self.rank, self.ranks)
            self.step += 1  # before the last yield: a generator runs on only when it is asked for more
            for micro in range(self.accumulation):
                yield read_batch(self.dataset, plan.part(micro, self.accumulation))

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}  # a tensor: DCP pickles anything else

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])
