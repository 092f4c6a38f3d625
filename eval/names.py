"""Hints for names that users mistype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: str, valid: Iterable[str]) -> str:
    """ "did you mean 'NAME'? " with the most similar valid name; "" if none is similar."""
    near = difflib.get_close_matches(name.lower(), list(valid), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
