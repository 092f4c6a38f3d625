"""The next process reads all rows that were added, wherever the journal is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from object_store import s3_bucket

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


def test_in_an_object_store_rows_are_written_some_at_a_time(monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_ROWS", 4)
    with s3_bucket("journals") as fs:
        place = "s3://journals/captions/0"
        book = Journal(place)
        for n in range(10):
            book.add({"n": n})
        assert [row["n"] for row in Journal(place).rows] == list(range(8))  # as after a kill
        book.close()
        with Journal(place) as again:
            assert [row["n"] for row in again.rows] == list(range(10))
            again.add({"n": 10})
        assert sorted(row["n"] for row in Journal(place).rows) == list(range(11))
        assert len(fs.ls("journals/captions/0")) == 4
