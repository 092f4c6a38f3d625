"""Reads JSON Lines, opens files in shared folders, and writes files atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def read_json_lines(path: str | Path) -> Iterable[tuple[int, Any]]:
    """Yields (line number, value) for each line of a JSON Lines file that is not blank.

    Lines end at "\\n" only: a JSON string may contain U+2028 and similar characters.

    Raises:
        ValueError: the file is absent, not UTF-8, or a line is not JSON; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file (expected one JSON object per line)")
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a plain file, opened with `flags` of os.open.

    In a folder where others may write, a link could lead to any file of the user, and opening a pipe would wait for ever.

    Raises:
        ValueError: the path is a link, a pipe, a socket, a device or a folder.
        OSError: as os.open.
    """
    refused = ValueError(f"{path} is not a plain file (a link, pipe, socket, device or folder): remove it")
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise refused from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refused
    return descriptor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends, so that existing files are complete. Removed on an
    error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file atomically, unless it has these bytes already. Makes its folder."""
    path = Path(path)
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_text(path: str | Path) -> Iterator[TextIO]:
    """A new UTF-8 text file in place of `path`, as `replacing`. Makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        yield file
