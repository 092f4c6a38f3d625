"""Serves the last logged metrics of a stage in Prometheus' text format, if NUCLEUS_METRICS_PORT is set.

The first process of each node serves them: losses and rates are those of all ranks, MFU is that of this rank. Nothing is stored,
and a request does not wait for training.
"""

from __future__ import annotations

import math
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from model.logs import get_logger

from torchtitan.components.metrics import BaseLogger

logger = get_logger(__name__)

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
    """Listens on all addresses of the pod until `close`. If the port is taken, training continues without it."""

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
