"""On a cluster, a task downloads the file lists of the shards it reads, and no other lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from flytekit.types.directory import FlyteDirectory
from object_store import s3_bucket
from own_images import png

from model import storage
from tasks import artifacts
from tasks.curation import flow
from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig
from tasks.curation.curated import LARGE_FILES, open_curated
from tasks.curation.sources.base import Account, open_corpus
from tasks.curation.task import score_group
from tasks.store import make_sealed, read_index

IMAGES_PER_SHARD = 5
SOURCE = SourceConfig(images_per_shard=IMAGES_PER_SHARD)
CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05))


@pytest.fixture
def fs(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    with s3_bucket("nucleus-corpora") as fs:
        yield fs


@pytest.fixture
def downloads(fs, monkeypatch) -> dict[str, int]:
    """Name -> bytes of each object that was downloaded."""
    sizes: dict[str, int] = {}
    real = fs.get_file

    def get_file(source: str, target: str, **more) -> None:
        real(source, target, **more)
        sizes[source.partition("/")[2]] = Path(target).stat().st_size

    monkeypatch.setattr(fs, "get_file", get_file)
    return sizes


def uploaded(directory: Path, name: str, work: Path) -> FlyteDirectory:
    """An artifact as in a pod: at a URI, with a folder for its download that does not exist yet."""
    uri = f"s3://nucleus-corpora/{name}"
    for path in directory.rglob("*"):
        if path.is_file():
            storage.upload(path, storage.join(uri, path.relative_to(directory).as_posix()))
    artifact = FlyteDirectory(str(work / name), downloader=lambda: storage.copy_folder(uri, work / name))
    artifact._remote_source = uri
    return artifact


def loose_images(folder: Path, shards: int) -> Path:
    folder.mkdir()
    for i in range(shards * IMAGES_PER_SHARD):
        (folder / f"{i:04d}.png").write_bytes(png(i % 40))
        (folder / f"{i:04d}.txt").write_text(f"image {i} of {shards} shards")
    return folder


def bytes_of_one_group(tmp_path: Path, shards: int, downloads: dict[str, int]) -> tuple[int, int, int]:
    """(number of shards, which depends on the content, bytes of lists of files, bytes of everything else)."""
    source = loose_images(tmp_path / f"images-{shards}", shards)
    corpus, _, report = make_sealed(
        "corpus", lambda out: flow.write_corpus(SOURCE, str(source), [], out), logs=flow.CORPUS_LOGS
    )
    artifact, groups = uploaded(corpus, f"corpus-{shards}", tmp_path / "pod"), list(range(report["shards"]))
    downloads.clear()
    scores = score_group.task_function(corpus=artifact, config=CONFIG, groups=groups, group=1)
    (part,) = read_index(scores.path)
    assert not part.error and part.rows
    lists = [size for name, size in downloads.items() if "/files/" in name]
    assert len(lists) == 1
    return report["shards"], lists[0], sum(downloads.values()) - lists[0]


@pytest.mark.slow
def test_a_scoring_task_downloads_one_list_of_files_for_its_one_shard_of_however_many(tmp_path, downloads):
    few, list_of_few, rest_of_few = bytes_of_one_group(tmp_path, 4, downloads)
    many, list_of_many, rest_of_many = bytes_of_one_group(tmp_path, 40, downloads)
    assert many > 4 * few
    assert list_of_many < 1.5 * list_of_few
    # A shard only adds a row to the table of shards and a line to the manifest, however many images it has.
    assert rest_of_many - rest_of_few < 300 * (many - few)


@pytest.mark.slow
def test_a_reader_of_curated_images_downloads_the_lists_of_the_shards_that_it_reads(tmp_path, downloads):
    source = loose_images(tmp_path / "images", 4)
    directory, _ = flow.curate_source(SOURCE, str(source), CONFIG)
    downloads.clear()
    path = artifacts.fetch(uploaded(directory, "curated", tmp_path / "pod"), "curated", LARGE_FILES)
    curated = open_curated(path)
    parts = list(curated.parts())
    assert len(parts) > 3 and not any("/files/" in name for name in downloads)
    assert sum(1 for _ in curated.images(parts[2])) == parts[2].rows
    assert [name for name in downloads if "/files/" in name] == [f"curated/corpus/files/{parts[2].name}.parquet"]


def test_a_list_that_was_changed_on_this_machine_is_refused_before_it_is_scored(tmp_path, fs):
    source = loose_images(tmp_path / "images", 1)
    corpus, _, _ = make_sealed(
        "corpus", lambda out: flow.write_corpus(SOURCE, str(source), [], out), logs=flow.CORPUS_LOGS
    )
    changed = next((corpus / "files").glob("*.parquet"))
    changed.chmod(0o644)
    changed.write_bytes(b"another list")
    directory = artifacts.fetch(FlyteDirectory(str(corpus)), "corpus", without=("files/",))
    opened = open_corpus(directory)
    with pytest.raises(ValueError, match="was changed: its SHA-256 is"):
        list(opened.read(next(iter(opened.shards())), Account()))


@pytest.mark.slow
def test_a_list_that_was_changed_in_the_store_is_refused(tmp_path, fs):
    source = loose_images(tmp_path / "images", 1)
    directory, _ = flow.curate_source(SOURCE, str(source), CONFIG)
    path = artifacts.fetch(uploaded(directory, "curated", tmp_path / "pod"), "curated", LARGE_FILES)
    curated = open_curated(path)
    part = next(curated.parts())
    fs.pipe_file(f"nucleus-corpora/curated/corpus/files/{part.name}.parquet", b"another list")
    with pytest.raises(ValueError, match="was changed: its SHA-256 is"):
        list(curated.images(part))
