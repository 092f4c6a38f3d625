"""Reading untrusted images: PNG only, and no more pixels than a benchmark needs."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

MAX_PIXELS = 64 << 20  # 8192 x 8192


def open_png(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a PNG, with Pillow's PNG reader only: others start programs such as Ghostscript.

    Raises:
        ValueError: not a PNG, truncated, or of more than `max_pixels` pixels.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=("PNG",)) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable image (PNG): {error}") from error
