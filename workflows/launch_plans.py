"""What people start by name, in the console or by `pyflyte run remote-launchplan NAME`: a workflow and its recipe.

    reproduce-smoke, reproduce-tiny, ablate-NAME   where one process trains a stage
    pretrain-RECIPE-8x8                            where 8 nodes of 8 do: one plan for the shape that is registered

NUCLEUS_NOTIFY (addresses, separated by commas) get a mail when an execution fails or times out.
"""

from __future__ import annotations

import os

from flytekit import Email, LaunchPlan, WorkflowExecutionPhase

from tasks import envs
from tasks.recipe import RECIPES, load_recipe
from workflows.ablate import ablate
from workflows.pretrain import pretrain
from workflows.reproduce import reproduce

MAX_PARALLELISM = 64  # nodes of one execution at once
REPRODUCED = ("smoke", "tiny")
PRETRAINED = ("nucleus_17b",)
SHAPE = (envs.TRAIN_NNODES, envs.TRAIN_NPROC)


def _plan(workflow, recipe: str, name: str) -> LaunchPlan:
    recipients = [word.strip() for word in os.environ.get("NUCLEUS_NOTIFY", "").split(",") if word.strip()]
    ended_badly = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.TIMED_OUT]
    return LaunchPlan.get_or_create(
        workflow,
        name,
        fixed_inputs={"recipe": recipe},
        max_parallelism=MAX_PARALLELISM,
        notifications=[Email(phases=ended_badly, recipients_email=recipients)] if recipients else None,
    )


def _plans() -> list[LaunchPlan]:
    """Those whose recipe trains on the registered shape."""
    plans = []
    for recipe in REPRODUCED:
        if _shape(recipe) == SHAPE:
            plans.append(_plan(reproduce, recipe, f"reproduce-{recipe}"))
    for path in sorted((RECIPES / "ablations").glob("*.yaml")):
        if _shape(f"ablations/{path.stem}") == SHAPE:
            plans.append(_plan(ablate, f"ablations/{path.stem}", f"ablate-{path.stem}"))
    for recipe in PRETRAINED:
        if _shape(recipe) == SHAPE:
            plans.append(_plan(pretrain, recipe, f"pretrain-{recipe}-{SHAPE[0]}x{SHAPE[1]}"))
    return plans


def _shape(recipe: str) -> tuple[int, int]:
    train = load_recipe(recipe, []).train
    return train.nnodes, train.nproc_per_node


# flytekit registers what it finds as attributes of a module.
globals().update({plan.name.replace("-", "_"): plan for plan in _plans()})
