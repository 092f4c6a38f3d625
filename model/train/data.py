"""Latent batches as a torchtitan dataloader. Its whole state is a step number.

torchtitan's own loaders use torchdata's StatefulDataLoader, whose worker processes each have a state to save and to
fast-forward. Here the data of a step is a function of its number, and reading is file access and copies, for which
Python's threads suffice: only the step number is saved, for any number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from model.data.latents import LatentDataset
from model.data.order import Batch, BatchPlan, SampleOrder, read_batch
from model.data.streamed import StreamedLatents
from model.train.device import DEVICE_TYPE

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.tools.utils import device_module

READ_AHEAD = 2  # micro-batches for each worker


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to the device. The host waits neither for the copy nor for earlier work of the
    device.

    This needs pinned memory, which PyTorch does not reuse before the copy is done, even if the tensor is freed.
    """
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class LatentDataLoader(BaseDataLoader):
    """Yields this rank's micro-batches, step after step, without end; `step` counts the steps that were yielded
    completely.

    With `num_workers`, that many threads read ahead; batches and their order are the same. For a CUDA device batches
    are in pinned memory, and text keeps its stored dtype, half the bytes, until it is on the device.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        directory: str
        stream_from: str | None = None  # a folder or URI of the directory's safetensors, read by ranges
        global_batch_size: int
        seed: int
        tier_weights: dict[str, float] = field(default_factory=dict)
        episode_weights: dict[str, float] = field(default_factory=dict)
        caption_weights: tuple[tuple[int, float], ...] = ()
        caption_dropout: float = 0.0
        num_workers: int = 0

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any):
        if config.stream_from is None:
            self.dataset = LatentDataset(config.directory)
        else:
            self.dataset = StreamedLatents(config.directory, config.stream_from)
        self.order = SampleOrder(
            self.dataset,
            config.global_batch_size,
            config.seed,
            config.tier_weights,
            config.caption_dropout,
            config.episode_weights,
            config.caption_weights,
        )
        self.ranks, self.rank = dp_world_size, dp_rank
        self.accumulation = config.global_batch_size // (local_batch_size * dp_world_size)
        self.num_workers = config.num_workers
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = self._read_ahead() if self.num_workers else self.micro_batches(self.step)
        for batch in batches:
            self.step = batch.plan.step + 1  # before the yield: code after it runs only at the next request
            yield batch

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from `step` (from 0) on, read on request; the loader's own position does not
        change."""
        return (self._read(plan) for plan in self._plans(step))

    def _read(self, plan: BatchPlan) -> Batch:
        if DEVICE_TYPE != "cuda":
            return read_batch(self.dataset, plan)
        batch = read_batch(self.dataset, plan, widen_text=False)
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return replace(batch, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def _plans(self, step: int) -> Iterator[BatchPlan]:
        while True:
            plan = self.order.batch(step).share(self.rank, self.ranks)
            for micro in range(self.accumulation):
                yield plan.share(micro, self.accumulation)
            step += 1

    def _read_ahead(self) -> Iterator[Batch]:
        plans = self._plans(self.step)
        # A new thread uses the first device, where pinning would create a context for every rank.
        device = device_module.set_device, (device_module.current_device(),)
        pool = ThreadPoolExecutor(self.num_workers, "latents", *device)
        pending: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(pending) < READ_AHEAD * self.num_workers:
                    pending.append(pool.submit(self._read, next(plans)))
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}  # a tensor: DCP pickles anything else

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])
