"""An ablation: as `reproduce`, up to the scorecard. Nothing is published, because diffusers has no class for it.

    pyflyte run workflows/ablate.py ablate --recipe ablations/token_choice

    records -> curated -> components, latents and checkpoints of each stage -> merged -> scorecard

Records, components and latents equal those of the base recipe, and come from the cache if that recipe ran.
The reasons are in docs/decisions/ablations.md.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import workflow

from tasks.artifacts import MergedDir, ScorecardDir
from tasks.planning.task import resolve_recipe
from workflows.evaluate import score_merged
from workflows.pretrain import up_to_merged


class Ablation(NamedTuple):
    """The scorecard, and the weights that it scores."""

    scorecard: ScorecardDir
    merged: MergedDir


@workflow
def ablate(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> Ablation:
    """Curates, encodes, trains all stages, merges and evaluates one recipe.

    Args:
        recipe: name of a recipe in recipes/, such as ablations/token_choice, or the path of a YAML file.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's, as for `reproduce`.
    """
    sections = resolve_recipe(
        recipe=recipe, overrides=overrides, source=source, starts_from="source", ends_in="scorecard"
    )
    curated, trained = up_to_merged(sections)
    scorecard = score_merged(
        merged=trained.merged, components=trained.components, curated=curated, config=sections.eval
    )
    return Ablation(scorecard=scorecard, merged=trained.merged)
