"""What a benchmark and a judge offer: generating, judging and scoring know nothing else of them.

    benchmark.prompts -> images --judge.answer(benchmark.questions)--> answers --benchmark.score--> a float per image

A prompt is a mapping with "prompt" (its text) and "category" (or GenEval's "tag"); "id" (else derived from category and
text), "split" ("seen" or "held_out", which is scored apart) and "images" (how many a run makes of it) are optional.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from eval.config import EvalConfig

Prompt = Mapping[str, Any]
Request = tuple[Image.Image, str]  # (image, question)


@dataclass(frozen=True)
class Verdict:
    """Score of one image, in [0, 1], and why it is not 1."""

    score: float
    reason: str = ""


class Benchmark(Protocol):
    """A set of prompts, what is asked about their images, and what the answers are worth.

    pooling: how prompts make the overall score: the plain mean of "categories", or of "prompts".
    layout: of the official code: "folders" (GenEval) or "grids" (DPG-Bench, OneIG-Bench).
    scale: what official tables multiply a share by: 1 or 100.
    official_judges: names; a score by other judges has their names in brackets.
    default_judge: what judges it where a recipe names none; None: a recipe must.
    """

    name: str
    pooling: Literal["categories", "prompts"]
    layout: Literal["folders", "grids"]
    scale: float
    official_judges: Sequence[str]
    default_judge: str | None

    def prompts(self, config: EvalConfig) -> list[dict[str, Any]]:
        """All prompts, in the official order.

        Raises:
            ValueError: a prompt file is needed, or is not one.
        """

    def questions(self, prompt: Prompt) -> list[str]:
        """What a judge is asked about each image of a prompt."""

    def score(self, prompt: Prompt, answers: Mapping[str, Any]) -> Verdict:
        """From the answer to each of `questions`, one image's score."""

    def summarise(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
        """The official aggregate of scored rows: {"official": {"overall", "categories"}, "fixed": the same}, in the
        benchmark's own scale. Either may be left out: "fixed" where the official code has no bug, both where a benchmark
        has no official code."""


class Judge(Protocol):
    """A model, or a rule, that answers questions about images.

    spec: everything that may change an answer: class, repository at revision or file digest, dtype, attention, processor,
    decoding, library versions. revision: its digest.
    """

    name: str
    spec: Mapping[str, Any]
    revision: str

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        """One JSON-able answer to each request."""

    def selftest(self) -> None:
        """Answers known questions about made images.

        Raises:
            ValueError: an answer is not the recorded one.
        """


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def score_name(benchmark: Benchmark, judges: Iterable[str]) -> str:
    """`geneval` by official judges alone, else `geneval[judge+judge]`: the only name a score may have."""
    names = list(judges)
    if names and set(names) <= set(benchmark.official_judges):
        return benchmark.name
    return f"{benchmark.name}[{'+'.join(names) or 'no judge'}]"


def category_of(prompt: Prompt) -> str:
    return str(prompt.get("category", prompt.get("tag", "all")))


def with_ids(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The prompts, each with an "id" that neither its place in the list nor other prompts decide.

    Equal prompts are numbered: each must have noise of its own.

    Raises:
        ValueError: an explicit id comes twice, or has characters that no file name should have.
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
