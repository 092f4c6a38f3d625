"""Sources of made records, by name. `source.made` of a recipe sets the number of records of each.

A source is a class of `DrawnSource`, or a module (digits.py is one), with a function

    record(config, index) -> Made      record `index`, from 0; a function of (config.seed, index) alone

and perhaps COUNT, the maximum number of records.
"""

from __future__ import annotations

import hashlib
import pkgutil
from typing import Any, NamedTuple

import numpy as np

from model.names import hint
from tasks.curation.config import SourceConfig

SOURCES = {"digits": "tasks.curation.sources.made.digits"}


class Made(NamedTuple):
    """One record. `key` has no dot: it names tar members."""

    key: str
    ext: str
    data: bytes
    captions: list[str]
    source: str


class DrawnSource:
    """Draws pictures with captions. A subclass has `draw`.

    name: of the source in `SOURCES`.
    """

    COUNT: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def draw(self, rng: np.random.Generator, size_px: int) -> tuple[np.ndarray, str]:
        """(uint8 [size_px, size_px, 3], its caption), all randomness from `rng`."""
        raise NotImplementedError

    def record(self, config: SourceConfig, index: int) -> Made:
        """The picture as a PNG; its random stream depends on the seed, the source's name and the index."""
        from PIL import Image

        from tasks.curation.sources.made.defects import encode

        stream = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        pixels, caption = self.draw(np.random.default_rng([config.seed, stream, index]), config.scene_size_px)
        return Made(f"{self.name}-{index:07d}", "png", encode(Image.fromarray(pixels), "png"), [caption], self.name)


def check_made(config: SourceConfig) -> None:
    """
    Raises:
        ValueError: an unknown name, or more records than a source has; names the setting.
    """
    if config.digits and "digits" in config.made:
        raise ValueError("source.digits and source.made.digits are one setting: use one of them")
    for name, count in counts(config).items():
        key = f"source.made.{name}" if name in config.made else f"source.{name}"
        if name not in SOURCES:
            raise ValueError(f"{key}={count} is unknown; {hint(name, SOURCES)}")
        most = getattr(load(name), "COUNT", None)
        if most is not None and count > most:
            raise ValueError(f"{key}={count}: there are {most} records; use 0 to {most}")


def counts(config: SourceConfig) -> dict[str, int]:
    """Name of each source of the recipe, except scenes -> number of its records, in the order of the corpus."""
    return ({"digits": config.digits} if config.digits else {}) | dict(sorted(config.made.items()))


def load(name: str) -> Any:
    """The module of a source, or an object of its class."""
    loaded = pkgutil.resolve_name(SOURCES[name])
    return loaded(name) if isinstance(loaded, type) else loaded
