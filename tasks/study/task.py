"""Tasks of a study: plan its runs, describe each, compare them."""

from __future__ import annotations

import json
from typing import Union

from flytekit import Deck, task

from tasks import envs
from tasks.artifacts import (
    CheckpointsDir,
    LatentsDir,
    MergedDir,
    ScorecardDir,
    StudyDir,
    TextsDir,
    fetch,
    is_local,
    plain_errors,
    produce,
)
from tasks.manifest import Parent
from tasks.planning.sections import check_ranks, check_workflow
from tasks.recipe import Recipe, load_recipe
from tasks.study.config import StudyRun, plan_runs


@task(**envs.planner())
def plan_study(recipe: str, variants: str, seeds: str, overrides: Union[list[str], str]) -> list[StudyRun]:
    """Plans every variant with every training seed. Checks all of them before any work."""
    with plain_errors():
        runs = plan_runs(recipe, variants, seeds, [overrides] if isinstance(overrides, str) else overrides)
        for run in runs:
            loaded = load_recipe(run.recipe, run.overrides)
            check_workflow(loaded, "scorecard")
            check_ranks(loaded.train, envs.TRAIN_NNODES, envs.TRAIN_NPROC, is_local())
    return runs


@task(cache=envs.cache("study"), **envs.gpu_single("evaluator"))
def describe_run(
    run: StudyRun,
    recipe_json: str,
    checkpoints: list[CheckpointsDir],
    merged: MergedDir,
    latents: LatentsDir,
    texts: TextsDir,
    scorecard: ScorecardDir,
) -> str:
    """The numbers of one run that a study compares, as JSON."""
    from tasks.encoding.open_latents import open_latents
    from tasks.study import measure

    described = measure.describe_run(
        run,
        Recipe.model_validate_json(recipe_json),
        [fetch(stage, "checkpoints", without=(".distcp",)) for stage in checkpoints],
        fetch(merged, "merged"),
        open_latents(fetch(latents, "latents"), fetch(texts, "texts")),
        fetch(scorecard, "scorecard"),
    )
    return json.dumps(described)


@task(cache=envs.cache("study"), enable_deck=True, **envs.light("evaluator"))
def compare_runs(runs: list[str]) -> StudyDir:
    """Compares the runs of `describe_run`: tables, intervals, plots, one page."""
    from tasks.study import report

    described = [json.loads(run) for run in runs]
    with plain_errors():
        artifact, final, _ = produce(
            "study",
            lambda out: report.write_study(described, out),
            parents=[
                Parent(**parent) for run in described for parent in run["parents"] if parent["kind"] == "scorecard"
            ],
            config={"runs": [{"variant": run["variant"], "seed": run["seed"]} for run in described]},
            logs=report.LOGS,
        )
    print((final / "study.md").read_text(), flush=True)
    print(f"study  {final / 'study.html'}", flush=True)
    Deck("Study", (final / "study.html").read_text())
    return artifact
