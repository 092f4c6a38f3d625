"""The launch plans of a registered shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHOW = """
import json
from flytekit import LaunchPlan
import workflows.launch_plans as module
plans = [plan for plan in vars(module).values() if isinstance(plan, LaunchPlan)]
fixed = lambda p: p.fixed_inputs.literals["recipe"].scalar.primitive.string_value if p.fixed_inputs.literals else None
print(json.dumps({p.name: [fixed(p), p.max_parallelism, [n.email.recipients_email for n in p.notifications or []]]
                  for p in plans}))
"""


def plans(nnodes: int, nproc: int, **environment: str) -> dict[str, list]:
    """Name -> recipe, parallelism, number of notifications."""
    asked = {"NUCLEUS_TRAIN_NNODES": str(nnodes), "NUCLEUS_TRAIN_NPROC": str(nproc), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


CHOSEN = {"ablate", "pretrain", "study", "train", "train-stage"}
STEPS = {"choose-candidate", "curate", "encode", "evaluate", "merge", "publish"}


@pytest.mark.slow
def test_everything_that_people_start_has_a_plan_with_bounds_and_mails():
    result = plans(1, 1, NUCLEUS_NOTIFY="a@example.com, b@example.com")
    ablations = {f"ablate-{path.stem}" for path in (ROOT / "recipes" / "ablations").glob("*.yaml")}
    assert result.keys() >= CHOSEN | STEPS | ablations | {"reproduce-smoke", "reproduce-tiny"}
    assert result["reproduce-smoke"][0] == "smoke" and result["ablate-token_choice"][0] == "ablations/token_choice"
    assert all(result[name][0] is None for name in CHOSEN | STEPS)  # with a recipe of the user's
    assert not any(name.startswith("pretrain-nucleus") for name in result)  # which trains on other shapes
    assert all(
        parallel == 64 and mails == [["a@example.com", "b@example.com"]] for _, parallel, mails in result.values()
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8), {"pretrain-nucleus_17b-8x8", "reproduce-nucleus_17b-8x8"}),
        ((2, 8), set()),
    ],
)
@pytest.mark.slow
def test_a_shape_has_the_plans_of_the_recipes_that_train_on_it(shape, expected):
    actual = plans(*shape)
    suffix = f"-{shape[0]}x{shape[1]}"
    assert {name for name, (recipe, *_) in actual.items() if recipe} == expected
    assert actual.keys() == expected | {f"{name}{suffix}" for name in CHOSEN}
    assert not any(mails for *_, mails in actual.values())
