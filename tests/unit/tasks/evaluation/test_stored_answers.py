"""Answers that runs share: bounded, safe for several writers and kills, and never a reason for a judge to stop."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import threading

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
    assert max(path.stat().st_size for path in folder.glob("*.txt")) <= 4000
    kept = [len(known(rows(start, start + 2000))) for start in range(0, 8000, 2000)]
    assert kept[0] < kept[3] and kept[3] > 1000, kept
    share({("0" * 64, "a", "j"): rng.randbytes(10_000).hex()})  # larger than a bucket
    assert max(path.stat().st_size for path in folder.glob("*.txt")) <= 4000


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


def logged(answers):
    """(the answers that are known, lines of the log)"""
    lines = []
    return StoredAnswers(log=lines.append).find(answers), lines


def test_a_damaged_bucket_costs_only_its_damaged_answers_and_is_repaired_by_the_next_ones(folder):
    share(rows(0, 100))
    buckets = list(folder.glob("*.txt"))
    for path in buckets:
        path.write_bytes(path.read_bytes()[:-10])
    found, lines = logged(rows(0, 100))
    assert found.items() <= rows(0, 100).items() and len(found) == 100 - len(buckets)
    assert lines == [f"{len(buckets)} answers in {folder} are damaged, and their questions are asked again"]
    share(rows(0, 100))
    assert known(rows(0, 100)) == rows(0, 100)


def test_an_answer_that_cannot_be_parsed_or_written_again_is_asked_again_and_replaced(folder):
    for planted in (b"[" * 200_000, b"[" * 300 + b"]" * 300, b"\xff\xfe", b"9" * 5000, b""):
        share(rows(0, 1))
        (bucket,) = folder.glob("*.txt")
        key, _, _ = bucket.read_bytes().partition(b" ")
        bucket.write_bytes(key + b" " + planted + b"\n")
        lines = []
        with StoredAnswers(log=lines.append) as shared:
            assert not shared.find(rows(0, 1)) and "1 answers" in lines[0], planted[:10]
            shared.add(rows(0, 1).items())
        assert known(rows(0, 1)) == rows(0, 1)
        bucket.unlink()


def test_a_rejected_answer_is_replaced_by_the_next_and_others_are_not():
    share(rows(0, 2, answer="wrong"))
    with StoredAnswers() as shared:
        shared.reject(shared.find(rows(0, 1)))
        shared.add(rows(0, 2).items())
        shared.write()
        shared.add(rows(0, 1, answer="later").items())
    assert known(rows(0, 2)) == rows(0, 1) | rows(1, 2, answer="wrong")


def test_a_write_reads_a_bucket_once(folder, monkeypatch):
    share(rows(0, 1))
    read, beginning = [], stored_answers._beginning
    monkeypatch.setattr(stored_answers, "_beginning", lambda *args: read.append(args) or beginning(*args))
    share(rows(0, 1, judge="another"))
    assert len(read) == len(list(folder.glob("*.txt"))) == 1


def test_a_bucket_that_cannot_be_read_costs_only_its_answers(folder, monkeypatch):
    share(rows(0, 1))
    (bucket,) = folder.glob("*.txt")
    share(rows(1, 100))
    beginning = stored_answers._beginning

    def refused(path, size):
        if path == str(bucket):
            raise PermissionError(f"no access to {path}")
        return beginning(path, size)

    lost = bucket.read_bytes().count(b"\n")
    monkeypatch.setattr(stored_answers, "_beginning", refused)
    found, lines = logged(rows(0, 100))
    assert found.items() <= rows(1, 100).items() and len(found) == 100 - lost
    assert lines == [
        f"answers of other runs cannot be read: PermissionError: no access to {bucket} (the first of 1 errors)"
    ]


def test_a_store_that_fails_is_reported_and_stops_nothing(monkeypatch):
    asked = []

    def fails(path, _):
        asked.append(path)
        raise ConnectionError("no route\x1b[2J")

    monkeypatch.setattr(stored_answers, "_beginning", fails)
    lines = []
    shared = StoredAnswers(log=lines.append)
    assert not shared.find(rows(0, 600))
    assert len(lines) == 1 and len(asked) < stored_answers.MAX_ERRORS + stored_answers.THREADS, "not all 256 buckets"
    shared.add(rows(0, 1).items())
    shared.write()
    assert ["cannot be read: ConnectionError: no route" in lines[0], "cannot be shared" in lines[1]] == [True, True]
    assert all(line.isprintable() for line in lines)  # a terminal obeys what is not


def test_what_others_put_in_place_of_a_bucket_is_neither_followed_nor_waited_for_nor_read_whole(folder, tmp_path):
    share(rows(0, 1))
    (bucket,) = folder.glob("*.txt")
    kept, victim = bucket.read_bytes(), tmp_path / "victim"

    def pipe():
        os.mkfifo(bucket)

    def link():
        victim.write_bytes(kept)
        bucket.symlink_to(victim)

    def sparse():
        with open(bucket, "wb") as file:
            file.truncate(2**40)

    for plant, reason in (
        (pipe, "is not a plain file"),
        (link, "is not a plain file"),
        (sparse, "has over 1048576 bytes"),
    ):
        bucket.unlink()
        plant()
        found, lines = in_time(lambda: logged(rows(0, 1)))
        assert not found and reason in lines[0]
        in_time(lambda: share(rows(0, 1)))
        assert known(rows(0, 1)) == rows(0, 1) and bucket.is_file() and not bucket.is_symlink()
    assert victim.read_bytes() == kept


def test_no_file_of_the_folder_is_opened_for_its_lock(folder, monkeypatch):
    opened, locked, os_open, flock = {}, [], os.open, fcntl.flock

    def opens(path, *args):
        descriptor = os_open(path, *args)
        opened[descriptor] = str(path)
        return descriptor

    def locks(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            locked.append(opened[descriptor])
        flock(descriptor, operation)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(fcntl, "flock", locks)
    share(rows(0, 1))
    assert locked == [str(folder)], "a file there may be a link or a pipe of others"


def test_a_lock_that_another_process_keeps_delays_answers_and_does_not_stop_them(folder, monkeypatch):
    monkeypatch.setattr(stored_answers, "LOCK_WAIT_S", 0.2)
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    lines = []
    shared = StoredAnswers(log=lines.append)
    shared.add(rows(0, 1).items())
    in_time(shared.write)
    os.close(lock)
    assert known(rows(0, 1)) == rows(0, 1) and "another process has the lock" in lines[0]


def test_what_is_found_is_bounded(folder, monkeypatch):
    share(rows(0, 100))
    monkeypatch.setattr(
        stored_answers, "MAX_FOUND_BYTES", sum(path.stat().st_size for path in folder.glob("*.txt")) // 4
    )
    found, lines = logged(rows(0, 100))
    assert 0 < len(found) < 60 and "the others are asked again" in lines[0]


def in_time(work):
    """The result of `work` in a thread: opening a pipe without a writer never returns."""
    with_result = []
    thread = threading.Thread(target=lambda: with_result.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    return with_result[0]


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
        (name, *others) = storage.children("s3://bucket/store/answers")
        storage.write_bytes(name, b"")
        found, lines = logged(rows(0, 60))
        assert 0 < len(found) < 60 and "it is empty" in lines[0]
        storage.write_bytes(others[0], b"x" * (stored_answers.MAX_BYTES + 1))
        assert any("has over" in line for line in logged(rows(0, 60))[1])
        share(rows(0, 60))
        assert known(rows(0, 60)) == rows(0, 60)
    assert not folder.exists()
