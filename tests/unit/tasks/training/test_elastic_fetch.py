"""Training processes of torch elastic verify an artifact once at each start."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from flytekit.exceptions.user import FlyteUserRuntimeException
from flytekit.types.directory import FlyteDirectory

from tasks import artifacts
from tasks.elastic import PreemptibleElastic, PreemptibleElasticTask
from tasks.manifest import seal

RANKS = 3
LIMIT_S = 60


def fetch_together(directory: FlyteDirectory, folder: str) -> str:
    """The work of each process of a launch; the first attempt fails after all have fetched."""
    attempt, verify = os.environ["TORCHELASTIC_RESTART_COUNT"], artifacts.verify

    def noted(path, *without, **options):
        with open(Path(folder, "verified"), "a") as file:
            file.write(f"{attempt}\n")
        return verify(path, *without, **options)

    artifacts.verify = noted  # in this process, which ends with the attempt
    result = artifacts.fetch(directory, "latents")
    Path(folder, f"{attempt}-{os.environ['RANK']}").touch()
    deadline = time.monotonic() + LIMIT_S
    while len(list(Path(folder).glob(f"{attempt}-*"))) < RANKS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if attempt == "0" and os.environ["RANK"] == "0":
        raise RuntimeError("to be started again")
    return str(result)


@pytest.mark.slow
def test_each_launch_verifies_once_and_so_does_each_restart_of_it(tmp_path, monkeypatch):
    """A local run launches all its stages from one process."""
    artifact, temporary = tmp_path / "latents", tmp_path / "temporary"
    for folder in (artifact, temporary):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (artifact / "data.txt").write_text("data")
    seal(artifact, "latents")
    config = PreemptibleElastic(
        nnodes=1, nproc_per_node=RANKS, start_method="fork", max_restarts=1, monitor_interval=0.05
    )

    def launch(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        task = PreemptibleElasticTask(config, fetch_together)
        assert task._execute(directory=FlyteDirectory(str(artifact)), folder=str(tmp_path / name)) == str(artifact)
        return (tmp_path / name / "verified").read_text().split()

    assert launch("first") == ["0", "1"]
    (artifact / "data.txt").write_text("dat4")
    with pytest.raises(FlyteUserRuntimeException, match="data.txt was changed"):
        launch("second")
    marks = [
        path for path in temporary.rglob("*") if path.is_file() and path.read_text(errors="replace") == str(artifact)
    ]
    assert {path.parent.name for path in marks} == {"attempt_0", "attempt_1"}  # in the folders that torch makes
