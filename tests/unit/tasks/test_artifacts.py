"""Where artifacts and the state of unfinished work lie."""

from __future__ import annotations

import pytest

from tasks import envs
from tasks.artifacts import work_path
from tasks.manifest import seal


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    folder = tmp_path / "parent"
    folder.mkdir()
    (folder / "data.txt").write_text("data")
    seal(folder, "latents")
    return folder


def test_an_attempt_finds_the_work_of_the_last_one(parent, tmp_path):
    path = work_path("stage1", "training", {"steps": 3}, [parent])
    assert path == work_path("stage1", "training", {"steps": 3}, [parent])
    assert path.is_relative_to(tmp_path / "home" / "runs")
    others = [
        work_path("stage2", "training", {"steps": 3}, [parent]),
        work_path("stage1", "training", {"steps": 4}, [parent]),
        work_path("stage1", "training", {"steps": 3}, []),
    ]
    assert len({path, *others}) == 4


def test_newer_code_does_not_hand_on_the_work_of_older_code(parent, monkeypatch):
    before = work_path("stage1", "training", {"steps": 3}, [parent])
    monkeypatch.setitem(envs.CACHE_VERSIONS, "training", envs.CACHE_VERSIONS["training"] + "+")
    assert work_path("stage1", "training", {"steps": 3}, [parent]) != before


def test_work_may_lie_on_a_volume_that_outlives_the_pod(parent, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_WORK", str(tmp_path / "volume"))
    assert work_path("stage1", "training", {}, [parent]).is_relative_to(tmp_path / "volume")
