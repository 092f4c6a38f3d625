"""Counts the blocks of an image file before Pillow opens it.

Pillow takes microseconds and up to some hundred bytes for each segment, chunk, block or strip, even if it is empty: a file
of megabytes may have millions of them.
"""

from __future__ import annotations

import re
import struct

from tasks.curation.scoring.decode_memory import MIB

MAX_SCANS = 50  # of a JPEG; each costs a pass over all pixels. Encoders write up to 18
MAX_SEGMENTS = 4096  # before a JPEG's picture; a profile has up to 255, phones write some hundreds
MAX_BETWEEN_BYTES = MIB  # fill bytes and rubbish between them, which Pillow reads one by one
MAX_METADATA_BYTES = 32 * MIB  # before a JPEG's picture, and of EXIF; phones' depth maps have a few
MAX_CHUNKS = 100_000  # of a PNG; in chunks of 4 KiB, which few encoders write, these are 400 MiB
MAX_COMPRESSED = 256  # profiles and texts of a PNG: each takes up to 4 ms to inflate; encoders write a few
MAX_EXTENSIONS = 100_000  # blocks of up to 255 bytes outside a GIF's pictures: comments, XMP
MAX_BLOCKS = 4_000_000  # of a GIF up to its second picture
MAX_STRIPS = 100_000  # of a TIFF, or tiles
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")  # which Pillow reads, the wrong ones too
MAX_HEADER_BYTES = 2**16  # of a PPM: Pillow reads it byte by byte
MAX_COMMENTS = 1_000  # of a PPM whose values are text: each copies up to a mebibyte
STRIP_TAGS = (273, 279, 324, 325)  # offsets and sizes of strips and tiles
COMPRESSION_TAG = 259
# Markers without a length which libjpeg refuses before a picture: Pillow looks for the next marker right behind them. They are
# a second start, an end, and those that the standard keeps for extensions.
REFUSED_MARKERS = frozenset({0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)})
EXTENSION, PICTURE, END = 0x21, 0x2C, 0x3B  # of a GIF


class UndecodableError(ValueError):
    """The bytes are no whole image."""


def check(data: bytes) -> None:
    """
    Raises:
        UndecodableError: more blocks than an encoder writes; names the format and the limit.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg_metadata(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(data)
    elif data.startswith(TIFF_MARKS):
        _check_tiff(data)
    elif data[:1] == b"P" and data[1:2] in PPM_KINDS:
        _check_ppm(data)


def _check_png(data: bytes) -> None:
    at, chunks, compressed = 8, 0, 0
    while at + 8 <= len(data):
        compressed += data[at + 4 : at + 8] in (b"iCCP", b"zTXt", b"iTXt")
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        chunks += 1
        if compressed > MAX_COMPRESSED:
            raise UndecodableError(f"a PNG of more than {MAX_COMPRESSED} profiles and compressed texts")
        if chunks > MAX_CHUNKS:
            raise UndecodableError(f"a PNG of more than {MAX_CHUNKS:,} chunks")


def _check_gif(data: bytes) -> None:
    """Walks the blocks up to the second picture, where Pillow looks whether there is one: it keeps those of comments."""
    at, pictures, blocks, extensions, size = 13 + _palette(data, 10), 0, 0, 0, len(data)
    while at < size and pictures < 2 and data[at] != END:
        kind, before = data[at], blocks
        blocks += 1
        if kind == PICTURE:
            pictures += 1
            at += 11 + _palette(data, at + 9)
        else:
            at += 2 if kind == EXTENSION else 1  # other bytes are skipped
        if kind in (PICTURE, EXTENSION):
            while at < size and (length := data[at]) and blocks <= MAX_BLOCKS:
                at += 1 + length
                blocks += 1
            at += 1
        if kind != PICTURE:
            extensions += blocks - before
        if extensions > MAX_EXTENSIONS:
            raise UndecodableError(f"a GIF of over {MAX_EXTENSIONS:,} blocks outside its pictures")
        if blocks > MAX_BLOCKS:
            raise UndecodableError(f"a GIF of over {MAX_BLOCKS:,} blocks")


def _palette(data: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at `at` announce."""
    flags = data[at] if at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _check_tiff(data: bytes) -> None:
    order = "<" if data.startswith(b"II") else ">"
    large = data[2] == 43  # as in Pillow, for which a big-endian file is never a BigTIFF
    entry = struct.Struct(order + ("HHQ8x" if large else "HHI4x"))
    try:
        (at,) = struct.unpack_from(order + ("8xQ" if large else "4xI"), data)
        (tags,) = struct.unpack_from(order + ("Q" if large else "H"), data, at)
        compressions = 0
        for i in range(min(tags, 2**16)):
            tag, _, count = entry.unpack_from(data, at + (8 if large else 2) + i * entry.size)
            if tag in STRIP_TAGS and count > MAX_STRIPS:
                raise UndecodableError(f"a TIFF of {count:,} strips or tiles; the limit is {MAX_STRIPS:,}")
            compressions += tag == COMPRESSION_TAG
            if compressions > 1:  # Pillow takes the last one, and libtiff the first
                raise UndecodableError("corrupt TIFF: it names its compression twice")
    except struct.error:  # it is cut off, which Pillow says
        return


# --- PPM -------------------------------------------------------------------------------------------------------

PPM_KINDS = tuple(bytes([kind]) for kind in b"0123456fy")
_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")  # with the end of its line: what follows continues a token
_HEADER = {2: re.compile(rb"\S{1,6}\s+\S+\s+\S+\s"), 3: re.compile(rb"\S{1,6}\s+\S+\s+\S+\s+\S+\s")}  # by numbers


def _check_ppm(data: bytes) -> None:
    start = _COMMENT.sub(b"", data[:MAX_HEADER_BYTES])
    numbers = 2 if data.startswith((b"P1", b"P4")) else 3
    if len(data) > MAX_HEADER_BYTES and _HEADER[numbers].match(start) is None:
        raise UndecodableError(f"a PPM whose header has over {MAX_HEADER_BYTES:,} bytes")
    if data.startswith((b"P1", b"P2", b"P3")) and data.count(b"#") > MAX_COMMENTS:
        raise UndecodableError(f"a PPM of over {MAX_COMMENTS:,} comments")


# --- JPEG ------------------------------------------------------------------------------------------------------


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MARKER_OR_RESTART = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)


def _check_jpeg_metadata(data: bytes) -> None:
    """Walks the segments before a JPEG's picture: Pillow appends those of EXIF to each other, which takes time with the square
    of their number, and keeps each of all kinds, which takes memory even if it is empty."""
    at, code, segments, between = 2, 0, 0, 0
    while code != 0xDA and (match := _MARKER.search(data, at)) is not None:
        between += match.start() - at
        code, at = data[match.start() + 1], match.end()
        if code in REFUSED_MARKERS:
            raise UndecodableError(f"corrupt JPEG: marker 0x{code:02x} before its picture")
        at += int.from_bytes(data[at : at + 2], "big")
        segments += 1
        if at > MAX_METADATA_BYTES:
            raise UndecodableError(f"a JPEG with over {MAX_METADATA_BYTES // MIB} MiB before its picture")
        if segments > MAX_SEGMENTS:
            raise UndecodableError(f"a JPEG of over {MAX_SEGMENTS:,} segments before its picture")
        if between > MAX_BETWEEN_BYTES:
            raise UndecodableError(
                f"a JPEG with over {MAX_BETWEEN_BYTES // MIB} MiB between the segments before its picture"
            )


def check_jpeg(data: bytes) -> int:
    """Walks a JPEG's markers to its end: libjpeg turns lost or overwritten scan data into gray, with a mere warning, and
    reads any number of scans.

    Returns:
        how many components the first scan has.
    """
    at, in_scan, restarts, scans, components = 2, False, False, 0, 0
    while True:
        match = (_MARKER if restarts or not in_scan else _MARKER_OR_RESTART).search(data, at)
        if match is None:
            raise UndecodableError("truncated JPEG: no end-of-image marker")
        code, at = data[match.start() + 1], match.end()
        if code == 0xD9:
            if not in_scan:
                raise UndecodableError("corrupt JPEG: it ends before its first scan")
            return components
        known = code in (0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, 0xCC) or 0xE0 <= code <= 0xEF
        if in_scan and not known:
            raise UndecodableError(f"corrupt JPEG: marker 0x{code:02x} inside scan data")
        if at + 2 > len(data):
            raise UndecodableError("truncated JPEG: it ends inside a segment")
        if code == 0xDA and not in_scan:
            components = data[at + 2] if at + 2 < len(data) else 0
        at += int.from_bytes(data[at : at + 2], "big")
        in_scan |= code == 0xDA
        scans += code == 0xDA
        if scans > MAX_SCANS:
            raise UndecodableError(f"a JPEG of more than {MAX_SCANS} scans, each of which takes a pass over all pixels")
        restarts |= code == 0xDD
