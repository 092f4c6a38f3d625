"""From the bytes of an image to its pixels, for curation and encoding alike: within limits, upright, in sRGB.

The header is looked at before anything is decoded: its format, its size, and a JPEG's markers to their end. A caller that
needs few pixels gets a JPEG at a half, a quarter or an eighth of its size for a fraction of the time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageCms

# Raster formats that Pillow reads without other programs (EPS, for one, would start Ghostscript), and HEIF by pillow-heif where that is
# installed. MPO comes in with JPEG.
DECODABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
FIRST_OF_SEVERAL = ("JPEG", "HEIF")  # phones write depth maps and bursts behind the picture; they are no animations
RGB_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")  # I and F clip
GRAY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # by byte order
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
MAX_SCANS = 50  # of a JPEG; each costs a pass over all pixels. Encoders write up to 18
MAX_PROFILE_BYTES = 4 * 2**20  # of an ICC profile; those of printers have 3 MiB
SAME_COLOR = 2  # of 255: a profile that moves no colour further is sRGB


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
    """`DECODABLE`, as far as this installation reads it."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
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
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            animated = kind not in FIRST_OF_SEVERAL and bool(getattr(image, "is_animated", False))
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from None
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise UndecodableError(_why_no_header(data, error)) from None
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
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
    if "transparency" in image.info:
        gray = Image.merge("LA", (gray, Image.fromarray(np.uint8(255) * (values != image.info["transparency"]))))
    gray.info["icc_profile"] = image.info.get("icc_profile")
    return gray


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


def decode(data: bytes, max_pixels: int, min_side_px: int | None = None) -> Image.Image:
    """The whole image: RGB, upright (EXIF orientation applied), in sRGB, transparency laid over white. Of an animation the
    first frame.

    The header's size is checked before a pixel is decoded. Half an image is refused, never padded.

    Args:
        max_pixels: of width x height.
        min_side_px: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps
            so many pixels; None decodes it whole.

    Raises:
        ValueError: `TooManyPixelsError` or `UndecodableError`.
    """
    return _decode(data, *_open(data), max_pixels, min_side_px)[1]


def inspect_and_decode(
    data: bytes, max_pixels: int, formats: tuple[str, ...], min_side_px: int | None = None
) -> tuple[Header, Image.Image | ValueError | None]:
    """Both, opening once: the header, and the image or what `decode` would raise. None where the format is not one of
    `formats`: images of other formats are rejected without decoding.

    The header's width and height are those of the whole image, whatever it was decoded at.

    Raises:
        ValueError: as `inspect`.
    """
    image, header = _open(data)
    if header.format not in formats:
        return header, None
    try:
        return _decode(data, image, header, max_pixels, min_side_px)
    except ValueError as error:
        return header, error


def _decode(
    data: bytes, image: Image.Image, header: Header, max_pixels: int, min_side_px: int | None
) -> tuple[Header, Image.Image]:
    if header.width * header.height > max_pixels:
        raise TooManyPixelsError(f"{header.width}x{header.height} is over {max_pixels} pixels")
    if header.mode not in RGB_MODES:
        raise UndecodableError(f"mode {header.mode} has no plain RGB form; modes that have: {', '.join(RGB_MODES)}")
    if header.format == "JPEG":
        _check_jpeg(data)
        if min_side_px is not None:
            image.draft(None, (min_side_px, min_side_px))  # libjpeg scales while it transforms
    try:
        image.load()
        orientation = _orientation(image)
        if _is_gray16(image):
            image = _gray8(image)
        image = _in_srgb(image)
        if image.has_transparency_data:
            over = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        image = image.convert("RGB")
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
    except Exception as error:
        raise UndecodableError(f"does not decode: {_plain(error)}") from None
    if (orientation >= 5) != (header.orientation >= 5):  # it stood behind the pixels
        header = replace(header, width=header.height, height=header.width)
    return replace(header, orientation=orientation), image


# --- colour ----------------------------------------------------------------------------------------------------


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image with its ICC profile applied. Without one, or with one that cannot be used, its values are sRGB's."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 128 < len(profile) <= MAX_PROFILE_BYTES:
        return image
    space, alpha = profile[16:20], image.has_transparency_data
    if space == b"RGB " and image.mode != "CMYK":
        image = image.convert("RGBA" if alpha else "RGB")
    elif space == b"GRAY" and image.mode in ("1", "L", "LA"):
        image = image.convert("LA" if alpha else "L")
    elif space != b"CMYK" or image.mode != "CMYK":
        return image
    transform = _to_srgb(profile, image.mode.removesuffix("A") if image.mode == "LA" else image.mode)
    if transform is None:
        return image
    if image.mode != "LA":
        return transform.apply(image)
    color = transform.apply(image.getchannel("L")).convert("RGBA")
    color.putalpha(image.getchannel("A"))
    return color


@functools.lru_cache(maxsize=16)  # pictures of one camera share a profile; each may have 4 MiB
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """A transform of mode L, RGB, RGBA or CMYK to RGB (RGBA). None where it would change no colour that the eye sees, or
    where the profile is broken, which does not make a broken image."""
    out = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, out)
        levels = np.linspace(0, 255, 18, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
        probe = Image.fromarray(cube).convert(mode)
        if mode == "CMYK":
            return transform
        moved = np.asarray(transform.apply(probe).convert("RGB"), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    except Exception:  # ImageCms raises nearly anything on hostile bytes
        return None
    return None if np.abs(moved).max() <= SAME_COLOR else transform


# --- JPEG ------------------------------------------------------------------------------------------------------


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MARKER_OR_RESTART = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)


def _check_jpeg(data: bytes) -> None:
    """Walks a JPEG's markers to its end: libjpeg turns lost or overwritten scan data into gray, with a mere warning, and
    reads any number of scans."""
    at, in_scan, restarts, scans = 2, False, False, 0
    while True:
        match = (_MARKER if restarts or not in_scan else _MARKER_OR_RESTART).search(data, at)
        if match is None:
            raise UndecodableError("truncated JPEG: no end-of-image marker")
        code, at = data[match.start() + 1], match.end()
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
        scans += code == 0xDA
        if scans > MAX_SCANS:
            raise UndecodableError(f"a JPEG of more than {MAX_SCANS} scans, each of which takes a pass over all pixels")
        restarts |= code == 0xDD
