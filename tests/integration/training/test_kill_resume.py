"""A stage killed with SIGKILL and started again ends with the bits of an uninterrupted stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_helpers import logged_steps, read_weights, write_latents

STEPS = 24
KILLED_AT = 13  # between two checkpoints (steps 5, 10, ...), so that steps are lost and repeated
LIMIT_S = 600
SCRIPT = """
import sys, time
from pathlib import Path
from train_helpers import train_config, training_stage
from model.train.run import train_stage
from model.train.trainer import NucleusTrainer
latents, work, out = (Path(argument) for argument in sys.argv[1:4])
out.mkdir(parents=True, exist_ok=True)
real = NucleusTrainer.train_step
def train_step(self, batches):
    if sys.argv[4:] == [str(self.step)]:
        time.sleep({limit})  # until it is killed
    real(self, batches)
NucleusTrainer.train_step = train_step
train_stage(latents, training_stage(train_config(steps={steps})), None, work, out)
"""


def start(latents: Path, work: Path, out: Path, *stop_before: int) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT.format(steps=STEPS, limit=LIMIT_S),
            *map(str, (latents, work, out, *stop_before)),
        ],
        cwd=root,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{Path(__file__).parents[1]}:{Path(__file__).parent}",
        },
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_stage_killed_and_started_again_ends_with_identical_bits(tmp_path):
    latents = write_latents(tmp_path / "latents")
    whole = start(latents, tmp_path / "whole_work", tmp_path / "whole")
    killed = start(latents, tmp_path / "work", tmp_path / "killed", KILLED_AT)
    deadline = time.monotonic() + LIMIT_S
    while logged_steps(tmp_path / "work" / "metrics.jsonl")[-1:] < [KILLED_AT - 1]:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not list((tmp_path / "killed").iterdir())

    again = start(latents, tmp_path / "work", tmp_path / "killed")
    assert again.wait(timeout=LIMIT_S) == 0 and whole.wait(timeout=LIMIT_S) == 0
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert report["resumed_from_step"] == 10
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["resumed_from_step"] == 0

    expected, got = read_weights(tmp_path / "whole"), read_weights(tmp_path / "killed")
    assert list(expected) == list(got) == [15, 20, 24]
    for step in expected:
        assert expected[step].keys() == got[step].keys() and len(got[step]) > 30
        for name, value in expected[step].items():
            assert torch.equal(value, got[step][name]), f"{name} differs at step {step}"
    assert not torch.equal(got[20]["proj_out.weight"], got[24]["proj_out.weight"])

    lines = {
        run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    }
    assert [line["step"] for line in lines["killed"]] == [1, *range(2, STEPS + 1, 2)]
    # The bins of the first line after the resume lack the steps before it; the losses are the same.
    assert [line["loss"] for line in lines["killed"]] == [line["loss"] for line in lines["whole"]]
