"""What Pillow would keep of a file before its pixels is counted as Pillow reads it, before Pillow does."""

import io
import struct

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
