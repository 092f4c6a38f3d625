"""The locations of artifacts and of the state of unfinished work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory

from tasks import envs
from tasks.artifacts import UserError, exclusive, fetch, plain_errors, produce, source, work_path
from tasks.manifest import Parent, load_manifest, seal


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


def test_newer_code_does_not_reuse_the_work_of_older_code(parent, monkeypatch):
    before = work_path("stage1", "training", {"steps": 3}, [parent])
    monkeypatch.setitem(envs.CACHE_VERSIONS, "training", envs.CACHE_VERSIONS["training"] + "+")
    assert work_path("stage1", "training", {"steps": 3}, [parent]) != before


def test_work_may_be_on_a_volume_that_outlives_the_pod(parent, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_WORK", str(tmp_path / "volume"))
    assert work_path("stage1", "training", {}, [parent]).is_relative_to(tmp_path / "volume")


fork = multiprocessing.get_context("fork")
LIMIT_S = 60


def hold(work_dir, holding, end, all_over):
    with exclusive(work_dir):
        if os.fork() == 0:  # as a data loader does: the child lives for some seconds more
            all_over.wait(LIMIT_S)
            os._exit(0)
        holding.set()
        end.wait(LIMIT_S)


def test_a_second_run_of_the_same_work_is_refused_until_the_first_has_ended(tmp_path):
    work_dir, holding, end, all_over = tmp_path / "runs" / "stage1", fork.Event(), fork.Event(), fork.Event()
    first = fork.Process(target=hold, args=(work_dir, holding, end, all_over), daemon=True)
    first.start()
    assert holding.wait(LIMIT_S)
    with pytest.raises(UserError, match="another run does the same work in .*stage1: stop it, or start again"):
        with exclusive(work_dir):
            pass
    context = FlyteContextManager.current_context()
    state = context.execution_state.with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    pod = context.with_execution_state(state)
    with FlyteContextManager.with_context(pod), pytest.raises(FlyteRecoverableException, match="another run"):
        with exclusive(work_dir):
            pass
    end.set()
    first.join()
    for _ in range(2):
        with exclusive(work_dir):
            shutil.rmtree(work_dir)  # as after finished work
    assert list(work_dir.parent.iterdir()) == []
    all_over.set()


def test_a_killed_run_releases_its_lock(tmp_path):
    holding = fork.Event()

    def work():
        with exclusive(tmp_path):
            holding.set()
            time.sleep(LIMIT_S)

    first = fork.Process(target=work, daemon=True)
    first.start()
    assert holding.wait(LIMIT_S)
    first.kill()
    first.join()
    with exclusive(tmp_path):
        pass


def test_the_training_processes_of_a_pod_download_an_artifact_once(parent, tmp_path, monkeypatch):
    """Flyte gives them one folder to download to: a second download would overwrite what the first one verifies."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    there, downloads = tmp_path / "downloaded", []

    def download():
        downloads.append(1)
        shutil.copytree(parent, there)  # refuses an existing folder

    with ThreadPoolExecutor(4) as ranks:
        result = list(ranks.map(lambda _: fetch(FlyteDirectory(str(there), downloader=download), "latents"), range(4)))
    assert result == [there] * 4 and len(downloads) == 1 and (there / "data.txt").read_text() == "data"


def test_a_download_that_failed_is_tried_by_the_next_process(parent, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    with pytest.raises(UserError, match="not a sealed directory"):
        fetch(FlyteDirectory(str(tmp_path / "nothing")), "latents")
    shutil.copytree(parent, tmp_path / "nothing")
    assert fetch(FlyteDirectory(str(tmp_path / "nothing")), "latents") == tmp_path / "nothing"


def test_files_that_stay_in_the_store_are_neither_needed_nor_verified_and_all_others_are(parent, tmp_path):
    (parent / "rows.bin").write_text("rows")
    seal(parent, "latents")
    partly = shutil.copytree(parent, tmp_path / "partly", ignore=shutil.ignore_patterns("*.bin"))
    artifact = FlyteDirectory(str(partly))
    with pytest.raises(UserError, match="lacks rows.bin"):
        fetch(artifact, "latents")
    assert fetch(artifact, "latents", without=(".bin",)) == partly and source(artifact) == str(partly)
    (partly / "data.txt").write_text("Data")
    with pytest.raises(UserError, match="data.txt was changed"):
        fetch(artifact, "latents", without=(".bin",))


def test_a_manifest_names_the_uris_of_parents_that_were_downloaded_and_not_the_pods_copies(parent, tmp_path):
    copy = shutil.copytree(parent, tmp_path / "copy")
    artifact = FlyteDirectory(str(copy))
    artifact._remote_source = "s3://bucket/raw/latents"
    paths = [fetch(artifact, "latents"), parent]
    part = Parent(kind="scores", digest="0" * 64, uri="s3://bucket/part")
    _, made, _ = produce("merged", lambda out: (out / "a").write_text("a"), [*paths, part])
    assert [p.uri for p in load_manifest(made).parents] == ["s3://bucket/raw/latents", str(parent), "s3://bucket/part"]


def test_a_full_disk_is_one_message_and_other_errors_of_the_disk_stay():
    with pytest.raises(UserError, match="the disk is full while making scores"), plain_errors():
        raise OSError(errno.ENOSPC, "the disk is full while making scores")
    with pytest.raises(PermissionError), plain_errors():
        raise PermissionError(errno.EACCES, "not allowed")
