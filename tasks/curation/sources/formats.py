"""Container formats in which each file is a shard, by extension.

The module of a format has two functions (arrow.py is one):

    scan(shown, file, caption_columns) -> (number of records, names of columns that are not read), None without images
    read(place, path, options, account) -> the records in order

Tars and Parquet are not among them: captions next to a tar may name its members, and a Parquet file may be several
shards.
"""

from __future__ import annotations

import importlib
from typing import Any

FORMATS = {"arrow": "tasks.curation.sources.arrow"}


def format_of(name: str) -> str | None:
    """The format of a file by its name; None if it has none of `FORMATS`."""
    kind = name.rpartition(".")[2].lower()
    return kind if "." in name and kind in FORMATS else None


def load(kind: str) -> Any:
    """The module of a format."""
    return importlib.import_module(FORMATS[kind])
