"""No path of a user, a recipe or an artifact makes a file system that is not allowed."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from types import SimpleNamespace

import fsspec
import pytest

from model import storage
from model.config import OptimConfig, StageConfig, TrainConfig
from model.weights.checkpoints import CheckpointReader
from tasks.curation.config import SourceConfig
from tasks.curation.sources import file_trees
from tasks.planning.source import check_source
from tasks.recipe import load_recipe

SCHEMES = sorted(set(fsspec.available_protocols()) - {"s3", "file"})
CHAINS = [
    "reference::http://127.0.0.1:9/x.json",
    "reference::file:///etc/hostname",
    "simplecache::s3://bucket/x",
    "zip://a.png::s3://bucket/x.zip",
    "s3://bucket/x::memory://y",
    "filecache::memory://x",
]


@pytest.fixture
def no_filesystem(monkeypatch):
    """Fails when fsspec makes a file system of any class."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a file system was made: {args} {kwargs}")

    monkeypatch.setattr(fsspec.spec._Cached, "__call__", refuse)


def stage(**changes) -> TrainConfig:
    one = StageConfig(name="a", image_size_px=32, steps=1, batch_size=1, capacity_factors=1.0)
    return TrainConfig(stages=(one,), optim=OptimConfig(muon_lr=1e-3, adamw_lr=1e-3), **changes)


@pytest.mark.parametrize("path", [*(f"{scheme}://host/x" for scheme in SCHEMES), *CHAINS])
def test_every_other_scheme_and_every_chain_is_refused_before_a_file_system_is_made(path, no_filesystem):
    for use in (
        storage.filesystem,
        storage.check_writable_place,
        lambda path: check_source(path, True),
        file_trees.find,
        CheckpointReader,
        lambda path: SourceConfig(path=path),
        lambda path: stage(checkpoint_uri=path),
        lambda path: load_recipe("smoke", [f"source.path={json.dumps(path)}"]),
        lambda path: load_recipe("smoke", [f"train.checkpoint_uri={json.dumps(path)}"]),
    ):
        with pytest.raises(ValueError, match="::|not allowed|not a path"):
            use(path)


@pytest.mark.parametrize("path", ["s3://key:secret@bucket/x", "s3://user@bucket/x", "s3:///x", "S3://bucket/x", "a\0b"])
def test_uris_with_a_login_without_a_bucket_or_with_control_characters_are_refused(path, no_filesystem):
    with pytest.raises(ValueError) as error:
        storage.filesystem(path)
    assert "secret" not in str(error.value)


LOGINS = ["s3://u:secret@b::x", "simplecache::s3://u:secret@b/x", "http://u:secret@b/x", "gs://u:secret@b/x", "s3://u:secret@b/\n",
          "file://u:secret@b/x", "file:///http://u:secret@b", "x/s3://u:secret@b", "s3://u:se@secret@b/x",
          "s3://u:secret/with/slash@b/x"]  # fmt: skip


@pytest.mark.parametrize("path", LOGINS)
def test_no_refusal_shows_a_password_whatever_else_is_wrong(path, no_filesystem):
    for use in (
        storage.filesystem,
        lambda path: load_recipe("smoke", [f"source.path={json.dumps(path)}"]),
        lambda path: load_recipe("smoke", [f"train.checkpoint_uri={json.dumps(path)}"]),
        lambda path: load_recipe("smoke", [f"publish.s3_uri={json.dumps(path)}"]),
        lambda path: load_recipe("smoke", [f"curation.takedown={json.dumps(path)}"]),
    ):
        with pytest.raises(ValueError) as error:
            use(path)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["file:///s3://bucket/x", "file:////s3://bucket/x", "file:///a/file:///b", "file:///a://b"]
)
def test_a_file_uri_is_no_detour_to_another_scheme(path, no_filesystem):
    with pytest.raises(ValueError, match="must be file:///PATH, or a plain path; a path has no ://"):
        storage.filesystem(path)


def test_plain_paths_file_uris_and_s3_are_accepted(tmp_path, monkeypatch):
    assert storage.check_path(tmp_path) == str(tmp_path)
    assert storage.check_path(f"file://{tmp_path}") == str(tmp_path)
    assert storage.check_path("s3://bucket/a b/ü") == "s3://bucket/a b/ü"
    fs, path = storage.filesystem("s3://bucket/a/b")
    assert (type(fs).__name__, path) == ("S3FileSystem", "bucket/a/b")
    with pytest.raises(ValueError, match="NUCLEUS_STORES may allow it"):
        storage.check_path("gs://bucket/x")
    monkeypatch.setenv("NUCLEUS_STORES", "s3,gs")
    assert storage.check_path("gs://bucket/x") == "gs://bucket/x"
    monkeypatch.setenv("NUCLEUS_STORES", "s3,http")
    with pytest.raises(ValueError, match="it may name s3, gs, abfs"):
        storage.check_path("s3://bucket/x")


def test_a_cluster_refuses_a_file_uri_as_it_refuses_a_local_path():
    with pytest.raises(ValueError, match="your machine"):
        check_source("file:///data/images", local=False)


def test_a_reference_file_with_a_template_runs_nothing(tmp_path):
    """The payload of the finding: a list of files whose template runs a command when it is rendered."""
    marker = tmp_path / "marker"
    attack = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}".replace("MARKER", str(marker))
    listing = {"version": 1, "templates": {"u": attack}, "gen": [], "refs": {"a.png": [attack, 0, 1]}}
    (tmp_path / "refs.json").write_text(json.dumps(listing))

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            self.asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for inner in (f"http://127.0.0.1:{server.server_port}/refs.json", f"file://{tmp_path}/refs.json"):
            path = f"reference::{inner}"
            for use in (file_trees.find, storage.children, CheckpointReader):
                with pytest.raises(ValueError, match="::"):
                    use(path)
    finally:
        server.shutdown()
        server.server_close()
    assert not marker.exists()
    assert not Handler.asked


@pytest.mark.parametrize(
    "uri", ["https://b.s3.amazonaws.com/x?X-Amz-Signature=secret", "s3://u:p@b?sig=secret", "gs://b/x#secret"]
)
def test_no_refusal_shows_a_signed_query(uri):
    with pytest.raises(ValueError) as error:
        storage.check_path(uri)
    assert "secret" not in str(error.value) and "b" in str(error.value)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("'s3://u:p@b/x' and 's3://c/y'", "'s3://...@b/x' and 's3://c/y'"),
        ("(got 'https://b/x?a=1')", "(got 'https://b/x?...')"),
        ("['s3://u:p@b', 'x@y']", "['s3://...@b', 'x@y']"),
        (r"s3:\/\/u:p@b/x", r"s3:\/\/...@b/x"),
        ("s3:/u:p@b //u:p@b", "s3:/...@b //...@b"),
        ("s3://u:p'q\"@b", "s3://...@b"),
        ("is it s3://b/x? and/or 16:9, m:f@dir", "is it s3://b/x? and/or 16:9, m:f@dir"),
    ],
)
def test_a_message_is_shown_without_logins_and_queries_and_otherwise_whole(message, shown):
    assert storage.without_logins(message) == shown


@pytest.mark.parametrize(
    ("error", "failures", "attempts"),
    [(OSError("the connection was reset"), 2, 3), (OSError("503 Slow Down"), 5, 5), (PermissionError("no"), 1, 1)],
)
def test_a_write_to_a_store_that_fails_for_a_moment_is_tried_again(monkeypatch, error, failures, attempts):
    written = []

    def write(path, content):
        written.append((path, content))
        if len(written) <= failures:
            raise error

    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(storage, "filesystem", lambda path: (SimpleNamespace(pipe_file=write), path))
    with contextlib.nullcontext() if attempts > failures else pytest.raises(type(error), match=str(error)):
        storage.write_bytes("s3://bucket/report.json", b"done")
    assert written == [("s3://bucket/report.json", b"done")] * attempts
