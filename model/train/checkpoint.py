"""Three kinds of DCP checkpoints, in a run's folder or in S3, written at once or in the background.

    ROOT/checkpoints/step-{n}         everything that resuming needs; the last `keep_full`
    ROOT/weights/step-{n:08d}         the model alone; the last `keep_weights` are the stage's result, which WSM merges
    ROOT/optimizer/step-{n:08d}       of the last step, for the next stage: optimiser state and schedule alone

ROOT is the run's work_dir, or {train.checkpoint_uri}/{name of the work_dir}. The full checkpoint is written last: if it
exists, the others do too. All are copied to host memory before the next step; with `async_mode` a thread writes them
while training continues. A save waits for the previous one and then removes older checkpoints, so that a killed run
always has a finished checkpoint to resume from.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from model import storage
from model.config import TrainSettings
from model.logs import get_logger
from model.train.device import DEVICE_TYPE
from model.train.guard import Diverged
from model.train.metrics import METRICS
from model.train.parallel.replicas import differing
from model.train.torch_private import FsspecWriter
from model.weights import checkpoints
from model.weights.checkpoints import finished_checkpoints, incomplete_files

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import LR_SCHEDULER, MODEL, OPTIMIZER, ModelWrapper
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools.utils import device_module

logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"
CARRIED = (OPTIMIZER, LR_SCHEDULER)  # saved in ROOT/optimizer
CLOSE_TIMEOUT_S = 60
NAMED = 8  # number of parameters in an error message


def checkpoint_root(train: TrainSettings, work_dir: Path) -> str:
    """The folder or URI of a run's CHECKPOINTS and WEIGHTS."""
    if train.checkpoint_uri is None:
        return str(work_dir)
    place = storage.check_path(train.checkpoint_uri)
    return storage.join(place if storage.is_remote(place) else os.path.abspath(place), Path(work_dir).name)


class StageCheckpointer(CheckpointManager):
    """torchtitan's checkpoint manager, which also saves the result of a stage: weights, and the optimiser state.

    torchtitan saves asynchronously with dcp.async_save, one state at a time. Here several states are saved from one copy,
    one after the other, since their collectives share a process group.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        keep_full: int = 2
        keep_weights: int = 16
        optimizer_from: str | None = None
        hand_on_optimizer: bool = False

    def __init__(self, config: Config, *, base_folder: str = "", **kwargs: Any):
        super().__init__(config, base_folder=base_folder, **kwargs)
        self.root = os.path.dirname(self.folder)
        self.weights_folder, self.optimizer_folder = (storage.join(self.root, name) for name in (WEIGHTS, OPTIMIZER))
        self.work_dir = Path(base_folder)
        self.keep_full, self.keep_weights = config.keep_full, config.keep_weights
        self.optimizer_from, self.hand_on_optimizer = config.optimizer_from, config.hand_on_optimizer
        # On CUDA it keeps its pinned memory from save to save, of the size of this rank's part of a full checkpoint.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=DEVICE_TYPE == "cuda")
        self.alone = dist.get_world_size() == 1
        self.saved_step = -1

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        """A single process saves without collectives. gloo runs them on its own threads, and each keeps an OpenMP team:
        with more OpenMP threads than cores idle threads sleep instead of spinning, and from then on a training step takes
        1.8 times as long on 2 cores."""
        if storage.is_remote(checkpoint_id):
            # sync_files: a stream to S3 is not a file, and DCP would sync the machine's own disks instead.
            checkpoint_id = storage.check_path(checkpoint_id)
            writer = FsspecWriter(checkpoint_id, sync_files=False, **storage.options(checkpoint_id))
        else:
            writer = dcp.FileSystemWriter(checkpoint_id)
        with checkpoints.without_warning():
            dcp.save(state_dict, storage_writer=writer, process_group=self.pg, no_dist=self.alone)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *_: Any) -> None:
        checkpoints.load(state_dict, checkpoint_id, alone=self.alone)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """Saves at the configured interval and at the last step. The last save is not in the background."""
        if not self._should_save(curr_step, last_step):
            return False
        self.maybe_wait_for_saving()
        self._check_finite(curr_step)
        self._check_alike(curr_step)
        weights, optimizer = (
            storage.join(folder, f"step-{curr_step:08d}") for folder in (self.weights_folder, self.optimizer_folder)
        )
        full, path = self._full_state(), self._create_checkpoint_id(curr_step)
        background = self.async_mode != AsyncMode.DISABLED and not last_step
        if background:
            full = self.stager.stage(full)  # the previous save has ended, so its memory is free
        states = [({name: full[name] for name in self.states[MODEL].state_dict()}, weights), (full, path)]
        if last_step and self.hand_on_optimizer:
            states.insert(1, ({name: full[name] for name in CARRIED}, optimizer))
        if background:
            self.save_future = self._in_background(states)
        else:
            self._write(states)
            self._prune(curr_step)
        self.saved_step = curr_step
        return True

    def save_to_resume(self, step: int) -> str:
        """Saves a full checkpoint of `step` outside the regular interval, without a weights checkpoint: only those of
        the regular interval are merged. Returns its path."""
        self.maybe_wait_for_saving()
        path = self._create_checkpoint_id(step)
        if self.saved_step != step:
            self._check_finite(step)
            self._check_alike(step)
            self._write([(self._full_state(), path)])
            self._prune(step)
            self.saved_step = step
        return path

    def _full_state(self) -> dict[str, Any]:
        states = self._flattened_model_states_sd()
        return {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in states.items()}

    def _write(self, states: list[tuple[dict[str, Any], str]]) -> None:
        try:
            for state, path in states:
                self.dcp_save(state, path)
        except CheckpointException as error:
            if storage.is_remote(self.root):
                raise
            free_bytes = shutil.disk_usage(self.work_dir).free
            for _, path in states:
                if not os.path.isfile(os.path.join(path, checkpoints.METADATA)):
                    shutil.rmtree(path, ignore_errors=True)
            if free_bytes < self._size_bytes():  # DCP reports where the write stopped, not why
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder) from error
            raise

    def _in_background(self, states: list[tuple[dict[str, Any], str]]) -> Future[None]:
        """A new thread for each save: the OpenMP threads that it starts end with it."""
        future: Future[None] = Future()
        device = device_module.current_device()

        def write() -> None:
            try:
                device_module.set_device(device)  # a new thread would use the first device
                self._write(states)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=write, name="checkpoint", daemon=True).start()
        return future

    def _wait_for_saving(self) -> None:
        """Raises the error of the background thread, if there is one."""
        future, self.save_future = self.save_future, None
        future.result()
        self._prune(self.saved_step)

    def _close(self) -> None:
        if self.save_future is not None:  # training was interrupted: let a running save finish
            wait([self.save_future], CLOSE_TIMEOUT_S)
        super()._close()

    def _check_finite(self, step: int) -> None:
        """Refuses to save weights that are not finite: every resume would load them again.

        Raises:
            Diverged: they are not finite on some rank.
        """
        tensors = [tensor for tensor in self.states[MODEL].state_dict().values() if tensor.is_floating_point()]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        norms = torch._foreach_norm([tensor for tensor in local if tensor.numel()], float("inf"))
        bad = (~torch.isfinite(torch.stack(norms))).any().float()
        if not self.alone:
            dist.all_reduce(bad)
        if bad.item():
            raise Diverged(f"the weights are not finite after step {step}: nothing was saved")

    def _check_alike(self, step: int) -> None:
        """Refuses to save replicated weights that differ between ranks: a checkpoint keeps one copy and hides the others.

        Raises:
            RuntimeError: on every rank, naming the parameters.
        """
        names = [] if self.alone else differing(self.states[MODEL].state_dict())
        if names:
            more = f" and {len(names) - NAMED} more" if names[NAMED:] else ""
            raise RuntimeError(
                f"after step {step} ranks hold different values of weights that are replicated: "
                f"{', '.join(names[:NAMED])}{more}. Nothing was saved; the last checkpoint is of an earlier step. Start "
                "again from it, and look for a defective device where it happens again"
            )

    def _size_bytes(self) -> int:
        """Approximate size of a full checkpoint: weights, momentum and two moments at most."""
        return 3 * sum(v.numel() * v.element_size() for v in self.states[MODEL].state_dict().values())

    def _load(self, step: int = -1) -> bool:
        """Loads the last complete checkpoint of this run, else the initial weights and optimiser state of the stage."""
        last = [self._last_whole() if step == -1 else step]
        if not self.alone:
            dist.broadcast_object_list(last)  # else a node without the folder starts over
        (resumed,) = last
        if resumed:
            if dist.get_rank() == 0:
                logger.info(f"resuming from the checkpoint of step {resumed}")
            self.dcp_load(self._states_to_load(model_only=False), self._create_checkpoint_id(resumed))
        elif self.initial_load_path:
            self.dcp_load(self._states_to_load(model_only=True), self.initial_load_path)
            if self.optimizer_from:
                checkpoints.load({name: self.states[name] for name in CARRIED}, self.optimizer_from, alone=self.alone)
        self._prune(resumed)
        return bool(resumed or self.initial_load_path)

    def load_initial_weights(self, model: torch.nn.Module) -> None:
        """Loads the weights that the stage starts from into another model of the same layout."""
        checkpoints.load(ModelWrapper([model]).state_dict(), self.initial_load_path, alone=self.alone)

    def _last_whole(self) -> int:
        """The newest step whose files have the lengths in its metadata; 0 if there is none.

        A full disk or a failed node may truncate files after they were written.
        """
        finished = finished_checkpoints(self.folder)
        for step, path in reversed(finished.items()):
            if not (missing := incomplete_files(path)):
                return step
            if dist.get_rank() == 0:
                logger.warning(
                    f"checkpoint {path} is damaged ({missing[0]} is cut off or missing): trying an older one"
                )
        return 0

    def _prune(self, step: int) -> None:
        """After a finished save of `step`, or a resume from it: removes checkpoints that are older than the last ones,
        newer than `step` (left by an interrupted run) or half written. Not earlier, so that a complete one always
        exists."""
        if dist.get_rank() != 0:
            return
        keeping = ((self.folder, self.keep_full), (self.weights_folder, self.keep_weights), (self.optimizer_folder, 1))
        for folder, keep in keeping:
            finished = [path for n, path in finished_checkpoints(folder).items() if n <= step]
            for path in set(storage.children(folder)) - set(finished[-keep:]):
                storage.remove(path)
        if storage.is_remote(self.root) and (self.work_dir / METRICS).is_file():
            storage.write_bytes(storage.join(self.root, METRICS), (self.work_dir / METRICS).read_bytes())
