"""A merged transformer to a scorecard.

    pyflyte run workflows/evaluate.py evaluate --recipe tiny \\
        --merged .nucleus/artifacts/merged/DIGEST --components .nucleus/artifacts/components/DIGEST
"""

from __future__ import annotations

from functools import partial
from typing import Union

from flytekit import map_task, workflow

from eval.config import EvalConfig
from tasks.artifacts import ComponentsDir, MergedDir, ScorecardDir
from tasks.evaluation.task import generate_images, score_images
from tasks.planning.task import resolve_recipe


@workflow
def score_merged(merged: MergedDir, components: ComponentsDir, config: EvalConfig, seeds: list[int]) -> ScorecardDir:
    """A map task over seeds generates images, one task scores them together. A part of other workflows."""
    generate = partial(generate_images, merged=merged, components=components, config=config)
    return score_images(images=map_task(generate)(seed=seeds), config=config)


@workflow
def evaluate(
    recipe: str, merged: MergedDir, components: ComponentsDir, overrides: Union[list[str], str] = []
) -> ScorecardDir:
    """Scores a transformer as the recipe's eval section says.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        merged: a sealed directory of kind merged.
        components: a sealed directory of kind components: those that the transformer was trained with.
        overrides: a change such as eval.guidance_scale=3, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source="", starts_from="merged", ends_in="scorecard")
    return score_merged(merged=merged, components=components, config=sections.eval, seeds=sections.seeds)
