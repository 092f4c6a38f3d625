"""Chooses which captions of a record are kept: several, of several lengths."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tasks.curation.config import CaptionConfig

# Characters that show nothing, dropped: the direction of writing, byte order marks, spaces without width. Joiners (U+200C and
# U+200D), which change letters in Persian and Hindi and join emoji, are kept, as are characters that Python does not know yet.
INVISIBLE = frozenset("\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
LETTERS_PER_WORD = 3  # average, for scripts without spaces and ideographs, such as Thai


def clean_captions(captions: Iterable[str] | None) -> list[str]:
    """Normalised (NFC, single spaces, without control and invisible characters), without empties and repeats, in order."""
    seen: dict[str, str] = {}
    for caption in captions if captions is not None else ():
        if not isinstance(caption, str):
            continue
        text = unicodedata.normalize("NFC", caption)
        text = " ".join("".join(c for c in text if not _is_dropped(c)).split())
        if text:
            seen.setdefault(text.casefold(), text)
    return list(seen.values())


def _is_dropped(character: str) -> bool:
    control = unicodedata.category(character) in ("Cc", "Cs") and not character.isspace()
    return control or character in INVISIBLE


def merge_captions(own: Sequence[str], extra: Sequence[str], config: CaptionConfig) -> list[str]:
    """The captions of a record and of its exact duplicates that are short enough, without repeats. Longer ones are dropped,
    not cut: half a sentence may mean something else."""
    usable = [text for text in own if count_words(text) <= config.max_words]
    return [text for text in clean_captions([*usable, *extra]) if count_words(text) <= config.max_words]


def count_words(text: str) -> int:
    """Number of words of a clean caption, also in languages without spaces.

    An ideograph or a kana counts as a word, as do `LETTERS_PER_WORD` letters of Thai, Lao, Khmer, Burmese and Tibetan.
    """
    if text.isascii():
        return len(text.split())
    ideographs, letters = _scripts()
    count = 0
    for token in text.split():
        single, rest = len(ideographs.findall(token)), ideographs.sub("", token)
        run = len(letters.findall(rest))
        other = letters.sub("", rest)
        count += single + math.ceil(run / LETTERS_PER_WORD)
        if not (single or run) or any(c.isalnum() for c in other):
            count += 1
    return count


def tokens(text: str) -> list[str]:
    """The words of a text in order, each ideograph and kana as a separate word, without punctuation."""
    import regex

    single = r"[[\p{Han}\p{Hiragana}\p{Katakana}]&&\p{L}]"
    return regex.findall(rf"(?V1){single}|[[\p{{L}}\p{{M}}\p{{N}}'\u2019]--{single}]+", text)


@functools.cache
def _scripts() -> tuple[Any, Any]:
    import regex

    return (
        regex.compile(r"(?V1)[[\p{Han}\p{Hiragana}\p{Katakana}]&&\p{L}]"),
        regex.compile(r"(?V1)[[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]&&\p{L}]"),
    )


def choose_captions(captions: Sequence[str], tier: str, record_id: str, config: CaptionConfig) -> list[str]:
    """At most `per_tier[tier]` of the usable captions, shortest first, spread over the whole range of lengths.

    Keeps the shortest, the longest, and others at even ranks between. If only one is kept, the record's hash chooses
    it, so that the whole corpus still has every length.
    """
    ranked = sorted(captions, key=lambda text: (count_words(text), len(text), text))
    limit = config.per_tier[tier]
    if len(ranked) <= limit:
        return ranked
    if limit == 1:
        return [ranked[int(record_id[16:24], 16) % len(ranked)]]
    ranks = np.rint(np.linspace(0, len(ranked) - 1, limit)).astype(int)
    return [ranked[i] for i in ranks]
