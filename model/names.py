"""Hints for names that users mistype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most similar to `name`; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def hint(name: str, valid: Iterable[str]) -> str:
    """For an error about an unknown name: the closest valid name, or else all of them."""
    valid = list(valid)
    near = closest(name, valid)
    return f"did you mean {near!r}?" if near else f"use one of {', '.join(valid)}"
