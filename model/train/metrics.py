"""torchtitan's metrics processor, extended to write metrics.jsonl and to print progress lines.

metrics.jsonl has one object per logged step: step, loss, loss_t/0.0-0.2 ... (mean loss of the samples whose timestep fell
into that bin since the last line; absent if there were none), grad_norm (before clipping), lr/..., images_per_s,
tokens_per_s (image tokens), images_seen, skipped_steps (so far), seconds (since this process began training), expert/...
(RouterTrace.statistics of rank 0's last micro-batch, means over layers). TensorBoard also has the values of each layer and
torchtitan's own metrics. On resume, lines after the resumed step are dropped.

With WANDB_API_KEY (or WANDB_MODE=offline) in the environment, the same values go to Weights & Biases, by torchtitan's logger: one
run for each stage, which attempts continue. WANDB_PROJECT is "nucleus" by default. With NUCLEUS_METRICS_PORT a Prometheus can
read the last values (prometheus.py).
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from model import storage
from model.logs import get_logger
from model.train.prometheus import PrometheusLogger, metrics_port

from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor, WandBLogger

logger = get_logger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB = "wandb"  # its folder, which is not part of the result


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


def stage_logger(folder: Path, label: str, settings: dict[str, Any]) -> BaseLogger:
    """TensorBoard, and Weights & Biases if the environment has a key for it.

    The folder's name is the id of the W&B run, so that each attempt at a stage continues the same run. W&B ignores a
    second value for a step that an earlier attempt logged. If W&B does not start, training continues without it.
    """
    loggers = LoggerContainer()
    loggers.add_logger(_TensorBoard(folder / TENSORBOARD))
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        own = {
            "WANDB_RUN_NAME": label,
            "WANDB_RUN_ID": folder.name,
            "WANDB_RESUME": "allow",
            "WANDB_PROJECT": "nucleus",
        }
        added = {name: value for name, value in own.items() if name not in os.environ}
        os.environ.update(added)
        try:
            loggers.add_logger(WandBLogger(str(folder / WANDB), config_dict=settings))
        except Exception as error:  # errors of its network, login or process
            logger.warning(f"[{label}] no metrics go to Weights & Biases: {type(error).__name__}: {error}")
        finally:
            for name in added:  # another stage of this process has its own run
                del os.environ[name]
    return loggers


class StageMetrics(MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        label: str = ""
        total_steps: int = 0
        progress_every_s: float = 5.0
        settings: dict[str, Any] = field(default_factory=dict)  # of the stage, for Weights & Biases

    def __init__(self, config: Config, *, dump_folder: str = "", **kwargs: Any):
        super().__init__(config, dump_folder=dump_folder, **kwargs)
        self.path = Path(dump_folder) / METRICS
        self.started = self.last_line = time.perf_counter()
        self.first_step = 0
        self.images_since_last_log = self.tokens_since_last_log = 0  # sums over all ranks
        self.last: dict[str, float] = {}

    def _build_metric_logger(self, *, config: Config, dump_folder: str, **_: Any) -> BaseLogger:
        loggers = LoggerContainer()
        if dist.get_rank() == 0:
            loggers.add_logger(stage_logger(Path(dump_folder), config.label, config.settings))
        if (port := metrics_port()) is not None:
            loggers.add_logger(PrometheusLogger(port, config.label))
        return loggers

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

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Logs a message on rank 0."""
        if dist.get_rank() == 0:
            logger.log(level, f"[{self.config.label}] {text}")

    def _print_progress(self, step: int, loss: float, images_per_s: float, now: float) -> None:
        total = self.config.total_steps
        if step not in (1, total) and now - self.last_line < self.config.progress_every_s:
            return
        self.last_line = now
        left_s = (now - self.started) / max(step - self.first_step, 1) * (total - step)
        logger.info(
            f"[{self.config.label}] step {step}/{total}  loss {loss:.4f}  {images_per_s:.0f} images/s  "
            f"ETA {int(left_s) // 60}m{int(left_s) % 60:02d}s"
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
