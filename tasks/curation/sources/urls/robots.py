"""Rules of a site: robots.txt (RFC 9309, by protego) and the X-Robots-Tag of an answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protego import Protego

MAX_ROBOTS_BYTES = 500 * 2**10  # RFC 9309: the minimum to read
MATCH_S = 10.0  # processor time for all URLs of a site
OWN, OTHERS = "own", "others"
_USER_AGENT = ("user-agent", "useragent", "user agent")
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"\s*([\w.*-]+)\s*:(.*)", re.DOTALL)


class Rules:
    """The robots.txt of a site, for one agent.

    allowed: a constant answer without a file: True if the site has none, False if it cannot be read.
    size: characters that are parsed, which take about 50 times as many bytes of memory.
    """

    def __init__(self, agent: str, text: str | None = None, allowed: bool = True) -> None:
        self._allowed = allowed
        self._file: Protego | None = None
        self._left_s = MATCH_S
        self.size = 0
        if text is not None:
            from protego import Protego

            own = _of_agent(text, agent)
            self.size = len(own)
            self._file = Protego.parse(own)

    def allows(self, url: str) -> bool:
        """Whether the agent may fetch a URL. A (hostile) file that takes too long to match forbids it."""
        if self._file is None:
            return self._allowed
        if self.took_too_long:
            return False
        begun = time.thread_time()
        allowed = bool(self._file.can_fetch(url, OWN))
        self._left_s -= time.thread_time() - begun
        return allowed

    @property
    def took_too_long(self) -> bool:
        return self._left_s <= 0

    def delay_s(self) -> float:
        """Seconds between requests that the site requests (Crawl-delay)."""
        delay = None if self._file is None else self._file.crawl_delay(OWN)
        return float(delay or 0.0)


def _of_agent(text: str, agent: str) -> str:
    """Reduces the file to two groups: the agent's, named `OWN`, and all others as one.

    Protego copies each rule to each agent of its group: of 500 KiB, half agents and half rules, it would make 10^8
    rules.
    """
    lines = text.splitlines()
    named = [_agent_of(line) for line in lines]
    names = (name for one in named if one for name in (one, one.replace("*", "")))
    best = max(names, key=lambda name: _fits(name, agent), default="")
    is_known = _fits(best, agent) > 0
    for at, one in enumerate(named):
        if one:
            is_own = is_known and best in (one, one.replace("*", "") or one)
            lines[at] = f"User-agent: {OWN if is_own else OTHERS}"
    return "\n".join(lines)


def _agent_of(line: str) -> str | None:
    """The agent, in lower case, that a line of robots.txt names, as Protego reads it; None for other lines."""
    line = line.partition("#")[0].strip()
    field, colon, value = line.partition(":")
    if colon and field.strip().lower() in _USER_AGENT:
        return value.strip().lower()
    if colon and (not value or value[0].isspace()):
        return None
    words = line.split()
    for count in (1, 2):
        if " ".join(words[:count]).lower() in _USER_AGENT:
            return " ".join(words[count:]).lower()
    return None


def _fits(name: str, agent: str) -> int:
    """How specifically a name in robots.txt matches the agent: its length if a word of the agent begins with it, 1 for
    *, else 0."""
    if name == "*":
        return 1
    text, at = agent.strip().lower(), -1
    while name and (at := text.find(name, at + 1)) >= 0:
        if at == 0 or not (text[at - 1].isalnum() or text[at - 1] in "-_"):
            return len(name)
    return 0


def forbidden_by_tag(values: Iterable[str], directives: Sequence[str], agent: str) -> str:
    """The directive of X-Robots-Tag headers that forbids an image's use, "" if none does.

    A header may begin with an agent (`otherbot: noindex`) and then applies to that agent only.
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
