"""An ablation: as `reproduce`, until the scorecard. Nothing is published, as diffusers has no class for it.

    pyflyte run workflows/ablate.py ablate --recipe ablations/token_choice

    records -> curated -> components, latents x3 -> checkpoints x3 -> merged -> scorecard

Records, components and latents are those of the recipe that it overlays, and come from the cache where that ran.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import workflow

import workflows.command_line  # noqa: F401  (it makes --overrides repeatable)
from tasks.artifacts import MergedDir, ScorecardDir
from tasks.planning.task import resolve_recipe
from workflows.evaluate import evaluate
from workflows.pretrain import up_to_merged


class Ablation(NamedTuple):
    """What an ablation leaves behind."""

    scorecard: ScorecardDir
    merged: MergedDir


@workflow
def ablate(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> Ablation:
    """Curates, encodes, trains three stages, merges and evaluates one recipe.

    Args:
        recipe: name of a recipe in recipes/, such as ablations/token_choice, or the path of a YAML file.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's, as for `reproduce`.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source=source, ends_in="scorecard")
    _, trained = up_to_merged(sections)
    scorecard = evaluate(
        merged=trained.merged, components=trained.components, config=sections.eval, seeds=sections.seeds
    )
    return Ablation(scorecard=scorecard, merged=trained.merged)
