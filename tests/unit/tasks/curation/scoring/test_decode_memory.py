"""No image takes more memory than is allowed: its header is refused, a JPEG is decoded at a half, or the worker's limit ends it."""

from __future__ import annotations

import functools
import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from icc_profiles import DISPLAY_P3, cmyk_profile, rgb_profile
from PIL import Image, ImageCms, ImageFile

from tasks.curation.config import CurationConfig, FilterConfig
from tasks.curation.scoring import blocks, decode_memory, decoding
from tasks.curation.scoring.decode_memory import MAX_BYTES, MIB, OWN_BYTES, WORKER_BYTES
from tasks.curation.scoring.decoding import TooManyPixelsError, UndecodableError, decode, inspect_and_decode
from tasks.curation.scoring.score import SCORER_PX, SCORER_RATIO, measure
from tasks.curation.scoring.workers import Workers

ANY = 10**9
WIDE, HIGH = 9999, 9998  # of headers; few enough pixels for curation.filters.max_pixels
P3 = rgb_profile(DISPLAY_P3)


def to_bytes(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    if mode == "I;16":
        return Image.fromarray((x * 65535 // max(1, width - 1)).astype(np.uint16))
    bands = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256, (x * y) % 256], -1)
    image = Image.fromarray(bands.astype(np.uint8), "RGBA")
    if mode == "LA":
        return Image.merge("LA", image.split()[:2])
    if mode == "P":
        return image.convert("RGB").quantize(32)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


# --- headers of the full size, with few pixels after them ------------------------------------------------------


def png_of(mode: str, **options) -> bytes:
    data = bytearray(to_bytes(picture(mode), "PNG", **options))
    data[16:24] = struct.pack(">II", WIDE, HIGH)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg_of(mode: str = "RGB", size: tuple[int, int] = (WIDE, HIGH), **options) -> bytes:
    data = bytearray(to_bytes(picture(mode), "JPEG", **options))
    at = max(data.find(marker) for marker in (b"\xff\xc0\x00\x11", b"\xff\xc2\x00\x11", b"\xff\xc2\x00\x14"))
    data[at + 5 : at + 9] = struct.pack(">HH", *size[::-1])
    return bytes(data)


def replaced(mode: str, form: str, layout: str, **options) -> bytes:
    """The size is replaced wherever its two numbers stand one after the other."""
    data = to_bytes(picture(mode), form, **options)
    assert struct.pack(layout, 64, 48) in data
    return data.replace(struct.pack(layout, 64, 48), struct.pack(layout, WIDE, HIGH))


def webp_of(mode: str, **options) -> bytes:
    data = bytearray(to_bytes(picture(mode), "WEBP", **options))
    if data[12:16] == b"VP8X":
        data[24:30] = (WIDE - 1).to_bytes(3, "little") + (HIGH - 1).to_bytes(3, "little")
    elif data[12:16] == b"VP8L":
        kept = int.from_bytes(data[21:25], "little") >> 28 << 28
        data[21:25] = (kept | HIGH - 1 << 14 | WIDE - 1).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", WIDE, HIGH)
    return bytes(data)


HEADERS = {
    "RGBA PNG": (lambda: png_of("RGBA"), "PNG, RGBA"),
    "LA PNG": (lambda: png_of("LA"), "PNG, LA"),
    "16-bit PNG": (lambda: png_of("I;16"), "PNG, L"),
    "RGB PNG with a profile": (lambda: png_of("RGB", icc_profile=P3), "PNG, RGB"),
    "CMYK progressive JPEG": (lambda: jpeg_of("CMYK", progressive=True), "JPEG, CMYK"),
    "progressive JPEG 4:4:4": (lambda: jpeg_of(progressive=True, subsampling=0), "JPEG, RGB"),
    "lossy WebP": (lambda: webp_of("RGB"), "WEBP, RGB"),
    "lossless WebP": (lambda: webp_of("RGBA", lossless=True), "WEBP, RGB"),
    "WebP with a profile": (lambda: webp_of("RGB", icc_profile=P3), "WEBP, RGB"),
    "AVIF": (lambda: replaced("RGB", "AVIF", ">II"), "AVIF, RGB"),
    "JPEG 2000": (lambda: replaced("RGB", "JPEG2000", ">II").replace(struct.pack(">II", 48, 64), struct.pack(">II", HIGH, WIDE)), "JPEG2000, RGB"),
    "GIF": (lambda: replaced("P", "GIF", "<HH"), "GIF, P"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_what_takes_too_much_memory_is_refused_by_its_header_with_its_size_and_the_limit(name, monkeypatch):
    make, kind = HEADERS[name]
    data = make()

    def load(self):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", load)
        with pytest.raises(TooManyPixelsError) as error:
            decode(data, ANY)
        every = CurationConfig(filters=FilterConfig(formats=decoding.DECODABLE))
        columns = measure(data, every).columns
    needed = int(str(error.value).split("takes ")[1].split(" MiB")[0].replace(",", ""))
    assert needed > MAX_BYTES // MIB
    assert str(error.value) == f"{WIDE}x{HIGH} ({kind}) takes {needed:,} MiB to decode, over the limit of 480 MiB"
    assert (columns["error_rule"], columns["error"]) == ("too_many_pixels", str(error.value))


def test_a_rotated_tiff_has_its_upright_size_in_the_header_and_in_the_pixels():
    data = to_bytes(picture("RGB"), "TIFF", tiffinfo={274: 6})
    header, image = inspect_and_decode(data, ANY, ("TIFF",))
    assert (decoding.inspect(data).width, decoding.inspect(data).height) == (header.width, header.height) == image.size
    assert image.size == (48, 64)


def test_a_phones_photograph_of_48_megapixels_is_decoded(monkeypatch):
    """As phones write HEIC: 8064 x 6048, 8 bits, 4:2:0, Display P3; only its size is large here."""
    decoding.decodable()
    data = to_bytes(picture("RGB"), "HEIF", quality=50, icc_profile=P3)
    image = Image.open(io.BytesIO(data))
    image._size = (8064, 6048)
    assert decode_memory.needed(image, "HEIF", 8 * MIB, converts=True) < MAX_BYTES


ROTATED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF
JPEGS = {  # size, options, scale at which the whole image is decoded; None: refused
    "48 megapixels, rotated": ((8000, 6000), {"exif": b"Exif\0\0" + ROTATED}, 1),
    "48 megapixels, progressive 4:4:4": ((8000, 6000), {"progressive": True, "subsampling": 0}, 1),
    "108 megapixels": ((12000, 9000), {}, 1),
    "176 megapixels": ((16000, 11000), {}, 2),
    "108 megapixels, progressive": ((12000, 9000), {"progressive": True}, 2),
    # It would fit at an eighth, which is too little to train on.
    "76 megapixels, progressive 4:4:4": ((8000, 9500), {"progressive": True, "subsampling": 0}, None),
}


@pytest.mark.parametrize("name", JPEGS)
def test_which_jpegs_are_refused_does_not_depend_on_the_size_that_is_wanted(name):
    size, options, scale = JPEGS[name]
    data = jpeg_of(size=size, **options)
    for min_side_px, wanted in ((None, 1), (5000, 1), (384, 8)):
        image, header = decoding._open(data)
        if scale is None:
            with pytest.raises(TooManyPixelsError, match=f"{size[0]}x{size[1]} "):
                decoding._fit_memory(data, image, header, min_side_px)
        else:
            decoding._fit_memory(data, image, header, min_side_px)
            assert image.size == decode_memory.scaled(size, max(scale, wanted))


# --- a small limit ---------------------------------------------------------------------------------------------


def limit(monkeypatch, pixels: int, bytes_a_pixel: float) -> None:
    monkeypatch.setattr(decode_memory, "MAX_BYTES", OWN_BYTES + int(pixels * bytes_a_pixel))


def test_a_jpeg_over_the_limit_is_decoded_at_a_half_and_one_of_many_coefficients_is_refused(monkeypatch):
    size = (800, 600)
    plain = to_bytes(picture("RGB", size), "JPEG")
    several = to_bytes(picture("RGB", size), "JPEG", progressive=True, subsampling=0)
    whole = decode(plain, ANY)
    limit(monkeypatch, 800 * 600, 3)
    half = decode(plain, ANY)
    assert half.size == (400, 300) and inspect_and_decode(plain, ANY, ("JPEG",))[0].width == 800
    assert np.abs(np.asarray(half, int) - np.asarray(whole.reduce(2), int)).mean() < 2
    for min_side_px in (None, 100):
        with pytest.raises(TooManyPixelsError):
            decode(several, ANY, min_side_px)


def test_a_rotation_behind_the_pixels_of_a_png_is_counted_before_the_image_is_copied(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(picture("RGB", (800, 600)), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    late = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    limit(monkeypatch, 800 * 600, 6)
    with pytest.raises(TooManyPixelsError, match="800x600 "):
        decode(late, ANY)
    assert decode(to_bytes(picture("RGB", (800, 600)), "PNG"), ANY).size == (800, 600)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGBA", {}), ("LA", {}), ("I;16", {}), ("P", {"transparency": 3}), ("L", {}), ("RGBA", {"icc_profile": P3})])  # fmt: skip
def test_strips_make_the_same_image_as_one_conversion(mode, options, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = to_bytes(picture(mode, (37, 23)), "PNG", exif=exif, **options)
    whole = decode(data, ANY)
    for pixels in (10, 100):  # parts of a row, and two rows
        monkeypatch.setattr(decoding, "STRIP_PIXELS", pixels)
        parts = decode(data, ANY)
        assert parts.size == whole.size and parts.tobytes() == whole.tobytes()


CMYK = cmyk_profile()
GRAY16 = (np.arange(37 * 23, dtype=np.uint32).reshape(23, 37) * 77).astype(np.uint16)
UNUSUAL = {  # (mode, form, options); I;16B has the bytes of a Macintosh
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 95}),
    "CMYK JPEG, profile": ("CMYK", "JPEG", {"quality": 95, "icc_profile": CMYK}),
    "CMYK TIFF, profile": ("CMYK", "TIFF", {"icc_profile": CMYK}),
    "P PNG, profile": ("P", "PNG", {"icc_profile": P3}),
    "P GIF": ("P", "GIF", {}),
    "YCbCr TIFF": ("YCbCr", "TIFF", {}),
    "YCbCr TIFF, profile": ("YCbCr", "TIFF", {"icc_profile": P3}),
    "YCbCr TIFF, turned, profile": ("YCbCr", "TIFF", {"icc_profile": P3, "tiffinfo": {274: 6}}),  # Pillow turns it
    "I;16B TIFF": ("I;16B", "TIFF", {}),
}


def by_pillow(data: bytes) -> Image.Image:
    """The whole image at once, by the libraries' own conversions."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16B":
        return Image.fromarray(((np.asarray(image).astype(float) * 255 / 65535).round()).astype(np.uint8)).convert("RGB")  # fmt: skip
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    if image.mode != "CMYK":
        image = image.convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


TURNED = [name for name, (_, form, _) in UNUSUAL.items() if form in ("JPEG", "PNG")]  # by EXIF


@pytest.mark.parametrize(("name", "orientation"), [*((name, 1) for name in UNUSUAL), *((name, 6) for name in TURNED)])
def test_strips_of_an_unusual_mode_are_what_pillow_makes_of_the_whole_image(name, orientation, monkeypatch):
    mode, form, options = UNUSUAL[name]
    image = Image.fromarray(GRAY16.astype(">u2")) if mode == "I;16B" else picture(mode, (37, 23))
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = options | {"exif": exif}
    data = to_bytes(image, form, **options)
    assert Image.open(io.BytesIO(data)).mode == mode
    want = by_pillow(data)
    if orientation == 6:
        want = want.transpose(Image.Transpose.ROTATE_270)
    if "profile" in name:
        moved = np.asarray(by_pillow(data), int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
        assert np.abs(moved).max() > 20, "the picture does not depend on its profile"
    for pixels in (2**18, 100, 10):  # the whole, two rows, and parts of a row
        monkeypatch.setattr(decoding, "STRIP_PIXELS", pixels)
        made = decode(data, ANY)
        assert made.mode == "RGB" and made.size == want.size
        assert np.abs(np.asarray(made, int) - np.asarray(want, int)).max() <= 2


def test_a_jpeg_of_much_metadata_is_refused_before_pillow_appends_it():
    data = to_bytes(picture("RGB"), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + b"Exif\0\0" + bytes(65527)
    with pytest.raises(UndecodableError, match="over 32 MiB before its picture"):
        decode(data[:2] + segment * 600 + data[2:], ANY)
    assert decode(data[:2] + segment * 2 + data[2:], ANY).size == (64, 48)


def test_a_png_of_very_many_chunks_is_refused_before_pillow_reads_them():
    data = to_bytes(picture("RGB"), "PNG")
    empty = b"\0\0\0\0abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    with pytest.raises(UndecodableError, match="more than 100,000 chunks"):
        decode(data[:33] + empty * 100_000 + data[33:], ANY)
    assert decode(data[:33] + empty * 1_000 + data[33:], ANY).size == (64, 48)


@pytest.mark.parametrize("count", [5_000, 2_000_000])
def test_a_jpeg_of_very_many_segments_is_refused_before_pillow_keeps_them(count, monkeypatch):
    whole = to_bytes(picture("RGB"), "JPEG")
    data = whole[:2] + b"\xff\xfe\0\2" * count + whole[2:]
    monkeypatch.setattr(decoding.Image, "open", None)
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError, match="a JPEG of over 4,096 segments before its picture"):
            decode(data, ANY)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("byte", [b"\xff", b"\xff\0", b"a"], ids=["fill bytes", "escapes", "rubbish"])
def test_a_jpeg_of_megabytes_between_its_segments_is_refused_before_pillow_reads_them_one_by_one(byte, monkeypatch):
    whole = to_bytes(picture("RGB"), "JPEG")
    first = 2 + 2 + 16  # the end of the first segment
    assert decode(whole[:first] + byte * 100 + whole[first:], ANY).size == (64, 48)
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a JPEG with over 1 MiB between the segments before its picture"):
        decode(whole[:first] + byte * (MIB + 1) + whole[first:], ANY)


def test_a_jpeg_of_as_many_segments_as_a_profile_may_have_is_read():
    whole = to_bytes(picture("RGB"), "JPEG")
    for segment in (b"\xff\xfe\0\2", b"\xff\xe2\0\6abcd"):
        assert decode(whole[:2] + segment * 300 + whole[2:], ANY).size == (64, 48)


GIF = b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0)  # header without a colour table


def gif(comments: int, between: int = 0, block: bytes = b"\x01a") -> bytes:
    """Of two pictures, with so many blocks in a comment before the first, and before the second."""
    frames = [picture("RGB"), picture("RGB").transpose(Image.Transpose.ROTATE_180)]
    data = to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    first = data.index(b"\x21\xf9\x04")
    second = data.index(b"\x21\xf9\x04", first + 1)
    comment = [b"\x21\xfe" + block * count + b"\0" for count in (comments, between)]
    return data[:first] + comment[0] + data[first:second] + comment[1] + data[second:]


@pytest.mark.parametrize("data", [gif(100_000), gif(0, 100_000), GIF + b"\x21\x01\0" * 100_001, GIF + bytes(100_001)])  # fmt: skip
def test_a_gif_of_very_many_blocks_is_refused_before_pillow_keeps_them(data, monkeypatch):
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a GIF of over 100,000 blocks outside its pictures"):
        decode(data, ANY)


def test_a_gif_whose_pictures_have_blocks_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 100)
    with pytest.raises(UndecodableError, match="a GIF of over 100 blocks$"):
        decode(GIF + b"\x2c" + bytes(8) + b"\0\x08" + b"\x01a" * 100, ANY)


@pytest.mark.parametrize("data", [gif(0), gif(5_000, 5_000, b"\xff" + bytes(range(255)))], ids=["plain", "comments"])
def test_a_gif_with_as_many_comments_as_people_write_is_an_animation_of_its_frames(data):
    header, image = inspect_and_decode(data, ANY, ("GIF",))
    assert header.animated and image.size == (64, 48)
    assert np.array_equal(np.asarray(image), np.asarray(decode(gif(0), ANY)))


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}], ids=["TIFF", "BigTIFF"])
@pytest.mark.parametrize("tag", ["rows", "offsets"])
def test_a_tiff_of_very_many_strips_is_refused_before_pillow_lists_them(tag, options, monkeypatch):
    image = Image.new("L", (1, 3000))
    data = to_bytes(image, "TIFF", tiffinfo={278: 1}, strip_size=1, **options)
    assert decode(data, ANY).size == (1, 3000)
    monkeypatch.setattr(blocks, "MAX_STRIPS", 2999)
    monkeypatch.setattr(blocks, "STRIP_TAGS", (279,) if tag == "rows" else (273,))
    monkeypatch.setattr(decoding.Image, "open", None)
    with pytest.raises(UndecodableError, match="a TIFF of 3,000 strips or tiles; the limit is 2,999"):
        decode(data, ANY)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_over_its_limit_is_refused_before_pillow_copies_it(form, monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a" * 5000
    data = to_bytes(picture("RGB"), form, exif=exif)
    assert decode(data, ANY).size == (48, 64)
    monkeypatch.setattr(blocks, "MAX_METADATA_BYTES", 4096)
    monkeypatch.setattr(Image.Image, "getexif", None)
    with pytest.raises(UndecodableError, match="EXIF of 5,... bytes, over the limit of 4,096"):
        decode(data, ANY)


def test_a_lack_of_memory_for_exif_is_no_upright_picture(monkeypatch):
    def getexif(image):
        raise MemoryError

    data = to_bytes(picture("RGB"), "JPEG")
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    with pytest.raises(MemoryError):
        decode(data, ANY)


def test_scorers_see_a_long_strip_in_few_pixels():
    measured = measure(to_bytes(Image.new("RGB", (400, 8_000)), "PNG"), CurationConfig())
    assert measured.image_size[1] <= SCORER_RATIO * SCORER_PX and len(measured.image) < MIB
    assert measure(to_bytes(Image.new("RGB", (1200, 1600)), "PNG"), CurationConfig()).image_size == (384, 512)


@pytest.mark.slow
def test_a_broken_image_leaves_no_memory_in_its_worker_which_the_next_one_needs():
    good = to_bytes(Image.new("RGB", (3000, 3000)), "PNG")
    measure(good, CurationConfig())  # loads what workers share
    items = [(0, good[: len(good) * 9 // 10]), (1, good), (2, good[: len(good) // 2]), (3, good)]
    with Workers(functools.partial(measure, config=CurationConfig()), 1, memory_bytes=60 * MIB) as workers:
        results = [getattr(result, "columns", result) for _, result in workers.map(items)]
    assert [isinstance(row, dict) and row.get("error_rule", "") for row in results] == ["undecodable", "", "undecodable", ""], results  # fmt: skip


# --- what it really takes --------------------------------------------------------------------------------------

MEASURE = """
import ctypes, json, sys
from pathlib import Path
from tasks.curation.scoring import blocks, decode_memory, decoding
decoding.decodable()
needed = []
def spy(*args, of=decode_memory.needed, **options):
    needed.append(of(*args, **options))
    return needed[-1]
decode_memory.needed = spy
def peak(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
decoding.decode(Path(sys.argv[1]).read_bytes(), 10**9)  # what a first decode loads
for path in sys.argv[1:]:
    needed.clear()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not counted as taken before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak("VmRSS")
    decoding.decode(Path(path).read_bytes(), 10**9)
    print(json.dumps([peak("VmHWM") - before, max(needed)]))
"""
FORMS = {
    "RGB PNG": ("RGB", "PNG", {}),
    "RGBA PNG": ("RGBA", "PNG", {}),
    "LA PNG": ("LA", "PNG", {}),
    "16-bit PNG": ("I;16", "PNG", {}),
    "transparent P PNG": ("P", "PNG", {"transparency": 3}),
    "RGB PNG, rotated": ("RGB", "PNG", {"exif": ROTATED}),
    "RGB PNG, profile": ("RGB", "PNG", {"icc_profile": P3}),
    "JPEG": ("RGB", "JPEG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}),
    "progressive JPEG 4:4:4": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "WebP": ("RGB", "WEBP", {"method": 0}),
    "RGBA WebP": ("RGBA", "WEBP", {"method": 0, "lossless": True, "quality": 0}),
    "TIFF of one strip": ("RGB", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "RGBA TIFF": ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
    "TIFF, rotated": ("RGB", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30, "tiffinfo": {274: 6}}),
    "RGBA TIFF, rotated": ("RGBA", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30, "tiffinfo": {274: 6}}),
    "YCbCr TIFF": ("YCbCr", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "HEIF": ("RGB", "HEIF", {"quality": 30}),
    "RGBA HEIF": ("RGBA", "HEIF", {"quality": 30}),
    "HEIF 4:4:4": ("RGB", "HEIF", {"quality": 30, "chroma": 444}),
    "GIF": ("P", "GIF", {}),
    "BMP": ("RGB", "BMP", {}),
    "AVIF": ("RGBA", "AVIF", {"speed": 10, "subsampling": "4:4:4"}),
    "JPEG 2000": ("RGBA", "JPEG2000", {}),
}  # fmt: skip


@pytest.mark.slow
def test_no_format_takes_more_memory_than_its_header_is_counted_with(tmp_path):
    size, paths = (2000, 2000), []
    for name, (mode, form, options) in FORMS.items():
        paths.append(tmp_path / name.replace(" ", "_"))
        paths[-1].write_bytes(to_bytes(Image.new(mode, size), form, **options))
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True)
    counted = dict(zip(FORMS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert not {name: pair for name, pair in counted.items() if pair[0] > pair[1]}, "bytes taken, bytes counted"
    assert all(needed < OWN_BYTES + 2 * taken for taken, needed in counted.values()), counted
    assert MAX_BYTES < WORKER_BYTES == 512 * MIB
