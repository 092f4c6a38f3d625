"""Checks, before any work, that a local run can write its directories."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_directories(home: Path, cache: Path) -> None:
    """
    Args:
        home: of artifacts.
        cache: Flyte's local cache, which is needed unless FLYTE_LOCAL_CACHE_ENABLED is false.

    Raises:
        ValueError: one cannot be made or written; the message names the variable that changes it.
    """
    check_home(home)
    if is_cache_enabled():
        _check_writable(
            cache.expanduser(),
            f"HOME={os.environ.get('HOME', '')}: Flyte's local cache {cache} cannot be written",
            "set FLYTE_LOCAL_CACHE_ENABLED=false to run without a cache, or set HOME",
        )


def is_cache_enabled() -> bool:
    """Whether local runs use Flyte's cache."""
    return os.environ.get("FLYTE_LOCAL_CACHE_ENABLED", "true").lower() not in ("false", "0")


def check_home(home: Path) -> None:
    """
    Raises:
        ValueError: it cannot be made or written; the message names NUCLEUS_HOME.
    """
    _check_writable(home, f"NUCLEUS_HOME={home}: artifacts cannot be written there", "set NUCLEUS_HOME")


def _check_writable(directory: Path, message: str, remedy: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{message} ({error.strerror}); {remedy} to a directory that can be written") from error
