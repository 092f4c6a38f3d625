"""Reads headers of tar archives, and decompresses them, within bounds.

Python's tarfile keeps header records of any size in memory, expands sparse members, and silently stops at the first
block of zeros. Archives here are untrusted, so this reader refuses the first two and continues after zeros (two
archives in one file are one source). It writes nothing.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from tasks.curation.sources.base import from_bytes, to_bytes, visible

BLOCK = 512
CHUNK = 2**20
MAX_ZEROS = 2**30  # after the end of an archive
MAX_HEADER_BYTES = 2**20  # of a GNU long name or a pax header
MAX_MEMBERS, MAX_NAME_BYTES, MAX_NAMES_BYTES = 300_000, 4096, 64 * 2**20  # the names are in memory
MAX_DECOMPRESSED_BYTES = 8 * 2**30
MAX_RATIO, RATIO_FREE_BYTES = 100, 64 * 2**20  # decompressed per compressed byte, beyond the first bytes
LZMA_MEMORY_BYTES = 128 * 2**20  # xz -9 needs 65 MiB
# The last is the usual start of the older .lzma, which xz's library reads as well.
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x5d\0\0\x80\0": "xz"}
ZSTD = b"\x28\xb5\x2f\xfd"
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **{b"1": "hard link", b"2": "symbolic link", b"5": "folder"},
    **dict.fromkeys((b"3", b"4", b"6"), "device"),
}


class TarError(Exception):
    """An error of an archive; the message does not name it."""


class Member(NamedTuple):
    """kind: "file", "hard link", "symbolic link", "folder", "device" or "unknown". offset: of its data."""

    name: str
    size: int
    offset: int
    kind: str
    link: str


class NameLimits:
    """Counts members of an archive, and the bytes of their names."""

    def __init__(self) -> None:
        self.count = self._bytes = 0

    def add(self, name: str) -> None:
        """
        Raises:
            TarError: a name is too long, or the names are too many.
        """
        length = len(to_bytes(name))
        self.count, self._bytes = self.count + 1, self._bytes + length
        if length > MAX_NAME_BYTES:
            raise TarError(f"it has a name of {length:,} bytes; at most {MAX_NAME_BYTES:,} are read")
        if self.count > MAX_MEMBERS or self._bytes > MAX_NAMES_BYTES:
            raise TarError(
                f"it has more than {MAX_MEMBERS:,} members or {MAX_NAMES_BYTES // 2**20} MiB of names; divide it"
            )


class Forward:
    """Reads a file, or its decompressed content, from start to end."""

    def __init__(self, file: BinaryIO) -> None:
        kind = compression(file)
        self._file = file if kind is None else None
        self._chunks = decompressed(file, kind) if kind else None
        self._buffer, self._at = b"", 0
        self.position = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end."""
        if self._file is not None:
            data = self._file.read(size)
        else:
            while len(self._buffer) - self._at < size and (chunk := next(self._chunks, b"")):
                self._buffer, self._at = self._buffer[self._at :] + chunk, 0
            data = self._buffer[self._at : self._at + size]
            self._at += len(data)
        self.position += len(data)
        return data

    def skip_zeros(self) -> None:
        """Skips blocks of zeros, up to the first other block or the end.

        Raises:
            TarError: there are more zeros than any program writes.
        """
        start = self.position
        while data := self.read(CHUNK):
            rest = data.lstrip(b"\0")
            if rest:
                back = len(data) - (len(data) - len(rest)) // BLOCK * BLOCK
                self.position -= back
                if self._file is not None:
                    self._file.seek(-back, 1)
                else:
                    self._buffer, self._at = data[len(data) - back :] + self._buffer[self._at :], 0
                return
            if self.position - start > MAX_ZEROS:
                raise TarError(f"it has more than {MAX_ZEROS // 2**20} MiB of zeros behind its end; cut them off")

    def skip_to(self, position: int) -> bool:
        """Moves to a position. Returns whether the file is that long."""
        assert position >= self.position, (position, self.position)
        if self._file is not None:
            if position > self.position:
                self._file.seek(position - 1)
                self.position = position
                return bool(self._file.read(1))
            return True
        while self.position < position:
            if not self.read(min(CHUNK, position - self.position)):
                return False
        return True


def compression(file: BinaryIO) -> str | None:
    """ "gzip", "bz2", "xz", or None for an archive that is not compressed; leaves the file at its start.

    Raises:
        TarError: it is compressed with zstd, which Python cannot read before 3.14.
    """
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if start.startswith(ZSTD):
        raise TarError("it is compressed with zstd; decompress it with `zstd -d`")
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def decompressed(file: BinaryIO, kind: str) -> Iterator[bytes]:
    """Yields the decompressed content in pieces of at most about 1 MiB.

    Raises:
        TarError: the content is broken, cut off, or far larger than the file.
    """
    new: Callable = {
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "bz2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY_BYTES),
    }[kind]
    taken = given = 0
    engine, fed = new(), False
    data = b""
    try:
        while True:
            if not data and (kind == "gzip" or engine.needs_input):
                data = file.read(CHUNK // 16)
                taken += len(data)
                if not data:
                    if fed:
                        raise TarError("it is cut off")
                    return
            if kind == "gzip":
                piece = engine.decompress(data, CHUNK)
                data = engine.unconsumed_tail
            else:
                piece, data = engine.decompress(data, CHUNK), b""
            fed = True
            given += len(piece)
            if given > MAX_DECOMPRESSED_BYTES or given > RATIO_FREE_BYTES + MAX_RATIO * taken:
                raise TarError(
                    f"it decompresses to more than {given // 2**20} MiB from {taken:,} bytes; decompress it yourself"
                )
            if piece:
                yield piece
            if engine.eof:  # there may be several streams; zeros may pad the last
                data = engine.unused_data.lstrip(b"\0")
                while not data and (more := file.read(CHUNK // 16)):
                    taken += len(more)
                    data = more.lstrip(b"\0")
                engine, fed = new(), bool(data)
                if not data:
                    return
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise TarError(f"its {kind} data cannot be decompressed: {error}") from error


def members(stream: Forward) -> Iterator[Member]:
    """Yields all members in order. The caller may read from `stream` up to a member's size before it requests the next.

    A member of kind "rest" stands for data after the end that is not an archive.

    Raises:
        TarError: a broken header, a truncated archive, or a header over the limits.
    """
    limits = NameLimits()
    last, ended = "", False
    pending: dict[str, str] = {}  # path, linkpath, size and sparse marks of the next member, from extended headers
    shared: dict[str, str] = {}  # of all following members
    while True:
        at = stream.position
        block = stream.read(BLOCK)
        if not block and ended:
            return
        if len(block) < BLOCK:
            if ended and not block.strip(b"\0"):
                return
            if ended:
                yield Member("", len(block), at, "rest", "")
                return
            if not limits.count and not pending:
                raise TarError("it has no tar header, or is cut off; copy it again, or pack it again")
            raise TarError(f"it is cut off {_after(last)}: its end mark is missing; copy it again, or pack it again")
        if not block.strip(b"\0"):
            ended = True
            stream.skip_zeros()
            continue
        if not _is_header(block):
            if ended:
                yield Member("", BLOCK, at, "rest", "")
                return
            why = "it has a broken header" if limits.count else "it is not a tar: it has no header"
            raise TarError(f"{why} {_after(last)}")
        ended = False
        size, flag = _number(block[124:136]), block[156:157]
        if flag in b"LKxgX":
            if size > MAX_HEADER_BYTES:
                raise TarError(
                    f"it has a header of {size:,} bytes {_after(last)}; at most {MAX_HEADER_BYTES:,} are read"
                )
            data = stream.read(size)
            if len(data) < size or not stream.skip_to(_padded(stream.position)):
                raise TarError(f"it is cut off in a header {_after(last)}")
            if flag in b"LK":
                pending["path" if flag == b"L" else "linkpath"] = from_bytes(data.split(b"\0")[0])
            else:
                (shared if flag == b"g" else pending).update(_pax(data, last))
            continue
        facts, pending = shared | pending, {}
        member = _member(block, size, flag, stream.position, facts)
        last = member.name
        limits.add(last)
        yield member
        end = member.offset + (member.size if member.kind in ("file", "unknown") else 0)
        if not stream.skip_to(max(stream.position, end)) or not stream.skip_to(_padded(stream.position)):
            raise TarError(f"it is cut off in {visible(last)!r}; copy it again, or pack it again")


def _member(block: bytes, size: int, flag: bytes, offset: int, facts: dict[str, str]) -> Member:
    name = facts.get("path")
    if name is None:
        name = from_bytes(block[:100].split(b"\0")[0])
        prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        if prefix:
            name = f"{from_bytes(prefix)}/{name}"
    link = facts.get("linkpath", from_bytes(block[157:257].split(b"\0")[0]))
    if "size" in facts:
        size = _decimal(facts["size"])
    if flag == b"S" or any(key.startswith("GNU.sparse.") for key in facts):
        raise TarError(f"it has the sparse member {visible(name)!r}; pack it again without --sparse")
    kind = "folder" if flag == b"\x00" and name.endswith("/") else _KINDS.get(flag, "unknown")
    return Member(name.rstrip("/") if kind == "folder" else name, size, offset, kind, link)


def _after(last: str) -> str:
    return f"after {visible(last)!r}" if last else "at its start"


def _padded(position: int) -> int:
    return -(-position // BLOCK) * BLOCK


def _is_header(block: bytes) -> bool:
    try:
        stated = _number(block[148:156])
    except TarError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stated == unsigned:
        return True
    return stated == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # with signed bytes


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarError(f"it has a header with the number {field!r}") from None


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise TarError(f"it has a pax header with the size {visible(text[:30])!r}")
    return int(text)


def _pax(data: bytes, last: str) -> dict[str, str]:
    """The keys that are used here, from records `LENGTH KEY=VALUE\n`."""
    facts, at = {}, 0
    while at < len(data) and data[at]:
        digits, blank, _ = data[at : at + 21].partition(b" ")
        if not blank or not digits.isdigit() or not len(digits) + 3 < int(digits) <= len(data) - at:
            raise TarError(f"it has a broken pax header {_after(last)}")
        end = at + int(digits)
        key, _, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        name = from_bytes(key)
        if name in ("path", "linkpath", "size") or name.startswith("GNU.sparse."):
            facts["GNU.sparse.*" if name.startswith("GNU.sparse.") else name] = from_bytes(value)
        at = end
    return facts
