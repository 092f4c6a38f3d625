"""Passes 1 and 2: statistics of one image. score.py fills the columns; rules.py decides on them.

`decode` is the one way in which this project turns bytes into pixels.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Raster formats that Pillow reads by itself (EPS, for one, would start Ghostscript). MPO comes in with JPEG.
DECODABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
RGB_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")  # I and F clip
GRAY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # by byte order
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
ANALYSIS_PX = 256  # longer side of what the statistics look at
NEAR_COLOR = 10  # of 255, per channel: one colour to the eye, through JPEG and faint noise
BAR_NOISE = 20  # of 255: JPEG rings on both sides of a bar's edge
EDGE_LINES = 3


class UndecodableError(ValueError):
    """The bytes are no whole image."""


class TooManyPixelsError(ValueError):
    """The header promises more pixels than may be decoded."""


@dataclass(frozen=True)
class Header:
    """What the header says; nothing is decoded. Width and height in px, after the EXIF orientation.

    `mode` is Pillow's, with L for 16-bit greyscale: deep pictures in colour count as RGB, too.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int  # EXIF, 1 (upright) to 8
    animated: bool


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def decodable() -> tuple[str, ...]:
    """`DECODABLE`, as far as this Pillow was built with it."""
    Image.init()
    return tuple(name for name in DECODABLE if name in Image.OPEN)


def _open(data: bytes) -> tuple[Image.Image, Header]:
    try:
        with warnings.catch_warnings():
            # Our own limit follows at once; Pillow's stays as the last resort (its error, at twice its limit).
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # odd EXIF, odd TIFF tags
            image = Image.open(io.BytesIO(data), formats=decodable())
            # A PNG may carry EXIF behind its pixels, and Pillow would decode them to find it.
            orientation = _orientation(image) if image.format != "PNG" or "exif" in image.info else 1
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from None
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise UndecodableError(_why_no_header(data, error)) from None
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    # Phones write a second picture behind the first (MPO); the first is a plain JPEG.
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    animated = kind != "JPEG" and bool(getattr(image, "is_animated", False))
    mode = "L" if _is_gray16(image) else image.mode
    return image, Header(kind, mode, width, height, orientation, animated)


def _orientation(image: Image.Image) -> int:
    try:
        value = int(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF does not make a broken image
        return 1
    return value if value in range(1, 9) else 1


def _is_gray16(image: Image.Image) -> bool:
    return image.mode in GRAY16_MODES or (image.format == "PPM" and image.mode == "I")  # PGM: scaled to 65535


def _gray8(image: Image.Image) -> Image.Image:
    """A 16-bit greyscale image with its whole range (TIFF's 12 bits: theirs) on 0 to 255; Pillow itself would clip.

    Returns:
        mode L, or LA where a PNG names a level that is transparent.
    """
    values, levels = np.asarray(image).astype(np.uint32), 2**16 - 1
    if image.format == "TIFF":
        levels = 2 ** image.tag_v2[BITS_PER_SAMPLE][0] - 1
        if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = levels - values
    gray = Image.fromarray(((values * 255 + levels // 2) // levels).astype(np.uint8))
    if "transparency" not in image.info:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.uint8(255) * (values != image.info["transparency"]))))


def _why_no_header(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of Git LFS instead of the image; fetch the images with git lfs pull"
    if data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page instead of the image"
    return f"no readable image header: {_plain(error)}"


def _plain(error: Exception) -> str:
    text = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the record", str(error))
    return f"{type(error).__name__}: {text}"[:200]


def inspect(data: bytes) -> Header:
    """Reads the header only: an orientation that stands behind the pixels (rare, in PNG) is not seen.

    Raises:
        UndecodableError: no image format of `DECODABLE`.
        TooManyPixelsError: beyond Pillow's own limit (about 179 million).
    """
    return _open(data)[1]


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The whole image: RGB, upright (EXIF orientation applied), transparency laid over white.

    The header's size is checked before a pixel is decoded. Half an image is refused, never padded.

    Raises:
        ValueError: `TooManyPixelsError` or `UndecodableError`.
    """
    return _decode(data, *_open(data), max_pixels)


def inspect_and_decode(
    data: bytes, max_pixels: int, formats: tuple[str, ...]
) -> tuple[Header, Image.Image | ValueError | None]:
    """Both, opening once: the header, and the image or what `decode` would raise. None where the format is not one of
    `formats`: what is rejected for its format is not decoded.

    Raises:
        ValueError: as `inspect`.
    """
    image, header = _open(data)
    if header.format not in formats:
        return header, None
    try:
        return header, _decode(data, image, header, max_pixels)
    except ValueError as error:
        return header, error


def _decode(data: bytes, image: Image.Image, header: Header, max_pixels: int) -> Image.Image:
    if header.width * header.height > max_pixels:
        raise TooManyPixelsError(f"{header.width}x{header.height} is over {max_pixels} pixels")
    if header.mode not in RGB_MODES:
        raise UndecodableError(f"mode {header.mode} has no plain RGB form; modes that have: {', '.join(RGB_MODES)}")
    if header.format == "JPEG":
        _check_jpeg(data)
    try:
        image.load()
        orientation = _orientation(image)
        if _is_gray16(image):
            image = _gray8(image)
        if image.has_transparency_data:
            over = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        image = image.convert("RGB")
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
    except Exception as error:
        raise UndecodableError(f"does not decode: {_plain(error)}") from None
    return image


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MARKER_OR_RESTART = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)


def _check_jpeg(data: bytes) -> None:
    """Walks a JPEG's markers to its end: libjpeg turns lost or overwritten scan data into gray, with a mere warning."""
    at, in_scan, restarts = 2, False, False
    while True:
        found = (_MARKER if restarts or not in_scan else _MARKER_OR_RESTART).search(data, at)
        if found is None:
            raise UndecodableError("truncated JPEG: no end-of-image marker")
        code, at = data[found.start() + 1], found.end()
        if code == 0xD9:
            if not in_scan:
                raise UndecodableError("corrupt JPEG: it ends before its first scan")
            return
        known = code in (0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, 0xCC) or 0xE0 <= code <= 0xEF
        if in_scan and not known:
            raise UndecodableError(f"corrupt JPEG: marker 0x{code:02x} inside scan data")
        if at + 2 > len(data):
            raise UndecodableError("truncated JPEG: it ends inside a segment")
        at += int.from_bytes(data[at : at + 2], "big")
        in_scan |= code == 0xDA
        restarts |= code == 0xDD


# --- statistics ------------------------------------------------------------------------------------------------


def reduced(image: Image.Image, max_side_px: int) -> Image.Image:
    """`image`, box-filtered down so that its longer side is at most `max_side_px`; small images as they are."""
    scale = max(image.size) / max_side_px
    if scale <= 1:
        return image
    size = tuple(max(1, round(side / scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def entropy_bits(gray: np.ndarray) -> float:
    """Shannon entropy of the 256-bin histogram of uint8 [H, W], bits: 0 (one level) to 8."""
    p = np.bincount(gray.ravel(), minlength=256) / gray.size
    p = p[p > 0]
    return max(0.0, float(-(p * np.log2(p)).sum()))


def single_color_fraction(pixels: np.ndarray) -> float:
    """The share of uint8 [H, W, 3] within `NEAR_COLOR` per channel of its commonest colour."""
    planes = np.ascontiguousarray(pixels.reshape(-1, 3).T)
    coarse = planes >> 4
    code = (coarse[0].astype(np.uint16) << 8) | (coarse[1].astype(np.uint16) << 4) | coarse[2]
    # The mean of the fullest cell, refined once: faint noise may straddle cells.
    near = _near(planes, _mean_color(planes, code == np.bincount(code, minlength=4096).argmax()))
    if near.any():
        near = _near(planes, _mean_color(planes, near))
    return float(np.count_nonzero(near) / near.size)


def _mean_color(planes: np.ndarray, where: np.ndarray) -> np.ndarray:
    count = np.count_nonzero(where)
    return np.array([plane[where].sum(dtype=np.int64) / count for plane in planes])


def _near(planes: np.ndarray, color: np.ndarray, within: int = NEAR_COLOR) -> np.ndarray:
    """Where uint8 [3, ...] is within so many levels of a colour, bool [...]."""
    low = np.clip(np.rint(color) - within, 0, 255).astype(np.uint8)
    high = np.clip(np.rint(color) + within, 0, 255).astype(np.uint8)
    near = (planes[0] >= low[0]) & (planes[0] <= high[0])
    for channel in (1, 2):
        near &= (planes[channel] >= low[channel]) & (planes[channel] <= high[channel])
    return near


def border_fraction(pixels: np.ndarray) -> float:
    """The area of bars (letterbox, frame) around the picture, as a share of uint8 [H, W, 3].

    A bar is of one colour, and ends on a straight edge that runs along the whole picture. So the plain background
    around an object is no bar; nor is that around one flat rectangle, which is an object too.
    """
    height, width = pixels.shape[:2]
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    if np.abs(corners[0] - corners).max() > NEAR_COLOR:
        # Bars on two opposite sides share their corners; bars of one side only are no letterbox.
        return 0.0
    picture = ~_near(np.moveaxis(pixels, -1, 0), corners.mean(axis=0), BAR_NOISE)
    if not picture.any():
        return 0.0  # one colour all over: the blank rule's business
    rows, columns = ((count >= 0.1 * count.max()).nonzero()[0] for count in (picture.sum(axis=1), picture.sum(axis=0)))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    margin = (top, width - right, height - bottom, left)  # in the order in which np.rot90 brings them to the top
    for k, bar in enumerate(margin):
        if bar and not _is_bar_edge(np.rot90(picture, k), np.rot90(pixels, k), bar, margin[k - 1], margin[k - 3]):
            return 0.0
    core = pixels[top + EDGE_LINES : bottom - EDGE_LINES, left + EDGE_LINES : right - EDGE_LINES]  # no soft edges
    if not any(margin) or not core.size or single_color_fraction(core) > 0.995:
        return 0.0
    return 1 - (bottom - top) * (right - left) / (height * width)


def _is_bar_edge(picture: np.ndarray, pixels: np.ndarray, bar: int, before: int, after: int) -> bool:
    """Whether the bar of `bar` lines at the top ends abruptly, along the whole picture under it.

    `before` and `after`: columns of bars to the left and right of the picture.
    """
    columns = slice(before, picture.shape[1] - after)
    # A dark picture touches its black bar here and there: a few lines together must cover the edge.
    if picture[bar : bar + EDGE_LINES, columns].any(axis=0).mean() < 0.96:
        return False
    across = pixels[max(0, bar - EDGE_LINES) : bar + EDGE_LINES, columns].astype(np.float32)
    across = np.abs(across - across[0].mean(axis=0)).mean(axis=(1, 2))  # unlike the bar, line by line
    return bool(np.abs(np.diff(across)).max(initial=0) >= 0.45 * np.ptp(across))
