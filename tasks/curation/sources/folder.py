"""Shards of loose image files: lists of names that do not change when other files are added or removed.

A list ends after a name whose hash marks an end, about every `source.images_per_shard` names: a new file changes only
the list that contains it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.sources.base import (
    CHANGED,
    MAX_IMAGE_BYTES,
    UNREADABLE_FILE,
    Account,
    Options,
    Record,
    digest_of,
    extension,
    from_bytes,
    record_key,
    to_bytes,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    CaptionError,
    add_texts,
)
from tasks.curation.sources.file_trees import FileTree, RemoteFileTree

_TEXT = pa.struct([("name", pa.binary()), ("size_bytes", pa.int64()), ("digest", pa.string())])
FILES = pa.schema(
    [
        ("name", pa.binary()),  # path from the root; bytes, since names need not be UTF-8
        ("size_bytes", pa.int64()),
        ("digest", pa.string()),
        ("sidecars", pa.list_(_TEXT)),
        ("captions", pa.list_(pa.string())),  # from metadata files
        ("problem", pa.string()),
        ("detail", pa.string()),
    ]
)


class File(NamedTuple):
    """A row of FILES. For a shard of kind "tar": the data of one member in tables next to the tar."""

    name: str
    size_bytes: int = 0
    digest: str = ""
    sidecars: tuple[tuple[str, int, str], ...] = ()
    captions: tuple[str, ...] = ()
    problem: str = ""
    detail: str = ""

    def row(self) -> dict[str, Any]:
        texts = [{"name": to_bytes(name), "size_bytes": size, "digest": digest} for name, size, digest in self.sidecars]
        return {**self._asdict(), "name": to_bytes(self.name), "sidecars": texts, "captions": list(self.captions)}

    @classmethod
    def of(cls, row: dict[str, Any]) -> File:
        texts = tuple((from_bytes(text["name"]), text["size_bytes"], text["digest"]) for text in row["sidecars"])
        fields = {**row, "name": from_bytes(row["name"]), "sidecars": texts, "captions": tuple(row["captions"])}
        return cls(**fields)


def digest(files: list[File]) -> str:
    return digest_of([list(file) for file in files])


def write(files: list[File], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([file.row() for file in files], FILES), path, compression="zstd")


def load(path: Path) -> Iterator[File]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(256, use_threads=False):
            for row in batch.to_pylist():
                yield File.of(row)


def cut(files: Iterator[File], length: int, salt: str = "") -> Iterator[list[File]]:
    """Splits files into lists of about `length`, in order; each depends only on its own names and on those around its
    ends."""
    run: list[File] = []
    for file in files:
        run.append(file)
        if _hash(salt, file.name) % length == 0:
            yield from _divided(run, length, salt)
            run = []
    if run:
        yield from _divided(run, length, salt)


def _divided(run: list[File], length: int, salt: str) -> Iterator[list[File]]:
    """Splits a run that is long by chance, at ends marked by other hashes."""
    if len(run) <= 4 * length:
        yield run
    else:
        yield from cut(iter(run), length, f"{salt}+")


def _hash(salt: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(to_bytes(f"{salt}{name}")).digest()[:8], "big")


# ---------------------------------------------------------------- reading


def too_large(name: str, size: int) -> str:
    """Why a text file is not read, or ""."""
    limit = MAX_JSON_BYTES if extension(name) == "json" else MAX_TEXT_BYTES
    return f"is larger than {limit // 2**20} MiB" if size > limit else ""


def read(place: FileTree, path: Path, options: Options, account: Account) -> Iterator[Record]:
    """The records of a list of files.

    Raises:
        ValueError: a file has changed since the source was scanned.
    """
    files = list(load(path))
    sizes = [_bytes_to_read(file) for file in files]
    for first, stop in place.batches(sizes):
        wanted = []
        for file in files[first:stop]:
            if file.size_bytes <= MAX_IMAGE_BYTES:
                wanted.append((file.name, file.size_bytes))
            wanted += [(name, size) for name, size, _ in file.sidecars if not too_large(name, size)]
        contents = dict(zip([name for name, _ in wanted], place.read_batch(wanted), strict=True))
        for file in files[first:stop]:
            account.records += 1
            yield _record(place, file, contents, options)


def _bytes_to_read(file: File) -> int:
    own = file.size_bytes if file.size_bytes <= MAX_IMAGE_BYTES else 0
    return own + sum(size for name, size, _ in file.sidecars if not too_large(name, size))


def _record(place: FileTree, file: File, contents: dict[str, bytes | OSError], options: Options) -> Record:
    def read_text(name: str, size: int, digest: str) -> bytes:
        if why := too_large(name, size):
            raise CaptionError(why)
        try:
            return _checked(place, name, contents[name], size, digest)
        except OSError as error:
            raise CaptionError(_why(error)) from error

    texts = [(one[0], place.locator(one[0]), functools.partial(read_text, *one)) for one in file.sidecars]
    captions, problem, detail = add_texts(texts, file.captions, file.problem, file.detail, options)
    data = b""
    try:
        if file.size_bytes > MAX_IMAGE_BYTES:
            raise OSError(f"it is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
        data = _checked(place, file.name, contents[file.name], file.size_bytes, file.digest)
    except OSError as error:
        problem, detail = UNREADABLE_FILE, f"{place.locator(file.name)} {_why(error)}"
    captions = [] if problem else list(dict.fromkeys(captions))
    ext = extension(file.name)
    return Record(record_key(file.name), data, ext, captions, "user", place.locator(file.name), 0, problem, detail)


def _why(error: OSError) -> str:
    return f"cannot be read: {visible(error.strerror or str(error))}"


def _checked(place: FileTree, name: str, content: bytes | OSError, size: int, digest: str) -> bytes:
    if isinstance(content, OSError):
        raise content
    is_same = len(content) == size and (
        isinstance(place, RemoteFileTree) or hashlib.sha256(content).hexdigest() == digest
    )
    if not is_same:
        raise ValueError(f"{place.shown(name)} {CHANGED}")
    return content
