"""A database for one pass over a source, so that memory does not bound how much is compared."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from pathlib import Path
from typing import Self

from tasks.curation.sources.base import to_bytes


class Scratch:
    """A context manager. A subclass has `TABLES` and uses `_db`.

    The database is in a temporary folder, in one open transaction without a journal: nothing survives a crash.
    """

    TABLES: tuple[str, ...]  # SQL that creates tables and indices

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._db = sqlite3.connect(Path(self._folder.name) / "scratch", isolation_level=None)
        for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "BEGIN", *self.TABLES):
            self._db.execute(statement)
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()


def digest(name: str) -> bytes:
    """16 bytes for an index: names of archives have up to 4 KiB, and their composed forms three times as many."""
    return hashlib.blake2b(to_bytes(name), digest_size=16).digest()
