"""Chooses which captions of a record are kept: several, of several lengths."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tasks.curation.config import CaptionConfig

JOINERS = "\u200c\u200d"  # joiners: they change letters in Persian and Hindi, and join emoji
LETTERS_PER_WORD = 3  # average, for scripts without spaces and ideographs, such as Thai


def clean_captions(captions: Iterable[str] | None) -> list[str]:
    """Normalised (NFC, single spaces, no control characters but joiners), without empties and repeats, in order."""
    seen: dict[str, str] = {}
    for caption in captions if captions is not None else ():
        if not isinstance(caption, str):
            continue
        text = unicodedata.normalize("NFC", caption)
        text = "".join(c if unicodedata.category(c)[0] != "C" or c.isspace() or c in JOINERS else "" for c in text)
        text = " ".join(text.split())
        if text:
            seen.setdefault(text.casefold(), text)
    return list(seen.values())


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
