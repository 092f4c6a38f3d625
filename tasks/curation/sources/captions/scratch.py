"""A database for one pass over a source, so that memory does not bound how much is compared."""

from __future__ import annotations

import sqlite3
from pathlib import Path


def open_scratch(path: str | Path, *tables: str) -> sqlite3.Connection:
    """A new database in one open transaction, without a journal: nothing survives a crash.

    Args:
        path: of the file, or ":memory:".
        tables: SQL that creates tables and indices.
    """
    database = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "BEGIN", *tables):
        database.execute(statement)
    return database
