"""The two modes of a rule: as the official code computes it, or without its bugs."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["official", "fixed"]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_mode(mode: str) -> None:
    """
    Raises:
        ValueError: there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be 'official' or 'fixed'")
