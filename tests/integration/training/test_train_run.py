"""What a finished stage returns and keeps; no stage is trained."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from train_helpers import train_config, training_stage, write_latents

import model.train.device
from model.train.run import (
    CHECKPOINTS,
    METRICS,
    OPTIMIZER,
    REPORT,
    WEIGHTS,
    _claim,
    _content,
    _fill,
    prune_run,
    train_stage,
)  # fmt: skip

STEPS = 20
REPORTED = {"stage": "small", "loss": 0.5, "resumed_from_step": 10, "checkpoints": [10, 20], "optimizer": [20]}


@pytest.fixture
def work(tmp_path):
    """A work_dir as a run of 20 steps leaves it."""
    for folder, step, name in (
        (WEIGHTS, 10, "step-00000010"),
        (WEIGHTS, 20, "step-00000020"),
        (OPTIMIZER, 20, "step-00000020"),
        (CHECKPOINTS, 20, "step-20"),
    ):
        path = tmp_path / "work" / folder / name
        path.mkdir(parents=True)
        (path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
        (path / "__0_0.distcp").write_bytes(bytes([step]))
    (tmp_path / "work" / METRICS).write_text("{}\n")
    (tmp_path / "work" / REPORT).write_text(json.dumps(REPORTED))
    return tmp_path / "work"


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_stage_is_filled_again_from_what_pruning_leaves_without_training(work, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    _fill(str(work), work, first, (work / REPORT).read_bytes())
    config = train_config(steps=STEPS)
    prune_run(config, work)
    assert not (work / CHECKPOINTS).exists() and (work / WEIGHTS).exists()
    latents = write_latents(tmp_path / "latents")
    # The inputs of training are gone, so only filling can make these bytes.
    report = train_stage(latents, training_stage(config, hand_on_optimizer=True), None, work, again)
    assert files(again) == files(first) and set(files(first)) == {
        "optimizer/step-00000020/.metadata", "optimizer/step-00000020/__0_0.distcp",
        "step-00000010/.metadata", "step-00000010/__0_0.distcp", "step-00000020/.metadata",
        "step-00000020/__0_0.distcp", METRICS, REPORT,
    }  # fmt: skip
    assert report == {**REPORTED, "resumed_from_step": STEPS}


def test_files_for_the_next_stage_take_no_extra_space(work, tmp_path):
    (tmp_path / "out").mkdir()
    _fill(str(work), work, tmp_path / "out", b"{}")
    here, there = work / WEIGHTS / "step-00000020" / "__0_0.distcp", tmp_path / "out" / "step-00000020" / "__0_0.distcp"
    assert here.stat().st_ino == there.stat().st_ino


@pytest.mark.parametrize("lost", [REPORT, f"{WEIGHTS}/step-00000020/.metadata", f"{OPTIMIZER}/step-00000020/.metadata"])
def test_a_stage_that_is_not_finished_or_lost_its_output_is_not_pruned(work, lost):
    (work / lost).unlink()
    prune_run(train_config(steps=STEPS), work)
    assert (work / CHECKPOINTS / "step-20" / ".metadata").is_file()


def test_a_run_is_known_by_every_byte_it_starts_from(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / ".metadata").write_bytes(b"m")
    (checkpoint / "__0_0.distcp").write_bytes(b"weights")
    before = _content(checkpoint)
    (checkpoint / "__0_0.distcp").write_bytes(b"Weights")
    assert _content(checkpoint) != before
    # A seal is trusted for its files, so that hundreds of gigabytes are not read again.
    (tmp_path / "manifest.json").write_text('{"digest": "abc"}')
    assert _content(checkpoint) == "abc/checkpoint" and _content(tmp_path) == "abc"
    assert _content(tmp_path / "optimizer" / "step-00000003") == "abc/optimizer/step-00000003"


@pytest.mark.parametrize(
    "device, deterministic, own, expected",
    [
        ("cuda", True, None, "^NVLS,NVLSTree"),
        ("cuda", True, "Ring", "Ring"),
        ("cuda", False, None, None),
        ("cpu", True, None, None),
    ],
)
def test_nccl_adds_up_in_one_order_where_training_is_deterministic(
    tmp_path, monkeypatch, device, deterministic, own, expected
):
    """NCCL reads the environment when the group is made; the variable must be reset after the stage."""
    seen = []

    def init_process_group(*args, **kwargs):
        seen.append(os.environ.get("NCCL_ALGO"))
        raise ConnectionError

    monkeypatch.setattr(model.train.device, "DEVICE_TYPE", device)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    if own is not None:
        monkeypatch.setenv("NCCL_ALGO", own)
    latents, config = write_latents(tmp_path / "latents"), train_config(deterministic=deterministic)
    with pytest.raises(ConnectionError):
        train_stage(latents, training_stage(config), None, tmp_path / "work", tmp_path / "out")
    assert seen == [expected] and os.environ.get("NCCL_ALGO") == own


def test_other_latents_are_refused_in_the_same_work_dir(tmp_path):
    latents = write_latents(tmp_path / "latents")
    arguments = training_stage(train_config(steps=STEPS)), None, None
    _claim(str(tmp_path), latents, *arguments)
    _claim(str(tmp_path), latents, *arguments)
    other = write_latents(tmp_path / "other", images=63)
    with pytest.raises(ValueError, match="another latents"):
        _claim(str(tmp_path), other, *arguments)
