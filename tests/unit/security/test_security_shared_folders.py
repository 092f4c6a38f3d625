"""Files of other users in a shared folder neither redirect nor stop a write, and are not unpickled (F7, F19, F22)."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from pathlib import Path

import fsspec
import pytest
from diskcache import Cache

from eval.files import replacing as replacing_image
from eval.files import replacing_text
from eval.judging.answers import Answers
from model import storage
from tasks.curation.config import SourceConfig, UrlConfig
from tasks.curation.journal import Journal
from tasks.curation.sources.urls.shards import BYTES, _download
from tasks.encoding.open_latents import _locked
from tasks.manifest import seal, verify, writing
from tasks.planning import local_cache

LIMIT_S = 20


def in_time(work) -> None:
    """Runs `work` in a thread: opening a pipe without a writer never returns."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    if failure:
        raise failure[0]


def test_a_pipe_among_leftovers_does_not_stop_writing(tmp_path):
    os.mkfifo(tmp_path / ".writing-pipe")

    def work() -> None:
        with writing(tmp_path / "final") as out:
            (out / "a").write_text("a")
            seal(out, "records")

    in_time(work)
    verify(tmp_path / "final")


def test_a_link_among_leftovers_is_not_followed(tmp_path):
    other = tmp_path / "other"
    (other / "precious").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".writing-link").symlink_to(other)
    with writing(tmp_path / "folder" / "final") as out:
        (out / "a").write_text("a")
        seal(out, "records")
    assert (other / "precious").is_dir()


def test_a_pipe_inside_a_sealed_directory_is_refused_and_not_opened(tmp_path):
    (tmp_path / "a").write_text("a")
    seal(tmp_path, "records")
    os.mkfifo(tmp_path / "pipe")

    def work() -> None:
        with pytest.raises(ValueError, match="is a pipe, socket or device"):
            verify(tmp_path)

    in_time(work)


@pytest.mark.parametrize("replacing", [storage.replacing, replacing_image, replacing_text])
def test_a_link_at_a_guessed_temporary_name_is_not_written_through(tmp_path, replacing):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target = tmp_path / "out.json"
    for name in (f".out.json.{os.getpid()}", ".out.json.tmp", "out.json.tmp", "out.tmp"):
        (tmp_path / name).symlink_to(victim)
    with replacing(target) as temporary:
        temporary.write("new") if hasattr(temporary, "write") else Path(temporary).write_text("new")
    assert target.read_text() == "new" and not target.is_symlink() and victim.read_text() == "precious"


def answers(folder: Path) -> None:
    Answers(folder, write=True).close()


def journal(folder: Path) -> None:
    Journal(str(folder)).close()


def downloads(folder: Path) -> None:
    asyncio.run(_download([], SourceConfig(urls=UrlConfig()), folder))


def index_lock(folder: Path) -> None:
    with _locked(folder / ".lock"):
        pass


@pytest.mark.parametrize(
    "name, opens",
    [("answers.jsonl", answers), ("journal.jsonl", journal), (BYTES, downloads), (".lock", index_lock)],
)
def test_a_link_or_pipe_in_place_of_a_file_that_is_appended_to_or_locked_is_refused(tmp_path, name, opens):
    victim, place = tmp_path / "victim", tmp_path / "work" / name
    victim.write_bytes(b"precious\nno newline at the end")
    place.parent.mkdir()
    opens(place.parent)
    assert not place.exists() or place.is_file()
    place.unlink(missing_ok=True)

    def refused() -> None:
        with pytest.raises(ValueError, match="is not a plain file"):
            opens(place.parent)

    place.symlink_to(victim)
    in_time(refused)
    assert victim.read_bytes() == b"precious\nno newline at the end"
    place.unlink()
    os.mkfifo(place)
    in_time(refused)


class Proof:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_entries_of_the_local_cache_are_not_unpickled(tmp_path):
    proof = tmp_path / "it_ran"
    with Cache(str(tmp_path / "cache")) as cache:
        cache["value"] = Proof(proof)
        cache[(1, "key")] = b"x"
        cache["large"] = [Proof(proof)] * 20_000  # in a separate file
        cache._sql("UPDATE Cache SET key = ? WHERE raw = 0", (pickle.dumps(Proof(proof)),))
    proof.unlink(missing_ok=True)
    assert local_cache.forget_lost_artifacts(str(tmp_path / "cache")) == 0
    assert not proof.exists()
    with Cache(str(tmp_path / "cache")) as cache:
        cache["value"]  # the entry works
    assert proof.exists()


@pytest.mark.parametrize("key", ["../escape", "a/../../escape", "/absolute", "a//b", "a/./b", "a\\..\\b", ".."])
def test_a_key_that_leads_outside_is_refused_before_any_download(tmp_path, monkeypatch, key):
    class Store(fsspec.AbstractFileSystem):
        fetched: list[str] = []

        def find(self, root, **_):
            return [f"{root}/good", f"{root}/{key}"]

        def get_file(self, name, target, **_):
            self.fetched.append(name)
            Path(target).write_text("x")

    store = Store()
    monkeypatch.setattr(storage, "filesystem", lambda path: (store, "bucket/folder"))
    with pytest.raises(ValueError, match="outside of the folder"):
        storage.copy_folder("s3://bucket/folder", tmp_path / "inner" / "target")
    assert not store.fetched and not list(tmp_path.rglob("*escape*"))
