"""Training's metrics in Prometheus' text format."""

from __future__ import annotations

import math
import re
import socket
from urllib.request import urlopen

import pytest

from model.train import metrics
from model.train.metrics import CONTENT_TYPE, PrometheusLogger, metrics_port


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_last_logged_step_is_served_until_the_end_of_the_stage():
    port = free_port()
    served = PrometheusLogger(port, 'stage "256"')
    try:
        served.log({"loss": 2.0, "mfu(%)": 30.0, "lr/muon": 1e-4}, 10)
        served.log({"loss": 0.5, "mfu(%)": math.nan, "images_per_s": 640.0, "lr/muon": 1e-4}, 20)
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            text = answer.read().decode()
    finally:
        served.close()
    values = dict(re.findall(r'^(\w+)\{stage="stage \\"256\\""\} (\S+)$', text, flags=re.MULTILINE))
    assert values == {
        "nucleus_train_loss": "0.5",
        "nucleus_train_mfu_percent": "NaN",
        "nucleus_train_images_per_second": "640.0",
        "nucleus_train_step": "20.0",
    }
    assert {f"# TYPE {name} gauge" for name in values} <= set(text.splitlines())
    with pytest.raises(OSError):
        urlopen(f"http://127.0.0.1:{port}/metrics")


def test_training_continues_without_metrics_if_the_port_is_taken(caplog):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        served = PrometheusLogger(taken.getsockname()[1], "stage")
        served.log({"loss": 1.0}, 1)
        served.close()
    assert "no metrics at port" in caplog.text


def test_only_the_first_process_of_a_node_serves_and_only_if_a_port_is_set(monkeypatch):
    monkeypatch.delenv("NUCLEUS_METRICS_PORT", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert metrics_port() is None
    monkeypatch.setenv("NUCLEUS_METRICS_PORT", "9464")
    assert metrics_port() == 9464
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert metrics_port() is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("NUCLEUS_METRICS_PORT", "http")
    with pytest.raises(ValueError, match="NUCLEUS_METRICS_PORT='http' is not a port"):
        metrics_port()


@pytest.mark.parametrize("rank", [0, 8])
def test_the_first_process_of_each_node_serves_what_a_stage_logs(rank, monkeypatch, tmp_path):
    port = free_port()
    monkeypatch.setenv("NUCLEUS_METRICS_PORT", str(port))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: rank)
    config = metrics.StageMetrics.Config(label="stage1")
    logged = metrics.StageMetrics._build_metric_logger(None, config=config, dump_folder=str(tmp_path))
    try:
        logged.log({"loss": 2.0}, 1)
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b'nucleus_train_loss{stage="stage1"} 2.0' in answer.read()
    finally:
        logged.close()
    assert (tmp_path / metrics.TENSORBOARD).exists() == (rank == 0)
