"""A source at another place gives the same records, counts and digests: artifacts name files by their path inside the
source."""

from __future__ import annotations

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import picture, tar_of, write

from tasks.curation import flow
from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig
from tasks.curation.sources import tars
from tasks.curation.sources.base import MAX_IMAGE_BYTES, Account, open_corpus, write_corpus
from tasks.manifest import load_manifest
from tasks.store import read_index

pytestmark = pytest.mark.slow

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=8, min_entropy_bits=0.05))


def source_with_every_problem(folder):
    """Every problem of a record, and everything that is left out by a scan or a reader."""
    picture_of = iter(picture(i, side=64) for i in range(100))
    loose = ("a", "b", "B", "c", "d", "e", "big", "sub/x", "t", "u")
    write(folder, {f"{name}.png": next(picture_of) for name in loose})
    write(folder, {"a.txt": "a barn", "Á.txt": "stray", "c.txt": b"\xff", "d.json": '{"text": 7}', "e.json": "{"})
    write(folder, {"b.txt": "two", "b.PNG": next(picture_of), "notes.md": "x", ".hidden.png": b"x"})
    write(folder, {"images/p.png": next(picture_of), "photos/p.png": next(picture_of), "captions/p.txt": "whose"})
    write(folder, {"sub/metadata.csv": "file_name,text\nX.png,one\nx.PNG,two\ngone.png,three\n"})
    write(folder, {"metadata.json": '{"license": "CC0"}'})
    table = {"file_name": ["t.png", "x/m.png", "m.png"], "text": pa.array([b"caf\xe9", b"one", b"two"])}
    pq.write_table(pa.table(table), folder / "metadata.parquet")
    os.truncate(folder / "big.png", MAX_IMAGE_BYTES + 1)
    (folder / "link.png").symlink_to("a.png")
    members = [(f"{name}.png", next(picture_of)) for name in ("m", "n", "o", "n", "q")]
    members += [("n.txt", "x"), ("o.txt", b"\xff"), ("q.json", '{"text": 7}'), ("readme.md", ""), (".x.png", b"")]
    members += [("t/metadata.json", '{"license": "CC0"}'), ("captions/z.txt", "of none")]
    path = tar_of(folder / "x.tar", members)
    path.write_bytes(path.read_bytes() + b"behind the end" * 100)
    inside = [("a.png", next(picture_of)), ("metadata.csv", "file_name,text\nA.png,one\na.PNG,two\nz.png,x\n")]
    tar_of(folder / "y.tar", inside)
    rows = {"image": [next(picture_of), next(picture_of), None], "text": [b"\xff", b"row", b"none"]}
    pq.write_table(pa.table(rows), folder / "z.parquet")
    return folder


def what_is_read(path, out):
    report = write_corpus(SourceConfig(), str(path), out)
    corpus = open_corpus(out)
    shards = [shard._replace(uri="") for shard in corpus.shards()]
    total, records = corpus.account(), []
    for shard in corpus.shards():
        account = Account()
        records += corpus.read(shard, account)
        total += account
    lists = {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "files").iterdir())}
    return report["digest"], shards, records, total.to_json(), lists


def test_a_moved_source_gives_the_same_shards_records_and_counts(tmp_path):
    one = source_with_every_problem(tmp_path / "source")
    before = what_is_read(one, tmp_path / "corpus")
    moved = tmp_path / "elsewhere and longer" / "source"
    moved.parent.mkdir()
    shutil.move(one, moved)
    assert what_is_read(moved, tmp_path / "again") == before
    _, _, records, account, lists = before
    assert str(tmp_path) not in json.dumps([str(records), account, str(lists)])
    problems = {record.problem for record in records}
    assert problems == {"", "unreadable_file", "unreadable_caption", "ambiguous_caption"}
    assert len(account["skipped"]) >= 7, account["skipped"]
    assert all(record.detail for record in records if record.problem)


@pytest.mark.slow
def test_a_moved_source_gives_the_same_scores_decision_and_curation(tmp_path, monkeypatch):
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    results = []
    for name in ("a", "another and longer"):
        source = source_with_every_problem(tmp_path / name / "source")
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / name / "home"))
        curated, decision = flow.curate_source(SourceConfig(), str(source), CONFIG)
        scores = sorted(path.name for path in (tmp_path / name / "home/artifacts/scores").iterdir())
        selections = [(part.name, part.digest) for part in read_index(curated)]
        results.append((load_manifest(curated).digest, decision.digest, scores, selections))
        assert str(tmp_path) not in str(pq.read_table(curated / "ledger.parquet").to_pylist())
        assert not any(str(tmp_path) in (curated / path).read_text() for path in ("report.json", "report.html"))
    assert results[0] == results[1]


def test_a_shard_that_fails_at_another_place_gives_the_same_decision_and_names_no_place(tmp_path, monkeypatch):
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    real = tars.read

    def failing(place, name, *rest):
        if name == "sub/x.tar":
            raise ValueError(f"{place.shown(name)} cannot be read: {place.shown('sub/y.tar')!r}")
        yield from real(place, name, *rest)

    monkeypatch.setattr(tars, "read", failing)
    results = []
    for name in ("a", "another and longer"):
        source = write(tmp_path / name / "source", {"a.png": picture(1, side=64), "a.txt": "a barn"})
        for i, tar in enumerate(("sub/x.tar", "sub/y.tar"), start=2):
            tar_of(source / tar, {"a.png": picture(i, side=64), "a.txt": "a boat"})
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / name / "home"))
        config = CONFIG.model_copy(update={"min_success_ratio": 0.5})
        curated, decision = flow.curate_source(SourceConfig(), str(source), config)
        (error,) = [part.error for part in read_index(curated) if part.error]
        assert error == "sub/x.tar cannot be read: 'sub/y.tar'"
        book = pq.read_table(curated / "ledger.parquet").to_pylist()
        (failed,) = [row for row in book if row["rule"] == "shard_failed"]
        assert (failed["file"], failed["detail"]) == ("sub/x.tar", error)
        assert str(tmp_path) not in str(book)
        results.append((load_manifest(curated).digest, decision.digest))
    assert results[0] == results[1]


def test_only_the_root_of_a_local_source_is_left_out_of_messages(tmp_path):
    write_corpus(SourceConfig(), str(write(tmp_path / "s", {"a.png": picture()})), tmp_path / "corpus")
    corpus, root = open_corpus(tmp_path / "corpus"), tmp_path / "s"
    assert corpus.without_location(f"{root}/a.png and '{root}/b/c.png'") == "a.png and 'b/c.png'"
    for other in (f"/mnt{root}/a.png", f"{root}2/a.png", "s3://bucket/a.png"):
        assert corpus.without_location(other) == other
    for remote in ("s3://bucket", "/", ""):
        corpus.report["root"] = remote
        assert corpus.without_location("s3://bucket/a.png /b") == "s3://bucket/a.png /b"
