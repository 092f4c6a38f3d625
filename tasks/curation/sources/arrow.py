"""Arrow files, as Hugging Face `datasets` saves them to disk (save_to_disk): streams or files of record batches.

They are read through a memory map. Compressed batches are refused: Arrow allocates what their header claims.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from tasks.curation.sources import tables
from tasks.curation.sources.base import Account, Options, Record, check_size, visible
from tasks.curation.sources.file_trees import FileTree, Folder

STATE = "state.json"  # lists the files of a saved data set
MAX_STATE_BYTES = 2**20
MAGIC, END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
SLICE_ROWS, SLICE_BYTES = 64, 32 * 2**20


def data_files(place: FileTree, folder: Folder) -> set[str] | None:
    """The Arrow files of a saved data set; other Arrow files in its folder are caches. None if the folder is not a
    saved data set."""
    if STATE not in folder.files or folder.files[STATE] > MAX_STATE_BYTES:
        return None
    (content,) = place.read_batch([(folder.at(STATE), folder.files[STATE])])
    try:
        listed = json.loads(content)["_data_files"]
        return {str(file["filename"]) for file in listed}
    except (TypeError, KeyError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def opened(shown: str, file: BinaryIO) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the checked batches.

    Raises:
        ValueError: the file is not an Arrow file, is compressed, or is damaged.
    """
    size = file.seek(0, 2)
    check_size(shown, size)
    file.seek(0)
    try:
        if not size:
            raise OSError("it is empty")
        # Unmapped with the last array that points into it; closing it earlier is an error.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = pa.py_buffer(mapped)
        source = pa.BufferReader(content)
        if content[: len(MAGIC)].to_pybytes() == MAGIC:  # an Arrow file is a stream between two marks
            source.seek(8)
        schema = pa.ipc.read_schema(source)
        yield schema, _batches(mapped, source, schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(
            f"{shown} is not a readable Arrow file: {visible(' '.join(str(error).split())[:300])}"
        ) from error


def _batches(mapped: mmap.mmap, source: pa.BufferReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Slices of the batches. The memory of a slice is released before the next."""
    while True:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            source.seek(max(0, source.tell() - len(END)))
            if source.read(len(END)) != END:
                raise OSError("it is cut off: its end mark is missing") from None
            return
        if message.type != "record batch":
            raise OSError(f"it has a message of the kind {message.type!r}; only plain record batches are read")
        if _is_compressed(message.metadata.to_pybytes()):
            raise OSError("its batches are compressed; save it again without compression")
        batch = _checked(pa.ipc.read_record_batch(message, schema))
        rows = max(1, min(SLICE_ROWS, int(SLICE_BYTES * len(batch) / max(1, batch.nbytes))))
        for first in range(0, len(batch), rows):
            yield batch.slice(first, rows)
            mapped.madvise(mmap.MADV_DONTNEED)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # offsets of a damaged file may point anywhere
    return batch


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message's RecordBatch (Message.fbs: field 2 of Message) has BodyCompression (its field 3)."""
    message = struct.unpack_from("<i", metadata, 0)[0]
    batch = _field(metadata, message, 2)
    if batch is None:
        return False
    batch += struct.unpack_from("<i", metadata, batch)[0]
    return _field(metadata, batch, 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """The offset of a field of a flatbuffer table."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def scan(shown: str, file: BinaryIO, wanted: tuple[str, ...]) -> tuple[int, list[str], str] | None:
    """See formats.py: the records are rows.

    Raises:
        ValueError: a column twice, no row with image bytes, or not a readable file.
    """
    with opened(shown, file) as (schema, batches):
        columns = tables.columns_of(schema, wanted)
        if columns is None:
            return None
        tables.check_columns(shown, schema)
        rows = with_bytes = 0
        for batch in batches:
            rows += len(batch)
            with_bytes += len(batch) - tables.count_without_bytes(batch.column(columns.image))
    if rows and not with_bytes:
        raise ValueError(f"{shown}: none of its rows has image bytes; they name files ({columns.image}.path)")
    return rows, tables.further_images(schema), columns.no_captions


def read(place: FileTree, name: str, options: Options, account: Account) -> Iterator[Record]:
    """The records of an Arrow file.

    Raises:
        ValueError: see `opened`.
    """
    shown = place.shown(name)
    check_size(shown, place.size(name))
    with place.local_copy(name) as file, opened(shown, file) as (schema, batches):
        columns = tables.columns_of(schema, options.caption_columns)
        if columns is None:
            raise ValueError(f"{shown} has no column of image bytes")
        tables.check_columns(shown, schema)
        row = 0
        for batch in batches:
            yield from tables.records(batch, columns, row, name, place.locator(name), options.encoding, account)
            row += len(batch)
