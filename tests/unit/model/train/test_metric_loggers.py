"""Metrics also go to TensorBoard, and to Weights & Biases if the environment has a key."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.train.metrics import stage_logger


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which records its arguments and its metrics."""
    calls = {"init": [], "log": [], "finished": 0}
    module = SimpleNamespace(run=object())
    module.init = lambda **options: calls["init"].append(options | {"resume": os.environ.get("WANDB_RESUME")})
    module.log = lambda values, step: calls["log"].append((step, values))
    module.finish = lambda: calls.__setitem__("finished", calls["finished"] + 1)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    return calls


def scalars(folder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_without_a_key_nothing_is_sent(wandb, tmp_path):
    logger = stage_logger(tmp_path, "stage1", {})
    logger.log({"loss": 1.0}, 1)
    logger.close()
    assert not wandb["init"] and scalars(tmp_path) == [(1, 1.0)]


def test_with_a_key_both_get_every_step_and_attempts_share_one_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    for step in (1, 2):  # two attempts
        logger = stage_logger(tmp_path / "stage1-abc", "stage1", {"seed": 7})
        logger.log({"loss": 0.5}, step)
        logger.close()
    assert wandb["log"] == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and wandb["finished"] == 2
    for options in wandb["init"]:
        assert (options["id"], options["name"], options["resume"]) == ("stage1-abc", "stage1", "allow")
        assert options["project"] == "nucleus" and options["config"] == {"seed": 7}
        assert "planted" not in str(options)
    assert [step for step, _ in scalars(tmp_path / "stage1-abc")] == [1, 2]
    assert [name for name in os.environ if name.startswith("WANDB_")] == ["WANDB_API_KEY"]  # for the next stage


def test_a_users_own_settings_stand(wandb, tmp_path, monkeypatch):
    for name, value in {"WANDB_API_KEY": "k", "WANDB_PROJECT": "mine", "WANDB_RUN_ID": "r1"}.items():
        monkeypatch.setenv(name, value)
    stage_logger(tmp_path, "stage1", {}).close()
    (options,) = wandb["init"]
    assert (options["project"], options["id"]) == ("mine", "r1") and os.environ["WANDB_RUN_ID"] == "r1"


def test_training_continues_if_weights_and_biases_does_not_start(wandb, tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise OSError("no network")

    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    logger = stage_logger(tmp_path, "stage1", {})
    logger.log({"loss": 1.0}, 1)
    logger.close()
    assert "no metrics go to Weights & Biases: OSError: no network" in capsys.readouterr().out
    assert scalars(tmp_path) == [(1, 1.0)]
