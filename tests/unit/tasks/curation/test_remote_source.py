"""A source at a URI gives the records of a local one, and each shard fetches what it reads and no more."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from object_store import s3_server
from PIL import Image

from model import storage
from tasks.curation import records
from tasks.curation.config import SourceConfig
from tasks.curation.sources import places, user_source
from tasks.curation.task import make_shard
from tasks.planning.source import fingerprint

URI = "memory://bucket/images"


@pytest.fixture(autouse=True)
def memory_store(monkeypatch):
    """Allows fsspec's store in memory as a remote store."""
    monkeypatch.setitem(storage.STORES, "memory", ("fsspec.implementations.memory", "MemoryFileSystem"))
    monkeypatch.setenv(storage.ALLOWED_STORES, "s3,memory")


def picture(seed: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path) -> Path:
    """Loose images with every kind of caption, three tars and a Parquet file."""
    folder = tmp_path / "source"
    for inside in ("sub", ".git"):
        (folder / inside).mkdir(parents=True)
    for i in range(7):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(f"caption {i}")
    (folder / "odd[1]*?.png").write_bytes(picture(7))
    (folder / "empty.png").write_bytes(b"")
    (folder / "sub/a.png").write_bytes(picture(8))
    (folder / "sub/metadata.csv").write_bytes(b'file_name,text\r\na.png,"two\r\nlines"\r\n')
    for name in (".hidden.png", ".git/b.png", "notes.md", "stray.json"):
        (folder / name).write_bytes(b"x")
    for i in range(3):
        with tarfile.open(folder / f"t{i}.tar", "w") as tar:
            for name, data in (("a.png", picture(10 + i)), ("a.json", json.dumps({"text": f"tar {i}"}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            tar.addfile(tarfile.TarInfo("readme.md"))
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
    yield source
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the files that are read, once for each time."""
    names: list[str] = []
    for method in ("cat_file", "_open"):

        def spy(self, path, *args, _real=getattr(MemoryFileSystem, method), **options):
            names.append(self._strip_protocol(path).removeprefix("/bucket/images/"))
            return _real(self, path, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, method, spy)
    return names


def read(path) -> tuple[list, Counter]:
    source = user_source.scan(path)
    skipped = Counter(source.skipped)
    return sorted(source.read(0, source.count, skipped)), skipped


def test_a_remote_source_gives_what_a_local_one_gives(remote):
    assert read(URI) == read(remote)
    assert len(read(URI)[0]) == 21


@pytest.mark.parametrize("name", ["t1.tar", "p.parquet", "3.png"])
def test_one_remote_file_is_a_source_too(remote, name):
    assert read(f"{URI}/{name}") == read(remote / name)


def test_each_shard_fetches_the_files_that_it_reads_and_no_others(remote, fetched, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    (remote / "p.parquet").unlink()
    fsspec.filesystem("memory").rm("/bucket/images/p.parquet")
    config, tars, parts = SourceConfig(shards=4), Counter(), []
    for shard in range(config.shards):
        fetched.clear()
        artifact = make_shard.task_function(config=config, path=URI, source_digest="of it", shard=shard)
        parts.append(Path(artifact.path))
        made = [record.sidecar["meta"]["path"].partition(":")[0] for record in records.read_records(parts[-1])]
        captions = [f"{i}.txt" for i in range(7) if f"{i}.png" in made]
        assert sorted(fetched) == sorted([*(n for n in made if n != "empty.png"), *captions, "sub/metadata.csv"])
        tars.update(name for name in fetched if name.endswith(".tar"))
    assert tars == {"t0.tar": 1, "t1.tar": 1, "t2.tar": 1}
    (tmp_path / "whole").mkdir()
    whole = records.make_records(SourceConfig(path=str(remote), shards=4), tmp_path / "whole")
    (tmp_path / "merged").mkdir()
    assert records.gather(parts, tmp_path / "merged") == whole


def test_small_files_are_fetched_together_within_the_bounds(remote, monkeypatch):
    monkeypatch.setattr(places, "FETCH_FILES", 6)
    sizes, real = [], MemoryFileSystem.cat_ranges

    def spy(self, paths, *args, **options):
        sizes.append(len(paths))
        return real(self, paths, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", spy)
    assert read(URI) == read(remote)
    assert sizes == [1, 6, 6, 4]  # a metadata file; pairs of image and caption; the last pair, and the images without
    sizes.clear()
    monkeypatch.setattr(places, "FETCH_BYTES", 1)
    read(URI)
    assert max(sizes) == 2, "an image and its caption"


def test_what_is_too_large_is_not_fetched(remote, fetched, monkeypatch):
    fsspec.filesystem("memory").pipe_file("/bucket/images/3.png", bytes(10_000_000))
    fsspec.filesystem("memory").pipe_file("/bucket/images/4.txt", b"x" * 2_000_000)
    monkeypatch.setattr(user_source, "MAX_MEMBER_BYTES", 9_000_000)
    fetched.clear()
    found, skipped = read(URI)
    assert skipped["larger than 256 MiB"] == 1 and skipped["sidecar over 1 MiB"] == 1
    assert not {"3.png", "4.txt"} & set(fetched)
    assert {item.locator: item.captions for item in found}["4.png"] == []


def test_a_remote_place_without_images_is_one_clear_error(remote):
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        user_source.scan("memory://bucket/none")
    fsspec.filesystem("memory").pipe_file("/bucket/texts/a.txt", b"x")
    with pytest.raises(ValueError, match=r"holds no image \(found 1 x .txt\)"):
        user_source.scan("memory://bucket/texts")
    with pytest.raises(ValueError, match="not allowed"):
        user_source.scan("nosuchscheme://bucket")


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
        assert fingerprint("s3://bucket/images") != fingerprint("s3://bucket/images/t0.tar")
        with pytest.raises(ValueError, match="is empty"):
            fingerprint("s3://bucket/none")

        bytes_read, real = [], S3File._fetch_range

        def spy(self, start, end):
            bytes_read.append(end - start)
            return real(self, start, end)

        monkeypatch.setattr(S3File, "_fetch_range", spy)
        monkeypatch.setattr(places, "BLOCK_BYTES", 2**16)
        parquet = "s3://bucket/images/p.parquet"
        report = records.make_shard(SourceConfig(path=parquet, shards=4), 1, tmp_path)
        assert report["records"] == 2
        assert sum(bytes_read) < 0.4 * (source / "p.parquet").stat().st_size, "two rows of eight, and the footer"
