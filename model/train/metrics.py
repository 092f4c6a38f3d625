"""torchtitan's metrics processor, extended to write metrics.jsonl and to print progress lines.

metrics.jsonl has one object per logged step: step, loss, loss_t/0.0-0.2 ... (mean loss of the samples whose timestep fell
into that bin since the last line; absent if there were none), grad_norm (before clipping), lr/..., images_per_s,
tokens_per_s (image tokens), images_seen, skipped_steps (so far), seconds (since this process began training), expert/...
(RouterTrace.statistics of rank 0's last micro-batch, means over layers). TensorBoard also has the values of each layer and
torchtitan's own metrics. On resume, lines after the resumed step are dropped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from model import storage

from torchtitan.components.metrics import BaseLogger, MetricsProcessor

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class _TensorBoard(BaseLogger):
    """Opens its file at the first log call, which sets the step from which entries of a killed run are purged."""

    def __init__(self, folder: Path):
        self.folder, self.writer = folder, None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), max_queue=1000, purge_step=step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class StageMetrics(MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        label: str = ""
        total_steps: int = 0
        progress_every_s: float = 5.0

    def __init__(self, config: Config, *, dump_folder: str = "", **kwargs: Any):
        super().__init__(config, dump_folder=dump_folder, **kwargs)
        self.path = Path(dump_folder) / METRICS
        self.started = self.last_line = time.perf_counter()
        self.first_step = 0
        self.images_since_last_log = self.tokens_since_last_log = 0  # sums over all ranks
        self.last: dict[str, float] = {}

    def _build_metric_logger(self, *, dump_folder: str, **_: Any) -> BaseLogger:
        return _TensorBoard(Path(dump_folder) / TENSORBOARD) if dist.get_rank() == 0 else BaseLogger()

    def start(self, step: int) -> None:
        """Starts the clocks after `step` finished steps, and drops later lines that a killed run logged."""
        self.first_step = step
        self.started = self.last_line = self.time_last_log = time.perf_counter()
        if dist.get_rank() == 0:
            truncate_metrics(self.path, step)

    def log_step(self, step: int, loss: float, grad_norm: float, extra: dict[str, float]) -> None:
        """Logs one step to all outputs. The keys of `extra` become names in metrics.jsonl and TensorBoard."""
        now = time.perf_counter()
        elapsed = max(now - self.time_last_log, 1e-9)
        rates = {
            "images_per_s": self.images_since_last_log / elapsed,
            "tokens_per_s": self.tokens_since_last_log / elapsed,
            "seconds": now - self.started,
        }
        self.images_since_last_log = self.tokens_since_last_log = 0
        super().log(step, loss, loss, grad_norm, extra_metrics={"loss": loss, **rates, **extra})
        means = {name: value for name, value in extra.items() if "/layer" not in name}
        self.last = {"step": step, "loss": loss, "grad_norm": grad_norm, **rates, **means}
        if dist.get_rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.last) + "\n")
            self._print_progress(step, loss, rates["images_per_s"], now)

    def note(self, text: str) -> None:
        """Prints a message on rank 0."""
        if dist.get_rank() == 0:
            print(f"[{self.config.label}] {text}", flush=True)

    def _print_progress(self, step: int, loss: float, images_per_s: float, now: float) -> None:
        total = self.config.total_steps
        if step not in (1, total) and now - self.last_line < self.config.progress_every_s:
            return
        self.last_line = now
        left_s = (now - self.started) / max(step - self.first_step, 1) * (total - step)
        print(
            f"[{self.config.label}] step {step}/{total}  loss {loss:.4f}  {images_per_s:.0f} images/s  "
            f"ETA {int(left_s) // 60}m{int(left_s) % 60:02d}s",
            flush=True,
        )


def truncate_metrics(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`. Drops an incomplete last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    storage.write_bytes(path, "".join(kept).encode())
