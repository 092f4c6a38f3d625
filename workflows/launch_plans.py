"""Launch plans that users start by name, in the console or by `pyflyte run remote-launchplan NAME`.

A registration is for one shape of training: one process, or NODESxPROCESSES. Each has the plans that can run on it.

    reproduce-RECIPE, ablate-RECIPE, pretrain-RECIPE    a recipe that trains in one process; reproduce-tiny, for example
    pretrain-RECIPE-8x8, reproduce-RECIPE-8x8           a recipe that trains on the registered shape
    train, train-stage, pretrain, study                 with a recipe of your choice; train-8x8 and so on for a shape
    curate, encode, merge, evaluate, choose-candidate,  one step, with one process only: the shape does not matter
      publish
    evaluate-nightly                                    workflows/evaluate_nightly.py: scheduled, inactive

NUCLEUS_NOTIFY (addresses, separated by commas) get a mail when an execution fails, is aborted or times out.
"""

from __future__ import annotations

from typing import Any

from flytekit import Email, LaunchPlan, WorkflowExecutionPhase

from tasks import envs
from tasks.recipe import RECIPES, load_recipe
from workflows.ablate import ablate
from workflows.choose_candidate import choose_candidate
from workflows.curate import curate
from workflows.encode import encode
from workflows.evaluate import evaluate
from workflows.pretrain import pretrain
from workflows.publish import publish
from workflows.reproduce import reproduce
from workflows.study import study
from workflows.train import merge, train, train_one_stage

MAX_PARALLELISM = 64  # maximum nodes of one execution at a time
REPRODUCED = ("smoke", "tiny", "nucleus_17b")
PRETRAINED = ("nucleus_17b",)
SHAPE = (envs.TRAIN_NNODES, envs.TRAIN_NPROC)
ENDED_BADLY = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.ABORTED, WorkflowExecutionPhase.TIMED_OUT]


def _plan(workflow: Any, name: str, recipe: str | None = None) -> LaunchPlan:
    recipients = envs.recipients()
    return LaunchPlan.get_or_create(
        workflow,
        name,
        fixed_inputs={"recipe": recipe} if recipe else None,
        max_parallelism=MAX_PARALLELISM,
        notifications=[Email(phases=ENDED_BADLY, recipients_email=recipients)] if recipients else None,
    )


def _plans() -> list[LaunchPlan]:
    one_process = SHAPE == (1, 1)
    suffix = "" if one_process else f"-{SHAPE[0]}x{SHAPE[1]}"
    plans = [
        _plan(train, f"train{suffix}"),
        _plan(train_one_stage, f"train-stage{suffix}"),
        _plan(pretrain, f"pretrain{suffix}"),
        _plan(study, f"study{suffix}"),
        _plan(ablate, f"ablate{suffix}"),
    ]
    if one_process:
        steps = {"curate": curate, "encode": encode, "merge": merge, "evaluate": evaluate, "publish": publish}
        steps["choose-candidate"] = choose_candidate
        plans += [_plan(workflow, name) for name, workflow in steps.items()]
    for recipe in REPRODUCED:
        if _trains_on_shape(recipe):
            plans.append(_plan(reproduce, f"reproduce-{recipe}{suffix}", recipe))
    for path in sorted((RECIPES / "ablations").glob("*.yaml")):
        if _trains_on_shape(f"ablations/{path.stem}"):
            plans.append(_plan(ablate, f"ablate-{path.stem}{suffix}", f"ablations/{path.stem}"))
    for recipe in PRETRAINED:
        if _trains_on_shape(recipe):
            plans.append(_plan(pretrain, f"pretrain-{recipe}{suffix}", recipe))
    return plans


def _trains_on_shape(recipe: str) -> bool:
    train = load_recipe(recipe, []).train
    return (train.nnodes, train.nproc_per_node) == SHAPE


# flytekit registers the launch plans that are attributes of a module.
globals().update({f"plan_{plan.name.replace('-', '_')}": plan for plan in _plans()})
