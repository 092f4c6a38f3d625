"""Sources of made records, by name. `source.made` of a recipe sets the number of records of each.

The module of a source has one function:

    record(config, index) -> Made      record `index`, from 0; a function of (config.seed, index) alone

and may set COUNT, the maximum number of records.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

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
    """The module of a source."""
    return importlib.import_module(SOURCES[name])
