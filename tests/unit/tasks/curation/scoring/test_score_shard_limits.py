"""A picture that takes more memory than a worker has, or that spoils its worker, costs its own record and no other."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from own_images import png

from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig
from tasks.curation.scoring import score
from tasks.curation.scoring.decode_memory import MIB
from tasks.curation.scoring.score import Measured
from tasks.curation.sources.base import open_corpus, write_corpus

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32))
spoiling: list[bytearray] = []  # what a worker keeps of its images


def scored(folder: Path, files: dict[str, bytes]) -> dict[str, tuple[str, str]]:
    """File -> (rule, error) of its row in scores.parquet."""
    source, corpus_dir, out = folder / "source", folder / "corpus", folder / "out"
    for path in (source, corpus_dir, out):
        path.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    write_corpus(SourceConfig(), str(source), corpus_dir)
    corpus = open_corpus(corpus_dir)
    (shard,) = corpus.shards()
    rows = score.score_shard(corpus, shard, CONFIG, out, {})
    table = pq.read_table(out / score.SCORES_TABLE, columns=["locator", "error_rule", "error"]).to_pylist()
    assert rows == {out: len(table)}
    return {row["locator"]: (row["error_rule"], row["error"]) for row in table}


def plain_png(side: int) -> bytes:
    """Made without Pillow: memory that this process has freed can come on top of a worker's limit."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row, packed = b"\0" + b"\xff\0\0" * side, zlib.compressobj(1)
    rows = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def small_worker(monkeypatch):
    score._load_libraries()
    monkeypatch.setattr(score, "WORKER_BYTES", 60 * MIB)


@pytest.mark.slow
@pytest.mark.fresh_process
def test_a_picture_over_a_workers_memory_costs_one_record(tmp_path, small_worker):
    files = {f"{i}.png": png(i) for i in range(4)} | {"2a.png": plain_png(8000)}  # 256 MB, below 480 MiB
    rows = scored(tmp_path, files)
    assert rows.pop("2a.png") == ("undecodable", "the image needs over 60 MiB to decode")
    assert rows == {f"{i}.png": ("", "") for i in range(4)}


def spoils(data: bytes, config: CurationConfig, whole: bool) -> Measured:
    """Keeps 40 MiB for each picture; where they are gone, it reports so, or that the picture is broken."""
    if os.environ["SPOILS"] == "as broken" and spoiling:
        return Measured({"error_rule": "undecodable", "error": "no memory", "width": 3000, "height": 3000})
    spoiling.append(bytearray(40 * MIB))
    return real_measure(data, config, whole)


real_measure = score.measure


@pytest.mark.parametrize("reported", ["as a lack of memory", "as broken"])
def test_a_good_picture_is_not_lost_to_what_its_neighbours_left(tmp_path, small_worker, monkeypatch, reported):
    monkeypatch.setenv("SPOILS", reported)
    monkeypatch.setattr(score, "measure", spoils)
    rows = scored(tmp_path, {f"{i}.png": png(i) for i in range(5)})
    assert rows == {f"{i}.png": ("", "") for i in range(5)}


def test_a_small_broken_picture_is_tried_once(tmp_path, monkeypatch):
    tries = tmp_path / "tries"

    def count(data: bytes, config: CurationConfig, whole: bool) -> Measured:
        with open(tries, "a") as file:
            file.write(".")
        return real_measure(data, config, whole)

    monkeypatch.setattr(score, "measure", count)
    rows = scored(tmp_path, {"0.png": png(0), "1.png": png(1)[:200], "2.png": png(2)})
    assert rows["1.png"][0] == "undecodable" and tries.read_text() == "..."
