"""Scores the newest published model at night if it changed: a drop beyond noise fails the execution, which notifies.

    newest model --digest--> known? nothing to do
                             else: a scorecard for each benchmark --> stored --> gate

The scorecards are stored before the gate, and compared with a reference of the same judges and prompts
(tasks/evaluation/history.py). Launch plan `evaluate-nightly`, inactive when it is registered:

    NUCLEUS_NIGHTLY_MODEL=s3://BUCKET/nucleus/pipeline NUCLEUS_NIGHTLY_BENCHMARKS=geneval,geneval2 NUCLEUS_NOTIFY=a@example.com \\
        python -m tools.register ...
    flytectl update launchplan evaluate-nightly --version VERSION --activate
"""

from __future__ import annotations

import os

from flytekit import CronSchedule, Email, LaunchPlan, WorkflowExecutionPhase, dynamic, workflow

from eval.config import EvalConfig
from tasks import envs
from tasks.evaluation.models import NEWEST, Model
from tasks.evaluation.task import find_changed, gate_scores, resolve_model, store_score
from tasks.planning.task import plan_benchmarks
from workflows.evaluate import score_model


@dynamic(**envs.dynamic("evaluator"))
def score_changed(source: str, model: Model, configs: list[EvalConfig], parts_per_seed: int) -> list[str]:
    """Scores and stores new models, then applies the gate."""
    if not configs:
        return []
    stored = []
    for config in configs:
        scorecard = score_model(model=model, digest=model.digest, config=config, parts_per_seed=parts_per_seed)
        stored.append(store_score(source=source, model=model, config=config, scorecard=scorecard))
    return gate_scores(stored=stored)


@workflow
def evaluate_nightly(
    model: str = NEWEST, benchmarks: str = "", recipe: str = "", judges: str = "", parts_per_seed: int = 1
) -> list[str]:
    """Scores the current version of `model`, unless it was scored already.

    Args:
        model: see workflows/evaluate.py; a Hub id without a commit, or an s3:// URI of a published pipeline, means the
            newest version.
        benchmarks: names, separated by commas; "": those with which the pipeline was published (of nucleus_17b: geneval and
            geneval2), or geneval,geneval2 where that is not known.
        recipe: its eval section has the settings; default: those of a published pipeline's scorecard.
        judges: see workflows/evaluate.py.
        parts_per_seed: number of map tasks that sample the images of one seed.
    """
    resolved = resolve_model(model=model, revision="", components="")
    configs = plan_benchmarks(model=resolved, benchmarks=benchmarks, recipe=recipe, overrides=[], judges=judges)
    changed = find_changed(source=model, model=resolved, configs=configs)
    return score_changed(source=model, model=resolved, configs=changed, parts_per_seed=parts_per_seed)


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"NUCLEUS_NIGHTLY_{name}", default)


def _plan() -> LaunchPlan:
    recipients = envs.recipients()
    ended_badly = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.TIMED_OUT]
    inputs = {
        "model": _setting("MODEL", NEWEST),
        "benchmarks": _setting("BENCHMARKS", ""),
        "judges": _setting("JUDGES", ""),
    }
    return LaunchPlan.get_or_create(
        evaluate_nightly,
        "evaluate-nightly",
        default_inputs=inputs,
        schedule=CronSchedule(schedule=_setting("CRON", "0 3 * * *")),
        max_parallelism=16,
        notifications=[Email(phases=ended_badly, recipients_email=recipients)] if recipients else None,
    )


# flytekit registers the launch plans that are attributes of a module; a schedule runs once its plan is activated.
NIGHTLY = _plan()
