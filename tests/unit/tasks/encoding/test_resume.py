"""Components whose training is killed repeatedly have the bits of components that were made without a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flytekit.types.directory import FlyteDirectory

from model import storage
from tasks.artifacts import UserError, home
from tasks.encoding import components, task
from tasks.encoding.small import training_state as resume
from tasks.encoding.small.training_state import TrainingState
from tasks.manifest import seal

ROOT = Path(__file__).resolve().parents[4]
# Every step is saved. An attempt is a fork; if asked, it kills itself in the middle of writing its n-th state.
SCRIPT = """
import os, signal, sys, traceback
from pathlib import Path
import torch
from diffusers import AutoencoderKLQwenImage  # here, so that attempts need not load it again
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
import model.optim
from tasks.encoding.small import training_state as resume
from tasks.encoding.components import make_components
from tasks.encoding.config import ComponentsConfig

curated, config, folder = Path(sys.argv[1]), ComponentsConfig.model_validate_json(sys.argv[2]), Path(sys.argv[3])
resume.EVERY_S, resume.MAX_SHARE = 0.0, 1e9
torch.set_num_threads(1)

def attempt(name, die_at=0):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    save, count = torch.save, 0
    def broken(saved, file):
        nonlocal count
        count += 1
        if count == die_at:
            Path(file).write_bytes(b"half of a state")
            os.kill(os.getpid(), signal.SIGKILL)
        save(saved, file)
    torch.save = broken
    try:
        (folder / name).mkdir(exist_ok=True)
        make_components(curated, config, folder / name, folder / f"{name}-work")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

print("ENDS", [attempt("whole"), *(attempt("killed", die_at) for die_at in (4, 9, 6, 0))])
"""


@pytest.mark.slow
def test_killed_while_writing_in_both_trainings_it_ends_with_the_same_bits(curated_dir, small_config, tmp_path):
    config = small_config.model_copy(
        update={
            "vae": small_config.vae.model_copy(update={"steps": 8, "image_size_px": 32}),
            "text_encoder": small_config.text_encoder.model_copy(update={"steps": 10}),
            "min_psnr_db": 0.0,
        }
    )
    command = [sys.executable, "-c", SCRIPT, str(curated_dir), config.model_dump_json(), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    kill = -signal.SIGKILL
    assert f"ENDS {[0, kill, kill, kill, 0]}" in done.stdout, done.stdout + done.stderr
    went_on = [line for line in done.stdout.splitlines() if "resumes after step" in line]
    # Killed at the VAE's fourth state, then (five states of the VAE later) at the text encoder's fourth, and at its ninth,
    # after the last step that gives one of the losses in the report.
    assert went_on == [
        "vae: resumes after step 3",
        "vae: resumes after step 8",
        "text_encoder: resumes after step 3",
        "vae: resumes after step 8",
        "text_encoder: resumes after step 8",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(killed) for path in killed.rglob("*") if path.is_file())
    assert [name for name in names if (whole / name).read_bytes() != (killed / name).read_bytes()] == []


def _training(path):
    """The state of a training of one vector."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    return TrainingState(path, [parameter], [optimizer], torch.Generator(), np.random.default_rng(0))


def test_a_state_is_saved_at_its_cadence_and_at_the_end_and_less_often_where_saving_is_slow(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    fsync = os.fsync

    def slow(descriptor):
        clock[0] += 2.0
        fsync(descriptor)

    monkeypatch.setattr(storage.os, "fsync", slow)
    path = tmp_path / "state.pt"
    state = _training(path)
    saved = []
    for step, now in enumerate((10.0, 31.0, 70.0, 232.0, 234.0, 240.0), start=1):
        clock[0] = now
        state.save(step, {}, last=step == 6)
        saved.append(torch.load(path, weights_only=True)["step"] if path.is_file() else 0)
    assert saved == [0, 2, 2, 2, 5, 6], "where it takes 2 s, the next save is due after 200 s"


def test_a_malicious_or_broken_state_is_refused_and_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"step": Harm()}, tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:100])
    torch.save({"step": 1}, tmp_path / "other.pt")
    for name in ("bad", "cut", "other"):
        with pytest.raises(ValueError, match=f"{name}.pt is not a state of this training"):
            _training(tmp_path / f"{name}.pt").load()
    assert not (tmp_path / "harmed").exists()


def test_all_attempts_of_a_task_share_one_work_directory_which_success_removes(tmp_path, monkeypatch, small_config):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    (tmp_path / "curated").mkdir()
    (tmp_path / "curated" / "file").write_text("curated")
    seal(tmp_path / "curated", "curated")
    places = []

    def make(curated, config, out, work_dir):
        places.append(work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / "vae.pt").write_text("so far")
        with pytest.raises(UserError, match="another run does the same work"):
            task.make_components.task_function(**inputs)
        if len(places) == 1:
            raise MemoryError
        (out / "report.json").write_text("{}")

    monkeypatch.setattr(components, "make_components", make)
    inputs = {"curated": FlyteDirectory(str(tmp_path / "curated")), "config": small_config}
    with pytest.raises(MemoryError):
        task.make_components.task_function(**inputs)
    assert (places[0] / "vae.pt").is_file() and places[0].is_relative_to(home())
    task.make_components.task_function(**inputs)
    assert places[0] == places[1] and not places[0].exists()
