"""An append-only journal of JSON rows: after a kill, work that has a row is not repeated.

PLACE/journal.jsonl             a local folder: one row a line
PLACE/WRITER-000000.jsonl ...   an object store, which cannot append: an object for every few rows
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from model import storage

JOURNAL = "journal.jsonl"
SEGMENT_ROWS, SEGMENT_S = 64, 20.0  # rows of an object; a kill loses at most so many


class Journal:
    """Rows of earlier processes in `rows`, in the order in which they were written. Threads may add rows.

    Args:
        place: a local folder or a URI.
        sync: flush each row to disk before `add` returns. A killed process loses no row either way; a power failure
            may.

    Raises:
        ValueError: another process writes the journal of a local folder.
    """

    def __init__(self, place: str, sync: bool = True) -> None:
        self._place, self._sync = place, sync
        self._lock = threading.Lock()
        self._file: int | None = None
        if storage.is_remote(place):
            names = [name for name in storage.children(place) if name.endswith(".jsonl")]
            # By time within a writer; rows of different writers answer the same questions.
            self.rows = [row for name in names for row in _rows(storage.read_bytes(name) or b"")]
            self._writer, self._segments = uuid.uuid4().hex, 0
            self._waiting: list[bytes] = []
            self._written_at = time.monotonic()
        else:
            self.rows = self._open_local(Path(place))

    def _open_local(self, folder: Path) -> list[dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"{folder / JOURNAL} is being written by another run: wait for it, or stop it") from error
        except OSError:  # a file system without locks
            pass
        data = (folder / JOURNAL).read_bytes()
        whole = data.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)  # a partial line, which would also damage the next one
        return _rows(data[:whole])

    def add(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            if self._file is not None:
                os.write(self._file, line)
                if self._sync:
                    os.fdatasync(self._file)
                return
            self._waiting.append(line)
            if len(self._waiting) >= SEGMENT_ROWS or time.monotonic() - self._written_at > SEGMENT_S:
                self._write_segment()

    def _write_segment(self) -> None:
        if self._waiting:
            name = f"{self._writer}-{self._segments:06d}.jsonl"
            storage.write_bytes(storage.join(self._place, name), b"".join(self._waiting))
            self._segments, self._waiting = self._segments + 1, []
        self._written_at = time.monotonic()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            elif storage.is_remote(self._place):
                self._write_segment()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of complete lines; damaged lines, such as an unwritten page, are skipped."""
    rows = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
