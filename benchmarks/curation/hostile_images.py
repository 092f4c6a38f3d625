"""Hostile images: for each format and mode the largest that is decoded and a slightly larger one, and files that take
long.

Registered with the kinds of hostile_inputs.py. Each is decoded in a worker process with its limits, first as in
scoring, then whole as in encoding and captioning. A plain JPEG of any size is decoded, a large one at half its size.
"""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from hostile_inputs import KINDS, MIB
from PIL import Image

MAX_PIXELS = 178_956_970  # of recipes/nucleus_17b.yaml
IMAGES: set[str] = set()  # names of kinds
UNDER, OVER = 0.985, 1.015  # of the limit of memory


def image(ends: str) -> Callable:
    """Registers a function that makes one file."""

    def register(build: Callable[[], bytes], name: str = "") -> Callable[[], bytes]:
        name = name or build.__name__
        IMAGES.add(name)
        KINDS[name] = ends, lambda folder: (folder / "x").write_bytes(build())
        return build

    return register


def _size(bytes_a_pixel: float, share: float, width: int = 8000) -> tuple[int, int]:
    from tasks.curation.scoring.decode_memory import MAX_BYTES, OWN_BYTES

    return width, round(share * (MAX_BYTES - OWN_BYTES) / bytes_a_pixel / width)


def _encoded(picture, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def _plain(mode: str, size: tuple[int, int]):
    from PIL import Image

    colors = {"RGB": (9, 99, 199), "RGBA": (9, 99, 199, 128), "LA": (99, 128), "CMYK": (9, 99, 199, 20), "I;16": 30000}
    return Image.new(mode, size, colors.get(mode, 1))


def _moved_profile() -> bytes:
    """An ICC profile whose red and green primaries are exchanged."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


def _rotated(orientation: int = 6):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# name -> (bytes a pixel by scoring/decode_memory.py, mode, format, options)
FORMS: dict[str, tuple[float, str, str, dict]] = {
    "png_rgb": (4, "RGB", "PNG", {"compress_level": 1}),
    "png_rgb_rotated": (8, "RGB", "PNG", {"compress_level": 1, "exif": _rotated}),
    "png_rgb_profile": (8, "RGB", "PNG", {"compress_level": 1, "icc_profile": _moved_profile}),
    "png_rgba": (8, "RGBA", "PNG", {"compress_level": 1}),
    "png_la": (8, "LA", "PNG", {"compress_level": 1}),
    "png_16_bit_gray": (6, "I;16", "PNG", {"compress_level": 1}),
    "png_palette_transparent": (5, "P", "PNG", {"compress_level": 1, "transparency": 1}),
    "jpeg_progressive_444": (7, "RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "jpeg_progressive_cmyk": (9, "CMYK", "JPEG", {"progressive": True}),
    "webp_lossy": (16, "RGB", "WEBP", {"method": 0}),
    "webp_lossless_alpha": (16, "RGBA", "WEBP", {"method": 0, "lossless": True, "quality": 0}),
    "avif": (15, "RGB", "AVIF", {"speed": 10}),
    "avif_444_alpha": (16, "RGBA", "AVIF", {"speed": 10, "subsampling": "4:4:4"}),
    "heif": (8, "RGB", "HEIF", {"quality": 10}),
    "jpeg_2000": (23, "RGB", "JPEG2000", {}),
    "tiff_of_one_strip": (7, "RGB", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "tiff_cmyk": (8, "CMYK", "TIFF", {"compression": "tiff_adobe_deflate"}),
    "gif": (5, "P", "GIF", {}),
}
for _name, (_bytes, _mode, _form, _options) in FORMS.items():

    def _build(
        share: float, each: float = _bytes, mode: str = _mode, form: str = _form, given: dict = _options
    ) -> bytes:
        if form == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener()
        options = {key: value() if callable(value) else value for key, value in given.items()}
        return _encoded(_plain(mode, _size(each, share)), form, **options)

    image("read")(lambda build=_build: build(UNDER), f"image_{_name}")
    image("refused")(lambda build=_build: build(OVER), f"image_{_name}_over")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, before: bytes = b"") -> bytes:
    rows = zlib.compress((b"\0" + bytes(3 * width)) * height, 1)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + before + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


@image("read")
def image_jpeg_48_megapixels_rotated() -> bytes:
    return _encoded(_plain("RGB", (8000, 6000)), "JPEG", exif=_rotated())


@image("read")
def image_jpeg_178_megapixels_rotated() -> bytes:
    return _encoded(_plain("RGB", (16000, 11180)), "JPEG", exif=_rotated())


@image("read")
def image_jpeg_of_50_scans() -> bytes:
    """The largest progressive one that is decoded, with its last scan repeated."""
    data = _encoded(_plain("RGB", _size(7, UNDER)), "JPEG", progressive=True, subsampling=0)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (50 - data.count(b"\xff\xda")) + data[-2:]


@image("refused")
def image_jpeg_of_exif_segments() -> bytes:
    """4,096 segments of EXIF, which Pillow appends to each other."""
    data = _encoded(_plain("RGB", (64, 64)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + b"Exif\0\0" + bytes(65527)
    return data[:2] + segment * 4095 + data[2:]


@image("read")
def image_png_of_noise() -> bytes:
    """Three bytes of file for each pixel."""
    import numpy as np
    from PIL import Image

    width, height = _size(7.05, UNDER)
    noise = np.random.default_rng(0).integers(0, 256, (100, width, 3), dtype=np.uint8)
    return _encoded(Image.fromarray(np.concatenate([noise] * (height // 100))), "PNG", compress_level=0)


@image("refused")
def image_png_of_noise_at_the_cap() -> bytes:
    """A file of 256 MiB."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (100, 8000, 3), dtype=np.uint8)
    return _encoded(Image.fromarray(np.concatenate([noise] * 111)), "PNG", compress_level=0)


@image("read")
def image_png_of_one_row() -> bytes:
    return _png(_size(20, UNDER, 1)[1], 1)


@image("read")
def image_png_of_384_columns() -> bytes:
    """A long strip, which scorers of whole images get reduced."""
    return _png(384, 250_000)


@image("refused")
def image_png_of_small_chunks() -> bytes:
    """22 million empty chunks."""
    return _png(64, 64, _chunk(b"abCd", b"") * (256 * MIB // 12 - 1000))


@image("refused")
def image_jpeg_of_small_segments() -> bytes:
    """8 million empty comments."""
    with io.BytesIO() as file:
        Image.new("RGB", (64, 64)).save(file, "JPEG")
        whole = file.getvalue()
    return whole[:2] + b"\xff\xfe\x00\x02" * (31 * MIB // 4) + whole[2:]


@image("refused")
def image_jpeg_of_hidden_segments() -> bytes:
    """4 million empty segments behind second starts with false lengths, in the largest file that is sent to a worker."""
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG")
    hidden = b"\xff\xef\0\2" * 16_000  # the length is no marker
    return whole[:2] + (b"\xff\xd8" + struct.pack(">H", 2 + len(hidden)) + hidden) * 262 + whole[2:]


@image("refused")
def image_jpeg_of_fill_bytes() -> bytes:
    """31 MiB between two segments."""
    whole = _encoded(_plain("RGB", (64, 64)), "JPEG")
    return whole[:2] + b"\xff" * (31 * MIB) + whole[2:]


@image("refused")
def image_png_of_text() -> bytes:
    """Compressed texts of 1 MiB each."""
    return _png(64, 64, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB - 1))) * 1000)


@image("refused")
def image_png_of_profiles() -> bytes:
    """30,000 ICC profiles of a mebibyte, compressed to a kilobyte each."""
    whole = _encoded(_plain("RGB", (64, 64)), "PNG")
    body = b"iCCPx\0\0" + zlib.compress(bytes(MIB - 1), 9)
    return (
        whole[:33]
        + (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))) * 30_000
        + whole[33:]
    )


@image("refused")
def image_ppm_of_a_long_header() -> bytes:
    """A comment of 200 MiB, which Pillow reads byte by byte."""
    return b"P6\n" + b"#" * (200 * MIB) + b"\n64 64 255\n" + bytes(3 * 64 * 64)


@image("refused")
def image_ppm_of_comments() -> bytes:
    """4 million comments between numbers as text, each of which copies a mebibyte."""
    return b"P3 64 64 255\n" + b"#\n" * 2**22 + b"1 " * (3 * 64 * 64)


@image("read")
def image_tiff_of_tags_over_its_end() -> bytes:
    """60,000 tags, for each of which Pillow warns twice."""
    whole = _encoded(_plain("RGB", (64, 64)), "TIFF")
    (at,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, at)
    entries = whole[at + 2 : at + 2 + 12 * count] + b"".join(
        struct.pack("<HHII", 1000 + i, 1, 2**31, 0) for i in range(60_000)
    )
    head = whole[:4] + struct.pack("<I", len(whole)) + whole[8:]
    return head + struct.pack("<H", count + 60_000) + entries + bytes(4)


@image("refused")
def image_bmp_of_short_runs() -> bytes:
    """Runs of one pixel, which Pillow decodes in Python."""
    width, height = 8000, 8500
    pixels = b"\1\1" * (width * height)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 1, 1, 256, 256)
    return (
        b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(pixels), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + pixels
    )


@image("refused")
def image_gif_of_small_blocks() -> bytes:
    """50 million comments of one letter."""
    data = _encoded(_plain("P", (64, 64)), "GIF")
    picture = data.index(b"\x2c", 13)
    return data[:picture] + b"\x21\xfe\1a\0" * (250 * MIB // 5) + data[picture:]


@image("refused")
def image_tiff_of_strips() -> bytes:
    """10 million strips of one pixel."""
    count = 10_000_000
    values = {256: 1, 257: count, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 0}
    lists = 8 + 2 + 12 * len(values) + 4
    directory = struct.pack("<H", len(values))
    for tag, value in values.items():
        long = (count, lists + 4 * count * (tag == 279)) if tag in (273, 279) else (1, value)
        directory += struct.pack("<HHII", tag, 4, *long)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + struct.pack("<I", 8) * count + b"\1\0\0\0" * count


@image("refused")
def image_png_of_exif() -> bytes:
    """EXIF of 100 MiB."""
    exif = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 7, 100 * MIB, 26, 0) + bytes(100 * MIB)
    return _png(64, 64, _chunk(b"eXIf", exif))


def decode(folder: str) -> tuple[float, float, str, str]:
    """(MiB over the baseline, of this process or its worker; seconds; "read" or "refused"; the result as text)."""
    from tasks.curation.scoring.decode_memory import WORKER_BYTES
    from tasks.curation.scoring.workers import CrashError, Workers

    baseline, begun = _peak_kib(), _cpu_s()
    data = (Path(folder) / "x").read_bytes()
    with Workers(_both, 1, memory_bytes=WORKER_BYTES) as workers:
        ((_, result),) = workers.map([(0, data)])
    seconds, own = _cpu_s() - begun, (_peak_kib() - baseline) / 1024
    if isinstance(result, CrashError):
        return own, seconds, "refused", f"{result} (the worker's memory is not known; it is limited)"
    memory, ended, text = result
    return max(own, memory), seconds, ended, text


def _both(data: bytes) -> tuple[float, str, str]:
    """In the worker: (MiB over its baseline, "read" or "refused", the result as text)."""
    from tasks.curation.config import CurationConfig, FilterConfig
    from tasks.curation.scoring import decoding
    from tasks.curation.scoring.score import measure

    baseline = _rss_kib() - len(data) // 1024  # the file counts, too
    config = CurationConfig(filters=FilterConfig(formats=decoding.DECODABLE, max_pixels=MAX_PIXELS))
    try:
        measured = measure(data, config)
        columns, shown = measured.columns, len(measured.image)
        del measured
        if "error" in columns:
            return (_peak_kib() - baseline) / 1024, "refused", f"{columns['error_rule']}: {columns['error']}"
        whole = decoding.decode(data, MAX_PIXELS)
        text = f"{columns['width']}x{columns['height']} {columns['mode']}, whole as {whole.width}x{whole.height}"
        return (_peak_kib() - baseline) / 1024, "read", f"{text}; {shown:,} bytes for scorers"
    except MemoryError:
        return (_peak_kib() - baseline) / 1024, "refused", "over the worker's limit of memory"


def _cpu_s() -> float:
    """Of this process and its workers that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _peak_kib() -> int:
    return _status_kib("VmHWM")


def _rss_kib() -> int:
    return _status_kib("VmRSS")
