"""Which captions of a record are kept: several, of several lengths."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import numpy as np

from tasks.curation.config import CaptionConfig

JOINERS = "\u200c\u200d"  # they change letters in Persian and Hindi, and make one emoji of several


def usable_captions(captions: Iterable[str] | None, config: CaptionConfig) -> list[str]:
    """Normalised (NFC, single spaces, no control characters but joiners), without empties and repeats, in order.

    Captions over `max_words` are dropped rather than cut: half a sentence may say something else.
    """
    seen: dict[str, str] = {}
    for caption in captions if captions is not None else ():
        if not isinstance(caption, str):
            continue
        text = unicodedata.normalize("NFC", caption)
        text = "".join(c if unicodedata.category(c)[0] != "C" or c.isspace() or c in JOINERS else "" for c in text)
        text = " ".join(text.split())
        if text and len(text.split()) <= config.max_words:
            seen.setdefault(text.casefold(), text)
    return list(seen.values())


def choose_captions(captions: list[str], tier: str, record_id: str, config: CaptionConfig) -> list[str]:
    """At most `per_tier[tier]` of the usable captions, shortest first, spread over the whole range of lengths.

    The shortest and the longest stay, the others at even ranks between them. Where only one may stay, the record's
    hash picks it, so that the corpus as a whole still has every length.
    """
    ranked = sorted(captions, key=lambda text: (len(text.split()), len(text), text))
    limit = config.per_tier[tier]
    if len(ranked) <= limit:
        return ranked
    if limit == 1:
        return [ranked[int(record_id[16:24], 16) % len(ranked)]]
    ranks = np.rint(np.linspace(0, len(ranked) - 1, limit)).astype(int)
    return [ranked[i] for i in ranks]
