"""The memory that decoding an image takes, from its header: what takes more than `MAX_BYTES` is refused before it is decoded.

    file, once or twice | pixels as Pillow stores them | what the format's decoder has besides | RGB pixels, if converted

The numbers of bytes were measured with Pillow 13.0 and pillow-heif 1.8 (benchmarks/curation/hostile.py, kinds
image_*). What no header says, such as frames of an AVIF that are decoded and never shown, ends at the limit of a worker
process (workers.py).
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import ImageFile

MIB = 2**20
MAX_BYTES = 480 * MIB  # of one image
WORKER_BYTES = 512 * MIB  # that a worker process may take for it, with the pipe and statistics
OWN_BYTES = 8 * MIB  # libraries' tables, and the strip that is being converted
SCALES = (1, 2, 4, 8)  # at which libjpeg decodes
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # bytes a pixel; 4 in other modes
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, YCBCR = 258, 262, 274, 6  # of TIFF
RGB = 4  # bytes a pixel: Pillow pads RGB
ROWS = 16  # bytes for each pixel of a row, of decoders that keep two rows of up to 8 bytes a pixel


class Need(NamedTuple):
    """Bytes besides the pixels. pixel: for each of them, while it decodes. kept: of those, what stays as long as the image.
    file: multiple of the file's size. whole: of a JPEG, whatever size it is decoded at."""

    pixel: float
    kept: float = 0
    file: int = 1
    whole: int = 0


# Of HEIF, by chroma sampling, alpha, and more than 8 bits: measured with 12 megapixels (pillow-heif 1.8), and half a byte more.
HEIF_PIXEL = {
    ("4:2:0", False, False): 4.0,
    ("4:2:0", True, False): 5.0,
    ("4:2:0", False, True): 4.5,
    ("4:2:0", True, True): 9.0,
    ("other", False, False): 6.0,
    ("other", True, False): 9.0,
    ("other", False, True): 12.0,
    ("other", True, True): 17.0,
}
WEBP = Need(12, kept=8, file=2)  # two canvases and a copy of the frame, RGBA each


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas, by the file's first 30 bytes; None if it is no WebP."""
    head = data[:30]
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    match head[12:16]:
        case b"VP8 ":
            return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


def webp_needed(width: int, height: int, num_bytes: int) -> int:
    """At least, in bytes: Pillow reserves memory for the pixels when it opens a WebP."""
    return round(OWN_BYTES + WEBP.file * num_bytes + width * height * (WEBP.pixel + RGB))


def scaled(size: tuple[int, int], scale: int) -> tuple[int, int]:
    """The size of a JPEG that libjpeg decodes at 1 / scale."""
    return -(-size[0] // scale), -(-size[1] // scale)


def needed(
    image: ImageFile.ImageFile, form: str, num_bytes: int, converts: bool, scale: int = 1, buffered: bool = False
) -> int:
    """The peak of memory in bytes, the file included.

    Args:
        image: opened; its size is that of the header.
        form: its format, of `decoding.DECODABLE`.
        num_bytes: of the file.
        converts: the pixels are written to a second image, as RGB.
        scale: of a JPEG; see `SCALES`.
        buffered: a JPEG whose coefficients are all in memory before a pixel is made (see `decoding._fit_memory`).
    """
    need = _need(image, form, buffered)
    width, height = scaled(image.size, scale)
    stored = STORED.get(image.mode, 4)
    decoding = need.whole + width * height * (need.pixel + stored)
    converting = width * height * (need.kept + stored + RGB) if converts else 0
    return round(OWN_BYTES + need.file * num_bytes + max(decoding, converting) + ROWS * width)


def _need(image: ImageFile.ImageFile, form: str, buffered: bool) -> Need:
    bands = len(image.getbands())
    codec = image.tile[0].codec_name if image.tile else "raw"  # none: it is decoded
    match form:
        case "JPEG":
            return Need(0, whole=_coefficients(image) if buffered else 0)
        case "WEBP":
            return WEBP
        case "AVIF":  # up to 8 bytes of YUV and alpha; a copy of the frame
            return Need(8 + bands, kept=8, file=2)
        case "HEIF":
            deep = image.info.get("bit_depth", 8) > 8
            chroma = "4:2:0" if image.info.get("chroma") == 420 else "other"
            return Need(HEIF_PIXEL[chroma, bands > 3, deep], kept=3.5 if deep and chroma == "other" else 1, file=2)
        case "JPEG2000":  # 32 bits for each sample, and a tile, which may be the whole image
            return Need(6 * bands + 1)
        case "TIFF":
            tags, copy = image.tag_v2, STORED.get(image.mode, 4)  # type: ignore[attr-defined]
            # A strip, which may be the whole image. libtiff converts YCbCr in another copy, Pillow turns the image in one.
            strip = 0 if codec == "raw" else sum(tags.get(BITS_PER_SAMPLE, (8,) * bands)) / 8
            converted = copy if codec != "raw" and tags.get(PHOTOMETRIC) == YCBCR else 0
            return Need(strip + converted + (copy if tags.get(ORIENTATION, 1) > 1 else 0))
        case "BMP" | "PPM" if codec != "raw":  # decoders in Python: a bytearray that grows, and its copy
            return Need(2.25 * bands * (4 if image.mode == "I" else 1))
    return Need(0)


def _coefficients(image: ImageFile.ImageFile) -> int:
    """Bytes of a JPEG's DCT coefficients: 16 bits for each sample, of whole blocks of all components."""
    layers = image.layer  # type: ignore[attr-defined]  # (id, horizontal and vertical sampling, table) of each component
    wide, high = max(1, *(layer[1] for layer in layers)), max(1, *(layer[2] for layer in layers))
    blocks = -(-image.width // (8 * wide)) * -(-image.height // (8 * high))
    return 2 * 64 * blocks * sum(layer[1] * layer[2] for layer in layers)
