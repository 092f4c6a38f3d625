"""Sizes of a Parquet column's pages, from the headers that stand before them (Thrift's compact protocol).

Arrow allocates what a page's header claims before it decompresses anything, and the footer's sums prove nothing. The
format: parquet.thrift (PageHeader) of apache/parquet-format, and the compact protocol of Apache Thrift.
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

MAX_HEADER_BYTES = 2**20
_FIRST_READ = 2**13
_DICTIONARY, _DELTA_BYTE_ARRAY = 2, 7
_DATA_PAGE, _DATA_PAGE_V2 = (5, 2), (8, 4)  # fields of PageHeader, and of the encoding inside them
_VARINTS = (4, 5, 6)  # i16, i32, i64


class PageError(ValueError):
    """What is wrong, without the name of the file."""


class Pages(NamedTuple):
    """largest: bytes of the largest page, decompressed. repeated: of the largest page whose values others may repeat (a
    dictionary, or values that share their beginnings); 0 where there is none."""

    largest: int
    repeated: int


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
    found = fields.get(struct)
    return found.get(number) if isinstance(found, dict) else None


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
        """The fields of a struct that are integers or structs, and where it ends."""
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

    def _skip(self, kind: int) -> None:
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
        else:
            raise PageError(f"a page header has a field of the type {kind}")

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


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
