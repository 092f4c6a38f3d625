"""From the bytes of an image to its pixels, for curation and encoding alike: within limits, upright, in sRGB.

The header is looked at before anything is decoded: its format, its size, the memory that decoding would take, and a JPEG's
markers to their end. A caller that needs few pixels gets a JPEG at a half, a quarter or an eighth of its size for a fraction
of the time. Pixels are converted in strips, so that no more than two images of the whole size are in memory.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import AvifImagePlugin, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from tasks.curation.scoring import blocks, decode_memory
from tasks.curation.scoring.blocks import UndecodableError
from tasks.curation.scoring.decode_memory import BITS_PER_SAMPLE, MIB, PHOTOMETRIC, SCALES

# Raster formats that Pillow reads without other programs (EPS, for one, would start Ghostscript), and HEIF by pillow-heif where that is
# installed. MPO comes in with JPEG.
DECODABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
FIRST_OF_SEVERAL = ("JPEG", "HEIF")  # phones write depth maps and bursts behind the picture; they are no animations
RGB_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")  # I and F clip
GRAY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # by byte order
WHITE_IS_ZERO = 0  # of TIFF's photometric tag
# By the names and numbers of TIFF. libtiff takes damaged rows for white and prints a line for each of them to stderr.
FAX = {2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 32771: "CCITT RLE by words"}
LARGE_PROFILE_BYTES = 2**16  # of an ICC profile; those of cameras and displays have less
MAX_PROFILE_BYTES = 4 * 2**20  # of an ICC profile; those of printers have 3 MiB
SAME_COLOR = 2  # of 255: a profile that moves no colour further is sRGB
STRIP_PIXELS = 2**18  # converted at once: a megabyte for each copy, which stays in the processor's cache


class TooManyPixelsError(ValueError):
    """The header promises more pixels than may be decoded, or pixels that take more memory than an image may."""


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


_IGNORED: tuple = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # an entry of warnings.filters
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
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a file is in its record
    # Workers and threads decode an image each; threads of their own would cost a stack and a frame each.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(decode_threads=1)
    return tuple(name for name in DECODABLE if name in Image.OPEN)


def _ignore_warnings() -> None:
    """Ignores Pillow's warnings in the whole process, unless they are ignored already: of odd EXIF and TIFF tags there may be
    tens of thousands for one file, whenever it is read. Encoding decodes in threads, where `catch_warnings` is not safe.

    Its warning of many pixels is one of them: our own limit holds, and Pillow's error, at twice its limit, is the last resort.
    """
    if _IGNORED not in warnings.filters:  # not yet, or `catch_warnings` has removed it
        action, _, category, module, _ = _IGNORED
        warnings.filterwarnings(action, category=category, module=module.pattern)


def _open(data: bytes) -> tuple[ImageFile.ImageFile, Header]:
    _check_webp(data)
    blocks.check(data)
    _ignore_warnings()
    try:
        image = Image.open(io.BytesIO(data), formats=decodable())
        # A PNG may carry EXIF behind its pixels, and Pillow would decode them to find it. A TIFF has its upright size
        # already, and Pillow turns its pixels when it loads them.
        known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        orientation = _orientation(image) if known else 1
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        animated = kind not in FIRST_OF_SEVERAL and bool(getattr(image, "is_animated", False))
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from None
    except (MemoryError, UndecodableError):  # the former of a worker's limit
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile bytes
        raise UndecodableError(_why_no_header(data, error)) from None
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    mode = "L" if _is_gray16(image) else image.mode
    return image, Header(kind, mode, width, height, orientation, animated)


def _orientation(image: Image.Image) -> int:
    exif = len(image.info.get("exif") or b"")
    if exif > blocks.MAX_METADATA_BYTES:  # Pillow copies it several times
        raise UndecodableError(f"EXIF of {exif:,} bytes, over the limit of {blocks.MAX_METADATA_BYTES:,}")
    try:
        value = int(image.getexif().get(0x0112, 1))
    except MemoryError:
        raise
    except Exception:  # broken EXIF does not make a broken image
        return 1
    return value if value in range(1, 9) else 1


def _is_gray16(image: Image.Image) -> bool:
    return image.mode in GRAY16_MODES or (image.format == "PPM" and image.mode == "I")  # PGM: scaled to 65535


def _gray8(strip: Image.Image, levels: int, white_is_zero: bool) -> Image.Image:
    """A strip of a 16-bit greyscale image with its whole range on 0 to 255; Pillow itself would clip.

    Returns:
        mode L, or LA where a PNG names a level that is transparent.
    """
    values = np.asarray(strip).astype(np.uint32)
    if white_is_zero:
        values = levels - values
    gray = Image.fromarray(((values * 255 + levels // 2) // levels).astype(np.uint8))
    if "transparency" in strip.info:
        gray = Image.merge("LA", (gray, Image.fromarray(np.uint8(255) * (values != strip.info["transparency"]))))
    gray.info["icc_profile"] = strip.info.get("icc_profile")
    return gray


def _why_no_header(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of Git LFS instead of the image; fetch the images with git lfs pull"
    if data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page instead of the image"
    if isinstance(error, UnidentifiedImageError):
        return f"no image of a format that is read ({', '.join(decodable())})"
    return f"no readable image header: {_plain(error)}"


def _plain(error: Exception) -> str:
    text = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the record", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())}"[:200]


def inspect(data: bytes) -> Header:
    """Reads the header only: an orientation that stands behind the pixels (rare, in PNG) is not seen.

    Raises:
        UndecodableError: no image format of `DECODABLE`.
        TooManyPixelsError: beyond Pillow's own limit (about 179 million), or a WebP that takes too much memory.
    """
    return _open(data)[1]


def decode(data: bytes, max_pixels: int, min_side_px: int | None = None) -> Image.Image:
    """The whole image: RGB, upright (EXIF orientation applied), in sRGB, transparency laid over white. Of an animation the
    first frame.

    The header's size and the memory for it are checked before a pixel is decoded. Half an image is refused, never padded; but of
    a TIFF only what is cut off: where the data of a strip (deflate, JPEG) are damaged, libtiff fills its rows and reports nothing.

    Args:
        max_pixels: of width x height.
        min_side_px: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side keeps
            so many pixels; None decodes it whole, or at a half if it takes more than `decode_memory.MAX_BYTES` otherwise.

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
        return header, type(error)(*error.args)  # without its traceback, whose frames keep the pixels


def _decode(
    data: bytes, image: ImageFile.ImageFile, header: Header, max_pixels: int, min_side_px: int | None
) -> tuple[Header, Image.Image]:
    if header.width * header.height > max_pixels:
        raise TooManyPixelsError(f"{header.width}x{header.height} is over {max_pixels} pixels")
    if header.mode not in RGB_MODES:
        raise UndecodableError(f"mode {header.mode} has no plain RGB form; modes that have: {', '.join(RGB_MODES)}")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(blocks.COMPRESSION_TAG) in FAX:
        name = FAX[image.tag_v2[blocks.COMPRESSION_TAG]]
        raise UndecodableError(f"a TIFF with {name} compression, which hides damage; save it with LZW or deflate")
    try:
        _fit_memory(data, image, header, min_side_px)
        promised = image.size
        image.load()
        if image.size != promised:  # an HEIF has its size in two places
            raise UndecodableError(f"corrupt {header.format}: {promised[0]}x{promised[1]} by its header, {image.width}x{image.height} decoded")  # fmt: skip
        orientation = _orientation(image)
        upright: Image.Image = image
        if _converts(image, orientation):  # what stands behind the pixels of a PNG counts, too
            _check_memory(image, header, len(data), converts=True)
            upright = _converted(image, orientation)
    except (TooManyPixelsError, UndecodableError, MemoryError):
        raise
    except Exception as error:
        raise UndecodableError(f"does not decode: {_plain(error)}") from None
    if (orientation >= 5) != (header.orientation >= 5):  # it stood behind the pixels
        header = replace(header, width=header.height, height=header.width)
    return replace(header, orientation=orientation), upright


# --- memory ----------------------------------------------------------------------------------------------------


def _fit_memory(data: bytes, image: ImageFile.ImageFile, header: Header, min_side_px: int | None) -> None:
    """Has a JPEG decoded at the size that is needed, and at half its size if it takes too much memory otherwise.

    Raises:
        TooManyPixelsError: that is too much, too, or it is no JPEG. Which images are refused does not depend on
            `min_side_px`: encoding reads what scoring has read.
    """
    converts = _converts(image, header.orientation)
    if header.format != "JPEG":
        _check_memory(image, header, len(data), converts)
        return
    # libjpeg keeps the coefficients of an image of several scans in memory; one that lacks components has others behind it.
    several = blocks.check_jpeg(data) < len(image.layer) or bool(image.info.get("progressive"))  # type: ignore[attr-defined]
    scale = 1
    if min_side_px is not None:
        scale = max((one for one in SCALES if one <= min(image.size) // min_side_px), default=1)

    def needed(scale: int) -> int:
        return decode_memory.needed(image, "JPEG", len(data), converts, scale, several)

    if needed(1) > decode_memory.MAX_BYTES:
        _refuse_over(needed(2), header)
        scale = max(2, scale)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _check_memory(image: ImageFile.ImageFile, header: Header, num_bytes: int, converts: bool) -> None:
    if header.format != "JPEG":
        _refuse_over(decode_memory.needed(image, header.format, num_bytes, converts), header)


def _refuse_over(needed: int, header: Header) -> None:
    if needed > decode_memory.MAX_BYTES:
        raise TooManyPixelsError(
            f"{header.width}x{header.height} ({header.format}, {header.mode}) takes {needed // MIB:,} MiB to decode, "
            f"over the limit of {decode_memory.MAX_BYTES // MIB} MiB"
        )


def _check_webp(data: bytes) -> None:
    """Refuses a WebP before Pillow opens it and reserves memory for its pixels."""
    size = decode_memory.webp_size(data)
    if size:
        header = Header("WEBP", "RGB", *size, orientation=1, animated=False)
        _refuse_over(decode_memory.webp_needed(*size, len(data)), header)


def _converts(image: Image.Image, orientation: int) -> bool:
    """Whether an image has to be converted: it is not upright, or not RGB as in sRGB."""
    return image.mode != "RGB" or image.has_transparency_data or orientation in _TRANSPOSE or _moves_colors(image)


def _converted(image: Image.Image, orientation: int) -> Image.Image:
    """Upright RGB, made in strips; a small image is one, which saves copies."""
    gray16, levels, white_is_zero = _is_gray16(image), 2**16 - 1, False
    if not (gray16 or _profile(image) or image.has_transparency_data or orientation in _TRANSPOSE):
        return image.convert("RGB")  # in one step, without other copies
    if gray16 and isinstance(image, TiffImagePlugin.TiffImageFile):
        levels = 2 ** image.tag_v2[BITS_PER_SAMPLE][0] - 1
        white_is_zero = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    width, height = image.size

    def convert(strip: Image.Image) -> Image.Image:
        if gray16:
            strip = _gray8(strip, levels, white_is_zero)
        strip = _in_srgb(strip)
        if strip.has_transparency_data:
            over = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        strip = _as_mode(strip, "RGB")
        return strip.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else strip

    if width * height <= 2 * STRIP_PIXELS:
        return convert(image)
    upright = Image.new("RGB", (height, width) if orientation >= 5 else (width, height))
    across = min(width, STRIP_PIXELS)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        for left in range(0, width, across):
            box = (left, top, min(left + across, width), min(top + rows, height))
            upright.paste(convert(image.crop(box)), _place(box, (width, height), orientation))
    return upright


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's `convert` copies an image that has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _place(box: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Where the left upper corner of a transposed box is in the transposed image."""
    left, top, right, bottom = box
    x = size[0] - right if orientation in (2, 3, 7, 8) else left
    y = size[1] - bottom if orientation in (3, 4, 6, 7) else top
    return (y, x) if orientation >= 5 else (x, y)


# --- colour ----------------------------------------------------------------------------------------------------


def _profile(image: Image.Image) -> bytes | None:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and 128 < len(profile) <= MAX_PROFILE_BYTES else None


def _moves_colors(image: Image.Image) -> bool:
    """Whether the ICC profile of an RGB image changes its colours."""
    profile = _profile(image)
    return profile is not None and profile[16:20] == b"RGB " and _to_srgb(profile, "RGB") is not None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image with its ICC profile applied. Without one, or with one that cannot be used, its values are sRGB's."""
    profile = _profile(image)
    if profile is None:
        return image
    space, alpha = profile[16:20], image.has_transparency_data
    if space == b"RGB " and image.mode != "CMYK":
        image = _as_mode(image, "RGBA" if alpha else "RGB")
    elif space == b"GRAY" and image.mode in ("1", "L", "LA"):
        image = _as_mode(image, "LA" if alpha else "L")
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


def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    return (_of_large_profile if len(profile) > LARGE_PROFILE_BYTES else _of_profile)(profile, mode)


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
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
    except MemoryError:
        raise
    except Exception:  # ImageCms raises nearly anything on hostile bytes
        return None
    return None if np.abs(moved).max() <= SAME_COLOR else transform


# Pictures of one camera share a profile, as strips of a picture do.
_of_profile = functools.lru_cache(maxsize=16)(_transform)
_of_large_profile = functools.lru_cache(maxsize=1)(_transform)
