"""The next process reads all rows that were added, wherever the journal is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from object_store import s3_bucket

from model import storage
from tasks.curation import journal
from tasks.curation.journal import JOURNAL, Journal


def test_rows_outlive_the_process_and_half_a_line_is_cut_off(tmp_path):
    with Journal(str(tmp_path / "a")) as book:
        assert book.rows == []
        book.add({"n": 1})
        with open(tmp_path / "a" / JOURNAL, "rb") as file:
            assert file.read() == b'{"n": 1}\n'  # before it is closed
    path = tmp_path / "a" / JOURNAL
    path.write_bytes(path.read_bytes() + b'\0\0\0\n{"n": 2}\n{"n": 3')
    with Journal(str(tmp_path / "a")) as book:
        assert book.rows == [{"n": 1}, {"n": 2}]
        book.add({"n": 4})
    with Journal(str(tmp_path / "a")) as book:
        assert book.rows == [{"n": 1}, {"n": 2}, {"n": 4}]


def test_a_second_writer_is_refused(tmp_path):
    with Journal(str(tmp_path)), pytest.raises(ValueError, match="being written by another run"):
        Journal(str(tmp_path))
    Journal(str(tmp_path)).close()


def test_threads_add_whole_rows(tmp_path):
    with Journal(str(tmp_path)) as book, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: book.add({"n": n, "text": "x" * 200}), range(200)))
    assert sorted(row["n"] for row in Journal(str(tmp_path)).rows) == list(range(200))


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_in_an_object_store_each_row_is_written_at_once_and_objects_are_few(monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_ROWS", 4)
    with s3_bucket("journals") as fs:
        place = "s3://journals/captions/0"
        book = Journal(place)
        for n in range(10):
            book.add({"n": n})
            wait_for(lambda: [row["n"] for row in stored(place)] == list(range(n + 1)))  # before it is closed
        book.close()
        with Journal(place) as again:
            assert [row["n"] for row in again.rows] == list(range(10))
            again.add({"n": 10})
        assert sorted(row["n"] for row in stored(place)) == list(range(11))
        assert len(fs.ls("journals/captions/0")) == 4


def stored(place: str) -> list[dict]:
    with Journal(place) as book:
        return book.rows


def test_rows_that_come_during_a_request_share_the_next(monkeypatch):
    begun, may_end, written = threading.Event(), threading.Event(), []

    def write(path, content):
        begun.set()
        assert may_end.wait(30)
        written.append((path, content.count(b"\n")))

    monkeypatch.setattr(storage, "children", lambda place: [])
    monkeypatch.setattr(storage, "write_bytes", write)
    with Journal("s3://journals/captions/0") as book:
        book.add({"n": 0})
        assert begun.wait(30)
        for n in range(1, 100):
            book.add({"n": n})  # does not wait
        may_end.set()
    (first, second, third), counts = zip(*written)
    assert counts == (1, journal.SEGMENT_ROWS, 100 - journal.SEGMENT_ROWS) and first == second != third


def test_a_store_that_refuses_a_row_ends_the_run(monkeypatch):
    def write(path, content):
        raise PermissionError("no access to journals")

    monkeypatch.setattr(storage, "children", lambda place: [])
    monkeypatch.setattr(storage, "write_bytes", write)
    with pytest.raises(PermissionError, match="no access"), Journal("s3://journals/captions/0") as book:
        book.add({"n": 0})
    with pytest.raises(PermissionError, match="no access"):
        book.add({"n": 1})


@pytest.mark.parametrize(("failures", "stored"), [(2, True), (5, False)])
def test_a_store_that_fails_for_a_while_loses_no_row_and_one_that_stays_away_ends_the_run(
    monkeypatch, failures, stored
):
    written = []

    def write(path, content):
        written.append(content)
        if len(written) <= failures:
            raise OSError("the connection was reset")

    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(storage, "children", lambda place: [])
    monkeypatch.setattr(storage, "filesystem", lambda path: (SimpleNamespace(pipe_file=write), path))
    book = Journal("s3://journals/captions/0")
    book.add({"n": 0})
    if stored:
        wait_for(lambda: len(written) == failures + 1)
        book.add({"n": 1})
        book.close()
        assert written[-1].splitlines() == [b'{"n": 0}', b'{"n": 1}']
    else:
        with pytest.raises(OSError, match="connection was reset"):
            book.close()
        assert len(written) == failures
