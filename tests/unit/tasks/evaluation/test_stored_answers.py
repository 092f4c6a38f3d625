"""Answers that runs share: bounded, safe for several writers and kills, and never a reason for a judge to stop."""

from __future__ import annotations

import multiprocessing
import random

import pytest
from killed import kill_at_random
from object_store import OWN, s3_server

from model import storage
from tasks import envs
from tasks.evaluation import stored_answers
from tasks.evaluation.stored_answers import StoredAnswers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of answers."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "answers"


def rows(start, stop, judge="j", answer="yes"):
    return {
        (f"{image:064x}", "detector: a red circle?", judge): {"is": answer, "of": image} for image in range(start, stop)
    }


def share(answers, conditions=""):
    with StoredAnswers(conditions) as shared:
        shared.add(answers.items())


def known(answers, conditions=""):
    return StoredAnswers(conditions).find(answers)


def test_only_answers_to_the_same_question_about_the_same_image_by_the_same_judge_are_known(monkeypatch):
    share(rows(0, 600))
    assert known(rows(300, 900)) == rows(300, 600)
    assert not known(rows(0, 600, judge="another")) and not known({("0" * 64, "detector: blue?", "j"): None})
    assert not known(rows(0, 600), "judged through JPEG")
    share(rows(0, 600, answer="no"))
    assert known(rows(0, 600)) == rows(0, 600)  # the first answer is kept
    monkeypatch.setitem(envs.CACHE_VERSIONS, "evaluation", "the next")
    assert not known(rows(0, 600))


@pytest.mark.slow
def test_the_oldest_answers_are_dropped_over_the_bound(folder, monkeypatch):
    monkeypatch.setattr(stored_answers, "MAX_BYTES", 4000)
    rng = random.Random(0)
    for start in range(0, 8000, 2000):
        share({key: rng.randbytes(60).hex() for key in rows(start, start + 2000)})
    assert max(path.stat().st_size for path in folder.glob("*.parquet")) <= 4000
    kept = [len(known(rows(start, start + 2000))) for start in range(0, 8000, 2000)]
    assert kept[0] < kept[3] and kept[3] > 1000, kept
    share({("0" * 64, "a", "j"): rng.randbytes(10_000).hex()})  # larger than a bucket
    assert max(path.stat().st_size for path in folder.glob("*.parquet")) <= 4000


@pytest.mark.slow
def test_writers_at_once_lose_nothing():
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=lambda w=w: [share(rows(1000 * w + i, 1000 * w + i + 10)) for i in range(0, 100, 10)])
        for w in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    for w in range(4):
        assert len(known(rows(1000 * w, 1000 * w + 100))) == 100


@pytest.mark.slow
def test_a_killed_writer_leaves_every_bucket_readable(folder):
    rng, damaged = random.Random(0), []

    def work(gate):
        for start in range(0, 2000, 100):
            gate.pass_through()
            share(rows(start, start + 100))

    number = 0
    for _ in range(10):
        kill_at_random(work, rng, batches=6)
        found = StoredAnswers(log=damaged.append).find(rows(0, 2000))
        assert found.items() <= rows(0, 2000).items() and len(found) >= number
        number = len(found)
    share(rows(0, 2000))
    assert known(rows(0, 2000)) == rows(0, 2000) and not damaged


def test_answers_are_written_while_judging_goes_on(monkeypatch):
    monkeypatch.setattr(stored_answers, "WRITE_EVERY_S", 0)
    StoredAnswers().add(rows(0, 10).items())  # never closed, as after a kill
    assert known(rows(0, 10)) == rows(0, 10)


def test_damaged_buckets_and_a_store_that_fails_are_reported_and_stop_nothing(folder, monkeypatch):
    share(rows(0, 100))
    for path in folder.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-20])
    lines = []
    shared = StoredAnswers(log=lines.append)
    assert not shared.find(rows(0, 100)) and "is damaged, and its questions are asked again" in lines[0]
    share(rows(0, 100))
    assert known(rows(0, 100)) == rows(0, 100)

    def fails(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(storage, "read_bytes", fails)
    lines.clear()
    assert not shared.find(rows(0, 1))
    shared.add(rows(0, 1).items())
    shared.write()
    assert ["cannot be read: ConnectionError: no route" in lines[0], "cannot be shared" in lines[1]] == [True, True]


@pytest.mark.slow
def test_answers_are_shared_over_an_object_store(folder, monkeypatch):
    import boto3

    with s3_server() as endpoint:
        for name, value in (OWN | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        monkeypatch.setenv("NUCLEUS_STORE", "s3://bucket/store")
        share(rows(0, 40))
        share(rows(20, 60))
        assert known(rows(0, 80)) == rows(0, 60)
    assert not folder.exists()
