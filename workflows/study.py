"""Compares recipes over training seeds, in one workflow.

    pyflyte run workflows/study.py study --recipe tiny --variants ablations/token_choice,ablations/coupled_routing \\
        --seeds 0,1,2

    every variant x seed: records -> ... -> merged -> scorecard -> summary -----------+--> study

Finished runs come from the cache: an interrupted study continues, and studies share runs.
The reasons are in docs/decisions/workflows.md.
"""

from __future__ import annotations

from typing import Union

from flytekit import dynamic, workflow

from tasks import envs
from tasks.artifacts import StudyDir
from tasks.planning.task import resolve_recipe
from tasks.study.config import StudyRun
from tasks.study.task import compare_runs, describe_run, plan_study
from workflows.evaluate import score_merged
from workflows.pretrain import up_to_merged


@dynamic(**envs.dynamic())
def run_study(runs: list[StudyRun], source: str) -> StudyDir:
    """Trains and scores every run (in a local run one after another), and compares them."""
    described: list[str] = []
    for run in runs:
        sections = resolve_recipe(
            recipe=run.recipe,
            overrides=list(run.overrides),
            source=source,
            starts_from="source",
            ends_in="scorecard",
        )
        curated, trained = up_to_merged(sections)
        scorecard = score_merged(
            merged=trained.merged, components=trained.components, curated=curated, config=sections.eval
        )
        described.append(
            describe_run(
                run=run,
                recipe_json=sections.recipe_json,
                checkpoints=trained.checkpoints,
                merged=trained.merged,
                latents=trained.latents,
                texts=trained.texts,
                scorecard=scorecard,
            )
        )
    return compare_runs(runs=described)


@workflow
def study(
    recipe: str, variants: str, seeds: str = "0,1,2", overrides: Union[list[str], str] = [], source: str = ""
) -> StudyDir:
    """Compares variants of a recipe with it, paired by training seed.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file: the base of the comparison.
        variants: recipes to compare, separated by commas, each with optional changes after a colon:
            ablations/token_choice,tiny:merge.last_n=1. May be empty: then the recipe alone is measured.
        seeds: training seeds, separated by commas; three or more give useful intervals.
        overrides: a change of every run such as train.stages[2].steps=1800, or a JSON list of them. May be given several
            times.
        source: your own images instead of the recipes', as for `reproduce`.
    """
    runs = plan_study(recipe=recipe, variants=variants, seeds=seeds, overrides=overrides)
    return run_study(runs=runs, source=source)
