"""Offsets of a Parquet file's column chunks and sizes of their pages, from footer and page headers (Thrift's compact
protocol).

Arrow allocates the size in a page's header before it decompresses anything, and the sums in the footer may be false.
The footer is read here too, since Arrow's objects of a row group or column abort the process if its statistics are
broken; Arrow's reader raises an error. The format: parquet.thrift (FileMetaData, PageHeader) of apache/parquet-format,
and the compact protocol of Apache Thrift.
"""

from __future__ import annotations

import functools
from typing import Any, BinaryIO, NamedTuple

MAX_HEADER_BYTES = 2**20
_FIRST_READ = 2**13
_DICTIONARY, _DELTA_BYTE_ARRAY = 2, 7
_DATA_PAGE, _DATA_PAGE_V2 = (5, 2), (8, 4)  # fields of PageHeader, and of the encoding inside them
_VARINTS = (4, 5, 6)  # i16, i32, i64
_I64, _BYTES = 6, 8
# Field -> its type: a number, the fields of a struct, or a list of one of these.
_STATISTICS = {3: _I64}
_META = {3: [_BYTES], 5: _I64, 6: _I64, 7: _I64, 9: _I64, 11: _I64, 12: _STATISTICS}
_ROW_GROUP = {1: [{3: _META}], 3: _I64}
_FILE = {4: [_ROW_GROUP]}
MAX_DEPTH = 16


class PageError(ValueError):
    """A broken footer or page header; the message does not name the file."""


class Pages(NamedTuple):
    """largest: bytes of the largest page, decompressed. repeated: of the largest page whose values may be repeated (a
    dictionary, or values with shared prefixes); 0 if there is none."""

    largest: int
    repeated: int


class Chunk(NamedTuple):
    """A column chunk. path: its column, with dots. begin, end: byte range in the file. nulls: -1 if not counted."""

    path: str
    num_values: int
    uncompressed_bytes: int
    begin: int
    end: int
    nulls: int


class RowGroup(NamedTuple):
    num_rows: int
    chunks: list[Chunk]


@functools.lru_cache(maxsize=1)  # the shards of a file are read one after another; 60,000 chunks take 3 s
def row_groups(footer: bytes) -> list[RowGroup]:
    """The row groups in a footer.

    Raises:
        PageError: it is broken.
    """
    try:
        groups = _Struct(footer).fields(_FILE, 0)[4]
        return [RowGroup(group[3], [_chunk(chunk[3]) for chunk in group[1]]) for group in groups]
    except (LookupError, UnicodeDecodeError) as error:
        raise PageError("its footer is broken") from error


def _chunk(meta: dict[int, Any]) -> Chunk:
    begin, dictionary = meta[9], meta.get(11, 0)
    if dictionary > 0:
        begin = min(begin, dictionary)
    nulls = meta.get(12, {}).get(3, -1)
    path = ".".join(name.decode() for name in meta[3])
    return Chunk(path, meta[5], meta[6], begin, begin + meta[7], nulls)


def pages(file: BinaryIO, begin: int, end: int) -> Pages:
    """Walks the page headers of a column chunk at bytes [begin, end).

    Raises:
        PageError: they do not fit the chunk.
    """
    largest = repeated = 0
    while begin < end:
        fields, length = _header(file, begin, end)
        kind, plain, stored = (fields.get(number, -1) for number in (1, 2, 3))
        if (
            isinstance(plain, dict)
            or isinstance(stored, dict)
            or plain < 0
            or stored < 0
            or begin + length + stored > end
        ):
            raise PageError(f"a page at byte {begin:,} does not fit its column")
        largest = max(largest, plain, stored)
        shares = any(
            _inside(fields, page, encoding) == _DELTA_BYTE_ARRAY for page, encoding in (_DATA_PAGE, _DATA_PAGE_V2)
        )
        if kind == _DICTIONARY or shares:
            repeated = max(repeated, plain)
        begin += length + stored
    return Pages(largest, repeated)


def _inside(fields: dict[int, Any], struct: int, number: int) -> Any:
    value = fields.get(struct)
    return value.get(number) if isinstance(value, dict) else None


def _header(file: BinaryIO, begin: int, end: int) -> tuple[dict[int, Any], int]:
    size = _FIRST_READ
    while True:
        file.seek(begin)
        data = file.read(min(size, end - begin))
        try:
            return _Struct(data).read(0)
        except IndexError:
            if len(data) >= end - begin or size >= MAX_HEADER_BYTES:
                raise PageError(f"a page header at byte {begin:,} is broken, or over 1 MiB") from None
            size *= 16


class _Struct:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, depth: int) -> tuple[dict[int, Any], int]:
        """The integer and struct fields of a struct, and its end."""
        if depth > 8:
            raise PageError("a page header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields, self._at
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else _signed(self._varint())
            if kind in _VARINTS:
                fields[number] = _signed(self._varint())
            elif kind == 12:
                fields[number] = self.read(depth + 1)[0]
            else:
                self._skip(kind)

    def fields(self, wanted: dict[int, Any], depth: int) -> dict[int, Any]:
        """The wanted fields of a struct that have the right types, as Thrift's own reader selects them."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else _signed(self._varint())
            as_wanted = wanted.get(number)
            if as_wanted is not None and kind == _kind_of(as_wanted):
                fields[number] = self._value(as_wanted, depth + 1)
            else:
                self._skip(kind, depth + 1)
        return fields

    def _value(self, wanted: Any, depth: int) -> Any:
        if wanted == _I64:
            return _signed(self._varint())
        if wanted == _BYTES:
            length = self._varint()
            self._move(length)
            return self._data[self._at - length : self._at]
        if isinstance(wanted, dict):
            return self.fields(wanted, depth)
        kind, count = self._list()
        if kind != _kind_of(wanted[0]):
            raise PageError("its footer is broken")
        return [self._value(wanted[0], depth + 1) for _ in range(count)]

    def _list(self) -> tuple[int, int]:
        """The type of a list's values, and their number."""
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if count > len(self._data):  # each takes at least a byte
            raise IndexError
        return head & 15, count

    def _skip(self, kind: int, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise PageError("a header is nested too deeply")
        if kind in (1, 2):
            return
        if kind == 3:
            self._byte()
        elif kind in _VARINTS:
            self._varint()
        elif kind == 7:
            self._move(8)
        elif kind == 8:
            self._move(self._varint())
        elif kind in (9, 10):  # list, set
            inner, count = self._list()
            for _ in range(count):
                self._skip(3 if inner in (1, 2) else inner, depth + 1)
        elif kind == 12:
            self.fields({}, depth)
        else:
            raise PageError(f"a header has a field of the type {kind}")

    def _move(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise PageError("a page header has a number of more than 10 bytes")


def _kind_of(wanted: Any) -> int:
    return 12 if isinstance(wanted, dict) else 9 if isinstance(wanted, list) else wanted


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
