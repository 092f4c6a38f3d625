"""What a site allows: robots.txt (RFC 9309, by protego) and the X-Robots-Tag of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protego import Protego

MAX_ROBOTS_BYTES = 500 * 2**10  # RFC 9309: at least so much is read
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"\s*([\w.*-]+)\s*:(.*)", re.DOTALL)


class Rules:
    """The robots.txt of a site, for one agent.

    allowed: a constant answer where there is no file to ask: True if the site has none, False if it cannot be read.
    """

    def __init__(self, agent: str, text: str | None = None, allowed: bool = True) -> None:
        self._agent, self._allowed = agent, allowed
        self._file: Protego | None = None
        if text is not None:
            from protego import Protego

            self._file = Protego.parse(text)

    def allows(self, url: str) -> bool:
        return self._allowed if self._file is None else bool(self._file.can_fetch(url, self._agent))

    def delay_s(self) -> float:
        """Seconds between requests that the site asks for (Crawl-delay)."""
        delay = None if self._file is None else self._file.crawl_delay(self._agent)
        return float(delay or 0.0)


def forbidden_by_tag(values: Iterable[str], directives: Sequence[str], agent: str) -> str:
    """The directive of X-Robots-Tag headers that forbids an image's use, "" if none does.

    A header may begin with an agent (`otherbot: noindex`); it is for that agent alone.
    """
    wanted = {name.casefold() for name in directives}
    for value in values:
        named = _AGENT.match(value)
        if named and named[1].casefold() not in _WITH_VALUE:
            if named[1].casefold() not in ("*", agent.partition("/")[0].casefold()):
                continue
            value = named[2]
        for part in value.split(","):
            name = part.partition(":")[0].strip().casefold()
            if name in wanted:
                return name
    return ""
