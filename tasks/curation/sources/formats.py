"""Container formats in which each file is a shard, by extension.

A format is a class of archives.Archive, or a module (arrow.py is one), with two functions:

    scan(shown, file, caption_columns) -> (number of records, names of columns that are not read, why no record has a
                                           caption or ""), None without images
    read(tree, path, options, account) -> the records in order

Tars and Parquet are not among them: captions next to a tar may name its members, and a Parquet file may be several
shards.
"""

from __future__ import annotations

import pkgutil
from typing import Any

FORMATS = {"arrow": "tasks.curation.sources.arrow"}


def format_of(name: str) -> str | None:
    """The format of a file by its name; None if it has none of `FORMATS`."""
    kind = name.rpartition(".")[2].lower()
    return kind if "." in name and kind in FORMATS else None


def load(kind: str) -> Any:
    """The module of a format, or an object of its class."""
    loaded = pkgutil.resolve_name(FORMATS[kind])
    return loaded() if isinstance(loaded, type) else loaded
