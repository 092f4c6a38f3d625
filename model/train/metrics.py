"""torchtitan's metrics processor, extended to write metrics.jsonl and to print progress lines.

metrics.jsonl has one object per logged step: step, loss, loss_t/0.0-0.2 ... (mean loss of the samples whose timestep fell
into that bin since the last line; absent if there were none), grad_norm (before clipping), lr/..., images_per_s,
tokens_per_s (image tokens), images_seen, skipped_steps (so far), seconds (since this process began training), expert/...
(RouterTrace.statistics of rank 0's last micro-batch, means over layers). TensorBoard also has the values of each layer and
torchtitan's own metrics. On resume, lines after the resumed step are dropped.

With WANDB_API_KEY (or WANDB_MODE=offline) in the environment, the same values go to Weights & Biases, by torchtitan's logger: one
run for each stage, which attempts continue. WANDB_PROJECT is "nucleus" by default. With NUCLEUS_METRICS_PORT a Prometheus can
read the last values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from model import storage
from model.logs import get_logger

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


# --- Prometheus --------------------------------------------------------------------------------------------------

PORT = "NUCLEUS_METRICS_PORT"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name of a logged value -> name and description for Prometheus.
SERVED = {
    "loss": ("nucleus_train_loss", "Mean loss of the last logged step."),
    "grad_norm": ("nucleus_train_grad_norm", "Norm of the gradient before clipping."),
    "images_per_s": ("nucleus_train_images_per_second", "Images of all ranks."),
    "tokens_per_s": ("nucleus_train_tokens_per_second", "Image tokens of all ranks."),
    "mfu(%)": ("nucleus_train_mfu_percent", "Model FLOPs utilisation, by the device's bf16 peak."),
    "images_seen": ("nucleus_train_images_seen", "Images since the begin of the stage."),
    "skipped_steps": ("nucleus_train_skipped_steps", "Steps of the stage that were skipped."),
}


def metrics_port() -> int | None:
    """The port of NUCLEUS_METRICS_PORT in the first process of a node; None in others, or if it is unset.

    Raises:
        ValueError: it is not a port.
    """
    value = os.environ.get(PORT)
    if not value or int(os.environ.get("LOCAL_RANK", "0")):
        return None
    if not value.isdigit() or not 0 < int(value) < 65536:
        raise ValueError(f"{PORT}={value!r} is not a port; use a number from 1 to 65535, such as 9464")
    return int(value)


class PrometheusLogger(BaseLogger):
    """Serves the last logged metrics of a stage in Prometheus' text format, if NUCLEUS_METRICS_PORT is set.

    The first process of each node serves them: losses and rates are those of all ranks, MFU is that of this rank. Nothing is
    stored, and a request does not wait for training. Listens on all addresses of the pod until `close`. If the
    port is taken, training continues without it.
    """

    def __init__(self, port: int, stage: str):
        self.text = ""
        self.stage = stage.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        logs = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = logs.text.encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass  # not a line for each scrape

        self.server: ThreadingHTTPServer | None = None
        try:
            self.server = ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            logger.warning(f"[{stage}] no metrics at port {port}: {error.strerror}")
            return
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        values = {name: float(metrics[key]) for key, (name, _) in SERVED.items() if key in metrics}
        values["nucleus_train_step"] = float(step)
        help_of = dict(SERVED.values()) | {"nucleus_train_step": "The last logged step."}
        lines = []
        for name, value in values.items():
            number = repr(value) if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
            lines += [f"# HELP {name} {help_of[name]}", f"# TYPE {name} gauge"]
            lines.append(f'{name}{{stage="{self.stage}"}} {number}')
        self.text = "\n".join(lines) + "\n"

    def close(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
