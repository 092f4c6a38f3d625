"""An append-only journal of JSON rows: after a kill, work that has a row is not repeated.

PLACE/journal.jsonl             a local folder: one row a line
PLACE/WRITER-000000.jsonl ...   an object store, which cannot append: an object for every SEGMENT_ROWS rows

The last object of a store is written again with each row that is added, until it is full. Rows that come while a write is in
progress go into the next one: at most one request a row, few objects, and a kill loses what came during one request.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

from eval.files import open_plain
from model import storage

JOURNAL = "journal.jsonl"
SEGMENT_ROWS = 64  # rows of an object


class Journal:
    """Rows of earlier processes in `rows`, in the order in which they were written. Threads may add rows.

    Args:
        place: a local folder or a URI.
        sync: flush each row to disk before `add` returns. A killed process loses no row either way; a power failure
            may. In an object store `add` returns before the row is written.

    Raises:
        ValueError: another process writes the journal of a local folder, or the journal is a link or a pipe.
    """

    def __init__(self, place: str, sync: bool = True) -> None:
        self._place, self._sync = place, sync
        self._lock = threading.Lock()
        self._file: int | None = None
        self._segments: _Segments | None = None
        if storage.is_remote(place):
            names = [name for name in storage.children(place) if name.endswith(".jsonl")]
            # By time within a writer; rows of different writers answer the same questions.
            self.rows = [row for name in names for row in _rows(storage.read_bytes(name) or b"")]
            self._segments = _Segments(place)
        else:
            self.rows = self._open_local(Path(place))

    def _open_local(self, folder: Path) -> list[dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open_plain(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"{folder / JOURNAL} is being written by another run: wait for it, or stop it") from error
        except OSError:  # a file system without locks
            pass
        with open(self._file, "rb", closefd=False) as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)  # a partial line, which would also damage the next one
        return _rows(data[:whole])

    def add(self, row: dict[str, Any]) -> None:
        """
        Raises:
            Exception: of the object store, which could not write this row or an earlier one.
        """
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        if self._segments is not None:
            self._segments.add(line)
            return
        with self._lock:
            assert self._file is not None, "the journal is closed"
            os.write(self._file, line)
            if self._sync:
                os.fdatasync(self._file)

    def close(self) -> None:
        if self._segments is not None:
            self._segments.close()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Segments:
    """Writes rows to the objects of one writer, in a thread, so that a slow store delays no answer."""

    def __init__(self, place: str) -> None:
        self._prefix = storage.join(place, uuid.uuid4().hex)
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def add(self, line: bytes) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting.append(line)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        number, segment = 0, []
        try:
            while lines := self._next():
                while lines:
                    room = SEGMENT_ROWS - len(segment)
                    segment, lines = segment + lines[:room], lines[room:]
                    storage.write_bytes(f"{self._prefix}-{number:06d}.jsonl", b"".join(segment))
                    if len(segment) == SEGMENT_ROWS:
                        number, segment = number + 1, []
        except Exception as error:  # each of fsspec's back ends raises its own types
            with self._changed:
                self._error = error

    def _next(self) -> list[bytes]:
        """The rows that wait, at least one; none once the journal is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            lines, self._waiting = self._waiting, []
            return lines


def _rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of complete lines; damaged lines, such as an unwritten page, are skipped."""
    rows = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
