"""The interface of judges, and the names of prompts and scores.

    benchmark.prompts -> images --judge.answer(benchmark.questions)--> answers --benchmark.score--> a float per image

Benchmarks are eval.benchmarks.base.Benchmark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from eval.benchmarks.base import Benchmark, Prompt, Question


@dataclass(frozen=True)
class Request:
    """A question about one image, or about all images of a prompt (eval.benchmarks.base.Question)."""

    images: Sequence[Image.Image]
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """A model, or a rule, that answers questions about images.

    model: description of the model, as in `Benchmark.judges`: a score is official if both are equal.
    spec: everything that may change an answer: class, repository at revision or file digest, dtype, attention, processor,
    decoding, library versions. revision: its digest.
    """

    name: str
    model: str
    spec: Mapping[str, Any]
    revision: str

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """One JSON value per request."""

    def selftest(self) -> None:
        """Answers known questions about made images.

        Raises:
            ValueError: an answer is not the recorded one.
        """


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def question_key(question: Question) -> str:
    """The question's key in the journal of answers."""
    if not question.options and not question.together:
        return f"{question.judge}: {question.text}"
    rest = json.dumps(dict(question.options), sort_keys=True, ensure_ascii=True)
    return f"{question.judge}{' of all' if question.together else ''}: {question.text} {rest}"


def score_name(benchmark: Benchmark, judges: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a score: `geneval` if all judges are official, else `geneval[judge+judge]`.

    Args:
        judges: {skill: {"name", "model"}} for each skill of `benchmark.judges`.
    """
    if all(skill in judges and judges[skill]["model"] == model for skill, model in benchmark.judges.items()):
        return benchmark.name
    names = dict.fromkeys(judge["name"] for judge in judges.values())
    return f"{benchmark.name}[{'+'.join(names) or 'no judge'}]"


def category_of(prompt: Prompt) -> str:
    return str(prompt.get("tag", "all"))


def with_ids(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The prompts, each with an "id" that does not depend on its position or on other prompts.

    Equal prompts are numbered, so that each has different noise.

    Raises:
        ValueError: an explicit id is repeated, or has characters that are not allowed in file names.
    """
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        explicit = "id" in prompt
        name = str(prompt["id"]) if explicit else digest_of([category_of(prompt), prompt["prompt"]])[:16]
        if not name or name.startswith(".") or any(c in name for c in "/\\\0") or len(name) > 128:
            raise ValueError(f"prompt id {name!r} must be a plain name of at most 128 characters")
        count = seen[name] = seen.get(name, 0) + 1
        if count > 1 and explicit:
            raise ValueError(f"two prompts have the id {name!r}")
        result.append({**prompt, "id": name if count == 1 else f"{name}-{count}"})
    return result
