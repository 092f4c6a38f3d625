"""The types of answers (eval.benchmarks.base.AnswerType), checked before an answer is kept and before it is scored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from eval.benchmarks.base import AnswerType, Benchmark, Question

SHOWN = 60  # characters of an answer in a message


def _is_text(answer: Any, question: Question) -> bool:
    return isinstance(answer, str)


def _are_texts(answer: Any, question: Question) -> bool:
    return (
        isinstance(answer, (list, tuple))
        and len(answer) == len(question.options["boxes"])
        and all(isinstance(text, str) for text in answer)
    )


def _is_number(answer: Any, question: Question) -> bool:
    return isinstance(answer, (int, float)) and not isinstance(answer, bool) and abs(answer) <= sys.float_info.max


def _are_numbers(answer: Any, question: Question) -> bool:
    return isinstance(answer, (list, tuple)) and all(_is_number(value, question) for value in answer)


def _are_objects(answer: Any, question: Question) -> bool:
    return isinstance(answer, Mapping) and all(
        isinstance(name, str) and isinstance(found, (list, tuple)) and all(map(_is_detection, found))
        for name, found in answer.items()
    )


def _is_detection(value: Any) -> bool:
    box = value.get("box") if isinstance(value, Mapping) else value
    return isinstance(box, (list, tuple)) and len(box) in (4, 5) and all(isinstance(x, (int, float)) for x in box)


CHECKS: dict[AnswerType, tuple[Callable[[Any, Question], bool], str]] = {
    "text": (_is_text, "text"),
    "texts": (_are_texts, "a list of one text for each box"),
    "number": (_is_number, "a finite number"),
    "numbers": (_are_numbers, "a list of finite numbers"),
    "objects": (_are_objects, '{class: [{"box": [x0, y0, x1, y1], "score"}, ...]}'),
}


def wrong_type(benchmark: Benchmark, question: Question, answer: Any) -> str | None:
    """Why an answer is not of the type that the benchmark's rule reads; None if it is."""
    kind = benchmark.answer_types.get(question.judge)
    if kind is None:
        return None
    check, wanted = CHECKS[kind]
    if check(answer, question):
        return None
    return f"answer {shortened(answer)} to a question of {question.judge} must be {wanted}"


def shortened(answer: Any) -> str:
    """The beginning of an answer, for a message."""
    try:
        text = json.dumps(answer, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(answer)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
