"""Checks whether answers of a captioner are captions: complete, in the language, of the wanted length, no refusal or
loop."""

from __future__ import annotations

import functools
import re
from collections import Counter

from tasks.curation.captioning.base import Answer
from tasks.curation.captions import clean_captions, count_words, tokens
from tasks.curation.config import LengthConfig

OK, REJECTED = "ok", "rejected"
# Every other status of an answer; all but `rejected` are asked again.
REFUSED, TRUNCATED, REPETITIVE, LANGUAGE, TOO_SHORT, TOO_LONG, EMPTY = (
    "refused",
    "truncated",
    "repetitive",
    "language",
    "too_short",
    "too_long",
    "empty",
)
STATUSES = (OK, REFUSED, TRUNCATED, REPETITIVE, LANGUAGE, TOO_SHORT, TOO_LONG, EMPTY, REJECTED)

_REFUSAL = re.compile(
    r"^\W*(?:"
    r"(?:i['\u2019]?m|i am|we['\u2019]re|we are)\s+(?:so |very |really )?(?:sorry|afraid|unable|not able)\b"
    r"|(?:sorry|apologies)\b|i apologi[sz]e\b|unfortunately\b.{0,20}\bi\b"
    r"|i (?:can['\u2019]?t|cannot|can not|won['\u2019]?t|will not|do not|don['\u2019]?t|am not)\b"
    r"|as an? (?:ai|artificial|language|large)\b"
    r"|抱歉|对不起|很抱歉|我无法|我不能|申し訳|すみません"
    r")"
    r"|\b(?:can['\u2019]?t|cannot|unable to|not able to) (?:assist|help|comply|fulfil+|provide|process|view|see)\b"
    r".{0,40}\b(?:request|image|picture|photo|that|this|it)\b",
    re.IGNORECASE | re.DOTALL,
)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course)?[,!.\s]*(?:here(?:'s| is| are) (?:a|an|the|your)\b[^:\n]{0,60}:|"
    r"(?:caption|description|answer)\s*:)\s*",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("“", "”"), ("'", "'"), ("「", "」"), ("*", "*"))
GRAM, MIN_TOKENS = 4, 16  # length of the token runs that are checked for repetition, and minimum tokens of an answer
MAX_REPEATED_SHARE = 0.3  # share of runs that occurred before; prose about one image stays under 0.1
MAX_IN_A_ROW = 3  # consecutive repeats of the same one to eight tokens, such as "very very very"
LANGUAGE_MIN_WORDS = 5
LANGUAGE_MARGIN = 10.0  # minimum lead of another language's log-likelihood


def clean(text: str) -> str:
    """The caption in an answer: without preamble, quotes and line breaks."""
    text = _PREAMBLE.sub("", text.strip()).strip()
    for first, last in _QUOTES:
        if len(text) > 2 and text.startswith(first) and text.endswith(last) and text.count(first) <= 2:
            text = text.strip(first + last)
    cleaned = clean_captions([text])
    return cleaned[0] if cleaned else ""


def judge(answer: Answer, length: LengthConfig, language: str | None) -> tuple[str, str]:
    """(the cleaned caption, its status): `OK`, or the first reason why it is not kept."""
    text = clean(answer.text)
    if answer.finish_reason == "rejected":
        return text, REJECTED
    if answer.finish_reason == "content_filter" or _REFUSAL.search(text):
        return text, REFUSED
    if is_repetitive(text):  # before truncation, which usually ends a loop
        return text, REPETITIVE
    if answer.finish_reason == "length":
        return text, TRUNCATED
    if not tokens(text):
        return text, EMPTY
    words = count_words(text)
    if words < length.min_words:
        return text, TOO_SHORT
    if words > length.max_words:
        return text, TOO_LONG
    if language is not None and words >= LANGUAGE_MIN_WORDS and not is_language(text, language):
        return text, LANGUAGE
    return text, OK


def is_repetitive(text: str) -> bool:
    """Whether a text loops: the same few tokens in a row, or many repeated runs."""
    parts = [part.casefold() for part in tokens(text)]
    for size in range(1, 9):
        same = 0  # consecutive tokens that equal the one `size` before
        for i in range(size, len(parts)):
            same = same + 1 if parts[i] == parts[i - size] else 0
            if same >= size * MAX_IN_A_ROW:
                return True
    if len(parts) < MIN_TOKENS:
        return False
    runs = Counter(tuple(parts[i : i + GRAM]) for i in range(len(parts) - GRAM + 1))
    return sum(count - 1 for count in runs.values()) > MAX_REPEATED_SHARE * runs.total()


def is_language(text: str, language: str) -> bool:
    """Whether a text may be in the language: no other language is much more likely (py3langid)."""
    ranked = _rank()(text)
    scores = dict(ranked)
    if language not in scores:
        return True
    return ranked[0][1] - scores[language] <= LANGUAGE_MARGIN


@functools.cache
def _rank():
    from py3langid import rank

    return rank


def check_language(language: str | None) -> None:
    """
    Raises:
        ValueError: py3langid does not know the language.
    """
    if language is None:
        return
    known = {name for name, _ in _rank()("a caption")}
    if language not in known:
        raise ValueError(f"curation.captioner.language={language!r} is not one of {', '.join(sorted(known))}")
