"""What a finished stage hands on, without training one."""

from __future__ import annotations

import json

import pytest

from model.train.run import METRICS, WEIGHTS, _publish


@pytest.fixture
def work(tmp_path):
    """A work_dir as a run of 20 steps leaves it."""
    for step in (10, 20):
        folder = tmp_path / "work" / WEIGHTS / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / ".metadata").write_bytes(b"m")
        (folder / "__0_0.distcp").write_bytes(bytes([step]))
    (tmp_path / "work" / METRICS).write_text("{}\n")
    return tmp_path / "work"


def report(resumed_from: int, **values) -> dict:
    return {"stage": "one", "steps": 20, "resumed_from_step": resumed_from, "loss": None, "train_s": 0.1} | values


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_lost_output_comes_back_to_the_byte_with_the_loss_of_the_run(work, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    told = report(10, loss=0.5, train_s=60.0)
    _publish(work, first, told)
    assert json.loads((first / "report.json").read_text()) == told
    assert told["checkpoints"] == [10, 20]
    nothing_done = report(20)
    _publish(work, again, nothing_done)
    assert files(again) == files(first)
    assert nothing_done["loss"] == 0.5 and nothing_done["resumed_from_step"] == 20


def test_a_longer_attempt_does_not_keep_an_older_report(work, tmp_path):
    for name, told in (("first", report(0, loss=0.5)), ("second", report(10, loss=0.4))):
        (tmp_path / name).mkdir()
        _publish(work, tmp_path / name, told)
    assert json.loads((tmp_path / "second" / "report.json").read_text())["loss"] == 0.4
