"""A corpus captioned through an endpoint that fails: nothing is lost, and no answered request is repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from object_store import s3_bucket
from own_images import png, write_folder
from stub_endpoint import stub_endpoint

from tasks.curation import flow, http_retries
from tasks.curation.captioning import run
from tasks.curation.config import CaptionConfig, CaptionerConfig, CurationConfig, FilterConfig, SourceConfig
from tasks.curation.curated import open_curated
from tasks.curation.journal import JOURNAL
from tasks.curation.scoring.score import SCORES_TABLE
from tasks.manifest import load_manifest
from tasks.store import INDEX, Part, fetch_part, read_index

FILTERS = FilterConfig(min_side_px=32, min_entropy_bits=0.05)
PER_TIER = dict.fromkeys(("A1", "A2", "A3", "A4", "A5"), ("short", "medium"))

# A run that is killed at a number of answers.
KILLED_AT = """
import os, signal
from {name} import config
from tasks.curation import flow, http_retries, journal
from tasks.curation.config import SourceConfig
http_retries.FIRST_WAIT_S = 0.01
real, count = journal.Journal.add, 0
def add(self, row):
    global count
    real(self, row)
    count += 1
    if count == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.add = add
flow.curate_source(SourceConfig(), {source!r}, config({url!r}))
"""


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    monkeypatch.setattr(http_retries, "FIRST_WAIT_S", 0.01)


def config(url: str, **changes) -> CurationConfig:
    asked = {"name": "openai", "model": "stub", "endpoint": url, "per_tier": PER_TIER, "concurrency": 8, "image_px": 64}
    return CurationConfig(filters=FILTERS, captioner=CaptionerConfig(**(asked | changes)))


def folder(path: Path, count: int = 12) -> Path:
    path.mkdir()
    for seed in range(count):
        (path / f"p{seed:03d}.png").write_bytes(png(seed))
    return path


def captions_of(curated: Path) -> pd.DataFrame:
    """captions.parquet of all shards, by the parents of the selections."""
    tables = []
    for part in read_index(curated):
        (parent,) = load_manifest(fetch_part(part)).parents
        assert parent.kind == "captions"
        tables.append(
            pd.read_parquet(fetch_part(Part(part.name, parent.kind, parent.digest, parent.uri)) / run.CAPTIONS_TABLE)
        )
    return pd.concat(tables)


@pytest.mark.slow
def test_every_image_has_each_caption_although_a_fifth_fails_is_refused_or_loops(tmp_path):
    source = folder(tmp_path / "source", 40)
    with stub_endpoint(share=0.2) as stub:
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url, attempts=8))
    assert {"429", "500", "refused", "loop"} <= stub.faults.keys()
    table = captions_of(curated)
    assert len(table) == 80 and set(table["status"]) == {"ok"}
    assert table["attempts"].max() > 1
    assert not table["text"].str.contains("sorry|the box is red and the box").any()
    read = open_curated(curated)
    assert read.num_records == 40
    for part in read.parts():
        assert all(len(texts) == 2 for texts in read.selection(part)["captions"].to_pylist())
    assert max(stub.answered.values()) == 1


@pytest.mark.slow
def test_what_no_attempt_describes_is_in_the_ledger_with_the_answers(tmp_path):
    source = folder(tmp_path / "source", 6)
    (source / "p005.txt").write_text("the caption of its owner")
    with stub_endpoint(share=0.0) as stub:
        refusal = {"choices": [{"message": {"content": "I cannot describe this image."}, "finish_reason": "stop"}]}
        stub.reply = lambda body: (200, {}, json.dumps(refusal).encode())
        with pytest.raises(ValueError, match="could not be described|kept none"):
            flow.curate_source(SourceConfig(), str(folder(tmp_path / "bare", 2)), config(stub.url, attempts=2))
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url, attempts=2))
    book = pd.read_parquet(curated / "ledger.parquet").set_index("file")
    assert len(book) == 6 and book["kept"].sum() == 1 and book.loc["p005.png", "kept"]
    left_out = book[~book["kept"]]
    assert set(left_out["rule"]) == {"no_caption"} and left_out["detail"].str.contains("short: refused").all()
    assert captions_of(curated).query("length != 'original'")["attempts"].tolist() == [2] * 12


@pytest.mark.slow
def test_a_duplicate_is_not_described_and_stays_a_duplicate(tmp_path):
    source = folder(tmp_path / "source", 4)
    (source / "q.png").write_bytes(png(1))
    with stub_endpoint(share=0.0) as stub:
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url))
    book = pd.read_parquet(curated / "ledger.parquet")
    assert book["rule"].value_counts().to_dict() == {"": 4, "exact_duplicate": 1}
    assert sum(stub.answered.values()) == 8


@pytest.mark.slow
def test_the_owners_captions_stay_and_are_replaced_only_if_configured(tmp_path):
    source = write_folder(tmp_path / "source", range(3), "an owner wrote this about picture {}")
    with stub_endpoint(share=0.0) as stub:
        both, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url))
        asked = sum(stub.answered.values())
        new, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url, use_originals=False))
        assert sum(stub.answered.values()) == asked == 6  # from the journal
    for curated, count, owners in ((both, 3, 1), (new, 2, 0)):
        read = open_curated(curated)
        for part in read.parts():
            for texts in read.selection(part)["captions"].to_pylist():
                assert len(texts) == count and sum("an owner" in text for text in texts) == owners
        assert (captions_of(curated)["length"] == run.ORIGINAL).sum() == 3


@pytest.mark.slow
def test_killed_in_the_middle_no_answered_question_is_asked_again(tmp_path):
    source = folder(tmp_path / "source", 30)
    with stub_endpoint(share=0.2) as stub:
        script = KILLED_AT.format(name=__name__, count=25, source=str(source), url=stub.url)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-3000:]
        (journal,) = Path(os.environ["NUCLEUS_HOME"]).rglob(JOURNAL)
        with open(journal, "ab") as file:
            file.write(b'{"question": "torn')  # a line that the kill cut off
        kept = [json.loads(line)["question"] for line in journal.read_bytes().splitlines()[:-1]]
        assert len(kept) == 25
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url))
        again = [digest for digest, count in stub.answered.items() if count > 1]
        assert len(again) <= 8  # in flight at the kill, so that their answers were lost
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()]
    questions = [row["question"] for row in rows]
    assert questions[:25] == kept and len(set(questions)) == len(questions)
    assert open_curated(curated).num_records == 30


@pytest.mark.slow
def test_in_an_object_store_a_killed_pods_answers_are_not_asked_for_again(tmp_path, monkeypatch):
    """Killed at the 40th answer, at a pace at which few answers come during one request to the store."""
    source = folder(tmp_path / "source", 30)
    with stub_endpoint(share=0.2) as stub, s3_bucket("captions") as fs:
        monkeypatch.setenv("NUCLEUS_STORE", "s3://captions/store")
        quick = stub.reply

        def slow(body: bytes):
            time.sleep(0.2)
            return quick(body)

        stub.reply = slow
        script = KILLED_AT.format(name=__name__, count=40, source=str(source), url=stub.url)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-3000:]
        assert len(fs.glob("captions/store/journals/captions/*/*.jsonl")) == 1
        stub.reply = quick
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url))
        again = sum(stub.answered.values()) - len(stub.answered)
    assert again <= 20, "8 in flight, and what came during one request"
    assert open_curated(curated).num_records == 30


@pytest.mark.slow
def test_who_decides_and_selects_downloads_the_scores_with_captions_but_not_the_answers_besides(tmp_path, monkeypatch):
    source, downloaded = folder(tmp_path / "source", 12), []
    with stub_endpoint(share=0.0) as stub, s3_bucket("captions") as fs:
        monkeypatch.setenv("NUCLEUS_STORE", "s3://captions/store")
        curated, decision = flow.curate_source(SourceConfig(), str(source), config(stub.url))
        (corpus,) = (tmp_path / "home" / "artifacts" / "corpus").iterdir()
        (scores,) = {part.uri for part in read_index(fetch_part(decision) / "scores" / "00000")}
        assert fs.exists(f"{scores}/{run.CAPTIONS_TABLE}")
        shutil.copytree(corpus, tmp_path / "corpus")
        index = next((tmp_path / "home" / "artifacts" / "captions").glob(f"*/{INDEX}")).parent
        index = Path(shutil.copytree(index, tmp_path / "index"))
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "other"))
        real = type(fs).get_file

        def get_file(store, name: str, *more, **options) -> None:
            downloaded.append(name)
            real(store, name, *more, **options)

        monkeypatch.setattr(type(fs), "get_file", get_file)  # on the class: s3fs has an instance for each thread
        stricter = config(stub.url).model_copy(update={"captions": CaptionConfig(max_words=20)})
        other = flow.decide_corpus(tmp_path / "corpus", [index], stricter, 1)
        assert flow.select_group(other, stricter, 0, 1)[0].rows
    names = {Path(name).name for name in downloaded}
    assert SCORES_TABLE in names and run.CAPTIONS_TABLE not in names


@pytest.mark.slow
def test_an_endpoint_that_stays_away_ends_the_shard_and_keeps_its_answers(tmp_path, monkeypatch):
    source = folder(tmp_path / "source", 6)
    with stub_endpoint(share=0.0) as stub:
        real, count = stub.reply, 0

        def failing(body: bytes):
            nonlocal count
            count += 1
            return real(body) if count <= 4 else (503, {}, b"")

        stub.reply = failing
        with pytest.raises(ValueError, match=r"could not be described.*no answer in 2 attempts \(HTTP 503\)"):
            flow.curate_source(SourceConfig(), str(source), config(stub.url, max_retries=1, concurrency=2))
        stub.reply = real
        curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url, concurrency=2))
    assert max(stub.answered.values()) == 1 and open_curated(curated).num_records == 6


@pytest.mark.slow
def test_another_endpoint_or_more_requests_at_a_time_change_no_digest(tmp_path):
    source = folder(tmp_path / "source", 4)
    digests = set()
    for concurrency in (1, 8):
        with stub_endpoint(share=0.0) as stub:
            curated, _ = flow.curate_source(SourceConfig(), str(source), config(stub.url, concurrency=concurrency))
            digests.add(load_manifest(curated).digest)
    assert len(digests) == 1


@pytest.mark.slow
def test_a_new_prompt_of_one_class_asks_only_about_that_class(tmp_path):
    source = folder(tmp_path / "source", 4)
    with stub_endpoint(share=0.0) as stub:
        flow.curate_source(SourceConfig(), str(source), config(stub.url))
        before = sum(stub.answered.values())
        prompts = {tier: {"short": "Name the main thing in one phrase."} for tier in PER_TIER}
        flow.curate_source(SourceConfig(), str(source), config(stub.url, tier_prompts=prompts))
        assert sum(stub.answered.values()) - before == 4


@pytest.mark.slow
def test_rendered_scenes_are_described_by_rule(tmp_path):
    source = SourceConfig(scenes=24, digits=2, scene_size_px=64, shards=2, defect_fraction=0.0)
    lengths = {"short": {"prompt": "-", "min_words": 3, "max_words": 12, "max_tokens": 9}}
    rule = CaptionerConfig(
        name="scenes", lengths=lengths, per_tier=dict.fromkeys(PER_TIER, ("short",)), language=None, use_originals=False
    )
    curated, _ = flow.curate_source(source, "", CurationConfig(filters=FILTERS, captioner=rule))
    table = captions_of(curated).query("length == 'short'")
    described = table.query("status == 'ok'")
    assert len(described) >= 20 and set(table.query("status != 'ok'")["text"]) <= {"the image is not a rendered scene"}
    owners = captions_of(curated).query("length == 'original'").groupby("record_id")["text"].agg(set)
    shapes = ("circle", "square", "triangle", "cross")
    for row in described.itertuples():
        said = {shape for shape in shapes if shape in row.text}
        known = {shape for shape in shapes for text in owners[row.record_id] if shape in text}
        assert said == known, row.text
