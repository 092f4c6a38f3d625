"""Names that users give: hints where they mistype them, and commits in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(name: str) -> str | None:
    """COMMIT of NAME@COMMIT; None if what is after the first @ is anything else, such as a directory."""
    at = name.partition("@")[2]
    return at if COMMIT.fullmatch(at) else None


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most similar to `name`; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def hint(name: str, valid: Iterable[str]) -> str:
    """For an error about an unknown name: the closest valid name, or else all of them."""
    valid = list(valid)
    near = closest(name, valid)
    return f"did you mean {near!r}?" if near else f"use one of {', '.join(valid)}"
