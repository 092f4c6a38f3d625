"""What Pillow would keep of a file before its pixels is counted as Pillow reads it, before Pillow does."""

import contextlib
import io
import struct
import time
import zlib

import pytest
from PIL import Image

from tasks.curation.scoring import blocks, decoding
from tasks.curation.scoring.decoding import UndecodableError, decode

ANY = 10**9


def whole_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("code", [0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)], ids=hex)
def test_segments_behind_a_marker_without_a_length_are_not_hidden_by_a_false_one(code, monkeypatch):
    """Pillow looks for the next marker right behind these; what looks like their length is none."""
    whole, hidden = whole_jpeg(), b"\xff\xef\0\2" * 5_000
    one = bytes([255, code]) + struct.pack(">H", 2 + len(hidden)) + hidden
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match=f"corrupt JPEG: marker 0x{code:02x} before its picture"):
        decode(whole[:2] + one + whole[2:], ANY)


def test_no_marker_hides_segments_from_the_count(monkeypatch):
    """Whatever stands between a marker and its length: Pillow keeps no more segments than are counted."""
    whole, hidden = whole_jpeg(), b"\xff\xef\0\2" * 100
    monkeypatch.setattr(blocks, "MAX_SEGMENTS", 50)
    for code in range(256):
        for length in (0, 1, 2, 2 + len(hidden)):
            data = whole[:2] + bytes([255, code]) + struct.pack(">H", length) + hidden + whole[2:]
            try:
                kept = len(Image.open(io.BytesIO(data)).applist)
            except OSError:  # Pillow refuses it
                continue
            if kept > 50:
                with pytest.raises(UndecodableError):
                    blocks.check(data)


@pytest.mark.parametrize("code", [*range(0xD0, 0xD8)], ids=hex)
def test_a_restart_before_the_picture_is_stepped_over_as_libjpeg_does(code, monkeypatch):
    whole = whole_jpeg()
    assert decode(whole[:2] + bytes([255, code]) + whole[2:], ANY).size == (64, 48)
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a JPEG of over 4,096 segments before its picture"):
        decode(whole[:2] + bytes([255, code, 255, 255]) + b"\xff\xef\0\2" * 5_000 + whole[2:], ANY)


@pytest.mark.parametrize("mark", [b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+"])
def test_every_mark_of_a_tiff_that_pillow_reads_is_walked_as_pillow_walks_it(mark, monkeypatch):
    """The last one is a BigTIFF's to others, and a plain TIFF to Pillow."""
    order = "<" if mark.startswith(b"II") else ">"
    values = {256: 1, 257: 3000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 8}
    data = mark + struct.pack(order + "IH", 8, len(values))
    for tag, value in values.items():
        data += struct.pack(order + "HHII", tag, 4, 3000 if tag in (273, 279) else 1, value)
    data += bytes(20_000)
    assert Image.open(io.BytesIO(data)).tag_v2[257] == 3000
    monkeypatch.setattr(blocks, "MAX_STRIPS", 2999)
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a TIFF of 3,000 strips or tiles; the limit is 2,999"):
        decode(data, ANY)


# --- PNG -------------------------------------------------------------------------------------------------------


def png_with(kind: bytes, count: int, at: int = 33) -> bytes:
    """A PNG with chunks behind its header (at 33) or behind its pixels (at -12)."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "PNG")
    body = kind + (b"x\0\0\0\0" if kind == b"iTXt" else b"x\0\0") + zlib.compress(b"profile")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = buffer.getvalue()
    return whole[:at] + chunk * count + whole[at:]


@pytest.mark.parametrize("at", [33, -12])
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_png_of_many_compressed_chunks_is_refused_before_pillow_inflates_them(kind, at, monkeypatch):
    assert decode(png_with(kind, 256, at), ANY).size == (64, 48)
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a PNG of more than 256 profiles and compressed texts"):
        decode(png_with(kind, 257, at), ANY)


# --- PPM -------------------------------------------------------------------------------------------------------

LONG = b"#" * 64 + b"\n"  # a comment
PPM = [  # ends of a header of 2 x 1 px, and the pixels behind it
    (b"P1 2 1 ", b"10"),
    (b"P2 2 1 255 ", b"0 255"),
    (b"P3 2 1 255 ", b"0 1 2 3 4 5"),
    (b"P4 2 1\n", b"\xc0"),
    (b"P5 2 1 255\n", b"  "),
    (b"P5 2 1 65535\n", b"    "),
    (b"P6 2 1 255\n", b"######"),
]


@pytest.mark.parametrize(("header", "pixels"), PPM)
def test_a_ppm_of_a_long_header_is_refused_wherever_it_is_long(header, pixels, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_HEADER_BYTES", 64)
    assert decode(header + pixels, ANY).size == (2, 1)
    filled = [header[:i] + LONG + header[i:] for i in range(3, len(header))]  # also inside a number, as Pillow reads it
    filled += [header[:i] + b" " * 64 + header[i:] for i in range(3, len(header)) if header[i - 1 : i].isspace()]
    read = []
    for data in filled:
        with contextlib.suppress(ValueError):  # a number that is empty
            read.append(Image.open(io.BytesIO(data + pixels)).size)
    assert len(read) > len(filled) // 2
    monkeypatch.setattr(decoding.Image, "open", None)
    for data in filled:
        with pytest.raises(UndecodableError, match="a PPM whose header has over 64 bytes"):
            decode(data + pixels, ANY)


@pytest.mark.parametrize("filling", [b"#", b" ", b"#\n"])
def test_a_ppm_of_megabytes_before_its_pixels_is_refused_within_a_tenth_of_a_second(filling):
    data = b"P6 1 " + filling * 2**23
    begun = time.process_time()
    with pytest.raises(UndecodableError):
        blocks.check(data)
    assert time.process_time() - begun < 0.1


@pytest.mark.parametrize(("header", "pixels"), PPM)
def test_a_ppm_with_a_comment_and_many_pixels_is_read(header, pixels):
    header = header.replace(b" 2 1", b" # made by hand\n 400 # wide\n400", 1)
    data = (
        header + pixels[:1] * 2 * 400 * 400 * 3
        if header[1:2] in b"456"
        else header + pixels[:1] + b" 1" * (400 * 400 * 3)
    )
    assert decode(data, ANY).size == (400, 400)


@pytest.mark.parametrize("header", [b"P1 8 8\n", b"P2 8 8 255\n", b"P3 8 8 255\n"])
def test_a_ppm_of_many_comments_is_refused(header):
    def data(comments: int) -> bytes:
        return header + b"#\n" * comments + b"1 " * 192

    assert decode(data(1000), ANY).size == (8, 8)
    with pytest.raises(UndecodableError, match="a PPM of over 1,000 comments"):
        decode(data(1001), ANY)
