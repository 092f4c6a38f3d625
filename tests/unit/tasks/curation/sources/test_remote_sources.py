"""A source at a URI gives the records of a local one, and each shard fetches only what it reads."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from object_store import s3_server
from source_files import picture, read_records, tar_of, write

from model import storage
from tasks.curation.config import SourceConfig
from tasks.curation.sources import file_trees
from tasks.curation.sources.base import Account, open_corpus, write_corpus

URI = "memory://bucket/images"


@pytest.fixture(autouse=True)
def memory_store(monkeypatch):
    """Allows fsspec's store in memory as a remote store."""
    monkeypatch.setitem(storage.STORES, "memory", ("fsspec.implementations.memory", "MemoryFileSystem"))
    monkeypatch.setenv(storage.ALLOWED_STORES, "s3,memory")
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def source(tmp_path) -> Path:
    """Loose images with every kind of caption, three tars and a Parquet file."""
    folder = write(tmp_path / "source", {"notes.md": "x", "stray.json": "x", ".hidden.png": "x", ".git/b.png": "x"})
    for i in range(7):
        write(folder, {f"{i}.png": picture(i), f"{i}.txt": f"caption {i}"})
        write(folder, {f"pics/images/{i}.png": picture(30 + i), f"pics/captions/{i}.txt": f"parallel {i}"})
    write(folder, {"odd[1]*?.png": picture(7), "empty.png": b"", "sub/a.png": picture(8)})
    write(folder, {"sub/metadata.csv": 'file_name,text\r\na.png,"two\r\nlines"\r\n'})
    for i in range(3):
        members = {"a.png": picture(10 + i), "a.json": json.dumps({"text": f"tar {i}"}), "readme.md": ""}
        tar_of(folder / f"t{i}.tar", members)
    tar_of(folder / "beside/b.tar", {"b.png": picture(14)})
    write(folder, {"beside/metadata.jsonl": '{"file_name": "b.png", "text": "beside"}\n'})
    table = {"image": [picture(20 + i, side=512) for i in range(8)], "text": [f"row {i}" for i in range(8)]}
    pq.write_table(pa.table(table), folder / "p.parquet", row_group_size=2, compression="none")
    return folder


def copy(folder: Path, uri: str, **options) -> None:
    fs, root = fsspec.core.url_to_fs(uri, **options)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture
def remote(source):
    copy(source, URI)
    return source


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the files that are read, one for each read."""
    names: list[str] = []
    for method in ("cat_file", "_open"):

        def spy(self, path, *args, _real=getattr(MemoryFileSystem, method), **options):
            names.append(self._strip_protocol(path).removeprefix("/bucket/images/"))
            return _real(self, path, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, method, spy)
    return names


def read(path) -> tuple[list, dict]:
    """Records without their locations, and counts of the others by reason."""
    records, account = read_records(path, images_per_shard=4)
    root = str(path).rpartition("/")[0] if str(path).endswith((".tar", ".parquet", ".png")) else str(path)
    names = [record._replace(locator=record.locator.removeprefix(f"{root}/"), row=0) for record in records]
    return sorted(names), {reason: count for reason, (count, _) in account.skipped.items()}


def test_a_remote_source_gives_what_a_local_one_gives(remote):
    assert read(URI) == read(remote)
    assert len(read(URI)[0]) == 7 + 7 + 3 + 3 + 1 + 8


def test_records_of_a_remote_source_are_named_by_their_uris(remote):
    locators = {record.locator for record in read_records(URI)[0]}
    assert {f"{URI}/3.png", f"{URI}/t1.tar:a.png", f"{URI}/p.parquet:7"} <= locators


@pytest.mark.parametrize("name", ["t1.tar", "p.parquet", "3.png"])
def test_one_remote_file_is_a_source_too(remote, name):
    assert read(f"{URI}/{name}") == read(remote / name)


def test_the_scan_fetches_names_footers_and_metadata_and_a_shard_fetches_its_own_files(remote, fetched, tmp_path):
    write_corpus(SourceConfig(images_per_shard=4), URI, tmp_path / "corpus")
    assert set(fetched) == {"sub/metadata.csv", "beside/metadata.jsonl", "p.parquet", *(f"t{i}.tar" for i in range(3)), "beside/b.tar"}  # fmt: skip
    (remote / "beside/metadata.jsonl").unlink()
    (remote / "sub/metadata.csv").unlink()
    fs = fsspec.filesystem("memory")
    fs.rm("/bucket/images/beside/metadata.jsonl")
    fs.rm("/bucket/images/sub/metadata.csv")
    fetched.clear()
    report = write_corpus(SourceConfig(images_per_shard=4), URI, tmp_path / "without")
    assert set(fetched) == {"p.parquet"} and report["images"] == -1, "a tar shows what it has when it is read"
    corpus = open_corpus(tmp_path / "without")
    for shard in corpus.shards():
        fetched.clear()
        records = list(corpus.read(shard, Account()))
        own = {record.locator.removeprefix(f"{URI}/").partition(":")[0] for record in records}
        texts = {name.replace(".png", ".txt").replace("images/", "captions/") for name in own if name[-5].isdigit() and name.endswith(".png")}  # fmt: skip
        assert set(fetched) == (own - {"empty.png"}) | texts
        assert shard.kind != "tar" or len(fetched) == 1


def test_small_files_are_fetched_together_within_the_bounds(remote, monkeypatch):
    monkeypatch.setattr(file_trees, "FETCH_FILES", 3)
    sizes, real = [], MemoryFileSystem.cat_ranges

    def spy(self, paths, *args, **options):
        sizes.append(len(paths))
        return real(self, paths, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", spy)
    assert read(URI) == read(remote)
    assert max(sizes) == 6, "three images and their captions"
    sizes.clear()
    monkeypatch.setattr(file_trees, "FETCH_BYTES", 1)
    read(URI)
    assert max(sizes) == 2, "an image and its caption"


def test_a_broken_remote_tar_is_named_by_its_uri(remote, tmp_path):
    fs = fsspec.filesystem("memory")
    for part, content in (("a", (remote / "t0.tar").read_bytes()), ("b", b"no tar at all...")):
        fs.pipe_file(f"/bucket/images/part-{part}/t0.tar", content)
    corpus_dir = tmp_path / "corpus"
    fs.rm("/bucket/images/beside/metadata.jsonl")
    fs.rm("/bucket/images/sub/metadata.csv")
    write_corpus(SourceConfig(), URI, corpus_dir)
    corpus = open_corpus(corpus_dir)
    (shard,) = [shard for shard in corpus.shards() if "part-b" in shard.uri]
    with pytest.raises(ValueError, match=f"{URI}/part-b/t0.tar is not a readable tar") as caught:
        list(corpus.read(shard, Account()))
    assert "/tmp" not in str(caught.value)


def test_a_remote_object_that_changed_after_the_scan_is_named(remote, tmp_path):
    write_corpus(SourceConfig(), URI, tmp_path / "corpus")
    fsspec.filesystem("memory").pipe_file("/bucket/images/t1.tar", b"other")
    corpus = open_corpus(tmp_path / "corpus")
    (shard,) = [shard for shard in corpus.shards() if shard.uri.endswith("t1.tar")]
    with pytest.raises(ValueError, match=f"{URI}/t1.tar has changed"):
        list(corpus.read(shard, Account()))


def test_a_remote_place_without_images_or_out_of_reach_is_one_clear_error(remote, monkeypatch, tmp_path):
    def refused(uri, match):
        with pytest.raises(ValueError, match=match):
            write_corpus(SourceConfig(), uri, tmp_path / "corpus")

    refused("memory://bucket/none", "memory://bucket/none' does not exist, or is empty")
    fsspec.filesystem("memory").pipe_file("/bucket/texts/a.txt", b"x")
    refused("memory://bucket/texts", r"has no image; left out: 1 x .txt \(a.txt\)")
    refused("https://example.invalid/x", "not allowed")

    def fail(self, *args, **options):
        raise RuntimeError("no route to \x1b[31mhost")

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    refused(URI, r"cannot be reached: no route to \\x1b\[31mhost")


@pytest.mark.slow
def test_s3_with_flytes_credentials_reads_parts_of_a_parquet_file(source, tmp_path, monkeypatch):
    from s3fs.core import S3File

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FLYTE_AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("FLYTE_AWS_SECRET_ACCESS_KEY", "testing")
    with s3_server() as endpoint:
        monkeypatch.setenv("FLYTE_AWS_ENDPOINT", endpoint)
        access = {"endpoint_url": endpoint, "key": "testing", "secret": "testing"}
        fsspec.filesystem("s3", **access).mkdir("bucket")
        copy(source, "s3://bucket/images", **access)
        assert read("s3://bucket/images") == read(source)
        for uri in ("s3://bucket/none", "s3://no-such-bucket/x"):
            with pytest.raises(ValueError, match="does not exist, or is empty"):
                write_corpus(SourceConfig(), uri, tmp_path / "none")

        fs = fsspec.filesystem("s3", **access)
        for name in ("a.png", "b//c.png", "marked/", "marked/d.png", ".hidden/e.png"):
            fs.pipe_file(f"bucket/odd/{name}", b"" if name.endswith("/") else picture(1))
        result, skipped = read("s3://bucket/odd")
        assert sorted(record.locator for record in result) == ["a.png", "marked/d.png"]
        assert skipped == {"folder without a name": 1, "hidden": 1}, (
            "b//c.png is told, and the mark of a folder is none"
        )

        parquet = "s3://bucket/images/p.parquet"
        monkeypatch.setattr(file_trees, "BLOCK_BYTES", 2**16)
        write_corpus(SourceConfig(images_per_shard=2), parquet, tmp_path / "corpus")
        bytes_read, real = [], S3File._fetch_range

        def spy(self, start, end):
            bytes_read.append(end - start)
            return real(self, start, end)

        monkeypatch.setattr(S3File, "_fetch_range", spy)
        corpus = open_corpus(tmp_path / "corpus")
        shard = list(corpus.shards())[1]
        assert [record.captions for record in corpus.read(shard, Account())] == [["row 2"], ["row 3"]]
        assert sum(bytes_read) < 0.6 * (source / "p.parquet").stat().st_size, "two rows of eight, and the footer"
