"""The typed and versioned schema of scorecard.json.

Scores are in [0, 1]; official tables of the benchmark multiply them by `scale`. Nothing here depends on time or on file
locations: the same images and answers give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.benchmarks.base import Pooling
from eval.judging.protocols import digest_of

SCHEMA_VERSION = 2
FILE = "scorecard.json"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Noise(Section):
    """Standard errors by source; None if not measured.

    sampling: other noise on the same prompts. prompts: other prompts of the same kind. training: standard deviation
        over models of other training seeds, including the machine's part; needs several models.
    """

    sampling: float | None
    prompts: float | None
    training: float | None = None
    training_runs: int = 0


class Score(Section):
    """A mean with its interval over prompts; `std`, `runs`, `seeds` and `values` are over sampling seeds."""

    mean: float
    interval: tuple[float, float]
    standard_error: float
    std: float | None
    runs: int
    seeds: list[int]
    values: list[float]
    noise: Noise
    prompts: int
    images: int


class CategoryScore(Score):
    official: float | None = None  # in the benchmark's own scale
    fixed: float | None = None


class Scores(Section):
    """Scores of one split."""

    overall: CategoryScore
    tasks: dict[str, CategoryScore]  # by category; GenEval's name for categories
    image_accuracy: float  # share of images with score 1
    prompt_accuracy: float  # share of prompts with such an image


class Counts(Section):
    expected: int
    generated: int
    scored: int
    failed: int  # missing, unreadable or black

    @property
    def not_judged(self) -> int:
        """Images that are there, and of whose score no judge was named."""
        return max(0, self.expected - self.scored - self.failed)


class FlowLoss(Section):
    """Mean squared error of the predicted velocity of held-out real images; 0 is the image, 1 is noise."""

    timestep: float
    loss: float
    standard_error: float | None  # over prompts
    prompts: int


class JudgeRecord(Section):
    role: str  # the skill, under the name that stored scorecards have
    name: str
    model: str
    revision: str
    spec: dict[str, Any]
    official: bool | None  # None: the benchmark names no official model


class Settings(Section):
    """Everything known to affect a score."""

    judges: list[JudgeRecord]
    pipeline: str
    denoiser: str
    dtype: str
    attention: str
    device: str
    sampler: str
    sampler_config: dict[str, Any]
    steps: int
    guidance_scale: float
    negative_prompt: str
    prompt_rewriting: dict[str, Any] | None
    image_size_px: int
    seeds: list[int]
    images_per_prompt: int
    batch_size: int
    prompt_set: Literal["official", "development"]
    prompt_set_sha256: str
    model_digests: dict[str, str]
    images_sha256: str
    versions: dict[str, str]


class Comparison(Section):
    """Our score, as the official code computes it, and a published one. within_noise: our interval contains the
    published figure; None: not comparable, or no interval is known."""

    model: str
    category: str
    published: float
    ours: float | None
    source: str
    within_noise: bool | None


class Interval(Section):
    method: str = "Wilson with cluster-adjusted effective sample size; categories combined by MOVER"
    level: float = 0.95
    over: str = "prompts, within their category"


class Scorecard(Section):
    """schema_version 2. `name` is `benchmark`, or `benchmark[judge]` if a judge is not official."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    benchmark: str
    version: str
    scale: float
    pooling: Pooling
    overall: CategoryScore
    tasks: dict[str, CategoryScore]
    image_accuracy: float
    prompt_accuracy: float
    held_out: Scores | None
    official: dict[str, Any] | None
    fixed: dict[str, Any] | None
    missing_tasks: list[str]
    counts: Counts
    deviations: list[str]
    seeds: list[int]
    interval: Interval
    settings: Settings
    references: list[Comparison]
    measures: dict[str, float] = {}  # numbers that are not in [0, 1]; means over the sampling seeds
    flow_loss: list[FlowLoss] = []
    config: dict[str, Any]
    generation: dict[str, Any]


def dumps(card: Scorecard) -> str:
    return json.dumps(card.model_dump(mode="json"), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def load(path: str | Path) -> Scorecard:
    """A scorecard from its file, or from the directory that has it.

    Raises:
        ValueError: no such file, or not a scorecard of this schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise ValueError(f"{path} is not a scorecard")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a scorecard: {error}") from error
    version = content.get("schema_version") if isinstance(content, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {version}, and this version reads schema {SCHEMA_VERSION}: score its images again with "
            "python -m eval.cli score"
        )
    try:
        return Scorecard.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path} is not a scorecard: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def scored_by(card: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal for two scorecards (as JSON) to be compared: the score's name and rule, prompts and judges."""
    return {
        "score": card["name"],
        "rule": card["version"],
        "prompts": card["settings"]["prompt_set_sha256"][:12],
        **{f"judge_{j['role']}": f"{j['name']} at {j['revision'][:12]}" for j in card["settings"]["judges"]},
    }


def not_comparable(a: Scorecard, b: Scorecard) -> str | None:
    """Why two scores cannot be compared; None if they can (`scored_by`)."""
    if a.benchmark != b.benchmark:
        return f"one is {a.name}, the other {b.name}"
    if a.version != b.version:
        return f"one was scored by {a.version}, the other by {b.version}"
    if a.settings.prompt_set_sha256 != b.settings.prompt_set_sha256:
        return "they are of different prompts"
    if _judges(a) == _judges(b):
        return None
    one, other = (
        ", ".join(f"{name} at {revision[:12]} ({skill})" for skill, name, revision in _judges(card)) for card in (a, b)
    )
    return f"one was judged by {one}, the other by {other}"


def comparison_key(card: Scorecard) -> str:
    """Digest that two cards share if, and only if, they can be compared."""
    return digest_of([card.benchmark, card.version, card.settings.prompt_set_sha256, _judges(card)])


def _judges(card: Scorecard) -> list[tuple[str, str, str]]:
    return sorted((judge.role, judge.name, judge.revision) for judge in card.settings.judges)


def model_index(card: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The Hub's `model-index` entry of a scorecard (as JSON): its scores under their full name, as the official
    code computes them where it is known."""

    def plain(text: Any) -> str:  # in the header of a Markdown file: must not contain markup
        return re.sub(r"[^\w\[\]+,.: -]", "", str(text))

    scale = card.get("scale", 1.0)
    rows = {"overall": card["overall"], **card["tasks"]}
    metrics = [
        {"type": "score", "name": plain(f"{card['name']}, {name}"), "value": round(value, 4)}
        for name, value in (
            (name, scale * score["mean"] if score.get("official") is None else score["official"])
            for name, score in rows.items()
        )
    ]
    dataset = {"type": plain(card["benchmark"]), "name": plain(card["name"])}
    results = [{"task": {"type": "text-to-image"}, "dataset": dataset, "metrics": metrics}]
    return {"name": plain(title), "results": results}
