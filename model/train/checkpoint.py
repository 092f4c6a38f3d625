"""Two kinds of DCP checkpoints at every cadence, and where to find them.

    checkpoints/step-{n}         everything that resuming needs; only the last two are kept
    weights/step-{n:08d}         the model alone; the last `keep_weights` are what a stage hands on

The weights are written first: where a full checkpoint exists, its weights do too. DCP writes `.metadata` last and
by a rename, so a directory without it is a save that was cut off, and is never read.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.components.checkpointer.dcp import AsyncMode

CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"
_STEP = re.compile(r"step-(\d+)")


def finished_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Finished checkpoints of a folder by step, in order."""
    folder = Path(folder)
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and (path / ".metadata").is_file():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def last_checkpoint(path: str | Path) -> Path:
    """The last finished checkpoint of a folder of them; a checkpoint itself is returned as it is.

    Raises:
        ValueError: there is none.
    """
    if (Path(path) / ".metadata").is_file():
        return Path(path)
    found = finished_checkpoints(path)
    if not found:
        raise ValueError(f"{path} holds no finished checkpoint (step-*/ with a .metadata file)")
    return list(found.values())[-1]


class StageCheckpointer(CheckpointManager):
    """torchtitan's checkpoint manager, which besides keeps the weights of the last checkpoints."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        keep_weights: int = 16

    def __init__(self, config: Config, *, base_folder: str = "", **kwargs: Any):
        super().__init__(config, base_folder=base_folder, **kwargs)
        self.weights_folder = Path(base_folder) / WEIGHTS
        self.keep_weights = config.keep_weights

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, **options: Any) -> Any:
        """One process saves without collectives. Gloo would run them on threads of its own, each of which then keeps
        an OpenMP team: with more OpenMP threads than cores, idle ones sleep instead of spin, and for the rest of the
        process a training step takes 1.8 times as long on 2 cores."""
        if dist.get_world_size() > 1 or async_mode != AsyncMode.DISABLED or options.get("to_hf"):
            return super().dcp_save(state_dict, checkpoint_id, async_mode, **options)
        return dcp.save(state_dict, checkpoint_id=checkpoint_id, no_dist=True)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As `dcp_save`: one process loads without collectives."""
        if dist.get_world_size() > 1 or from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        dcp.load(state_dict, checkpoint_id=checkpoint_id, no_dist=True)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        weights = self.weights_folder / f"step-{curr_step:08d}"
        try:
            self.dcp_save(
                self.states[MODEL].state_dict(), checkpoint_id=str(weights), async_mode=AsyncMode.DISABLED
            )
            super()._save(curr_step, last_step)
        except CheckpointException as error:
            free_bytes = shutil.disk_usage(self.weights_folder.parent).free
            for path in (weights, Path(self._create_checkpoint_id(curr_step))):
                if not (path / ".metadata").is_file():
                    shutil.rmtree(path, ignore_errors=True)
            if free_bytes < self._size_bytes():  # what DCP reports is where the write stopped, not why
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder) from error
            raise
        self._prune(curr_step)
        return True

    def _size_bytes(self) -> int:
        """About the size of a full checkpoint: weights, momentum and two moments at most."""
        return 3 * sum(v.numel() * v.element_size() for v in self.states[MODEL].state_dict().values())

    def _load(self, step: int = -1) -> bool:
        resumed = self._find_load_step() if step == -1 else step
        loaded = super()._load(step)
        self._prune(max(resumed, 0))
        return loaded

    def _prune(self, step: int) -> None:
        """Drops weights older than the last `keep_weights`, newer than `step` (of a run cut off), or half written."""
        if dist.get_rank() != 0 or not self.weights_folder.is_dir():
            return
        finished = [path for n, path in finished_checkpoints(self.weights_folder).items() if n <= step]
        for path in set(self.weights_folder.iterdir()) - set(finished[-self.keep_weights :]):
            shutil.rmtree(path)
