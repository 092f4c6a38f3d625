"""A merged transformer to a scorecard."""

from __future__ import annotations

from functools import partial

from flytekit import map_task, workflow

from eval.config import EvalConfig
from tasks.artifacts import ComponentsDir, MergedDir, ScorecardDir
from tasks.evaluation.task import generate_images, score_images


@workflow
def evaluate(merged: MergedDir, components: ComponentsDir, config: EvalConfig, seeds: list[int]) -> ScorecardDir:
    """One map task over seeds generates, one task scores them together."""
    generate = partial(generate_images, merged=merged, components=components, config=config)
    return score_images(images=map_task(generate)(seed=seeds), config=config)
