"""What people start by name, for the shape that is registered."""

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
print(json.dumps({p.name: [p.fixed_inputs.literals["recipe"].scalar.primitive.string_value, p.max_parallelism,
                           len(p.notifications or [])] for p in plans}))
"""


def plans(nnodes: int, nproc: int, **environment: str) -> dict[str, list]:
    """Name -> recipe, parallelism, number of notifications."""
    asked = {"NUCLEUS_TRAIN_NNODES": str(nnodes), "NUCLEUS_TRAIN_NPROC": str(nproc), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_one_process_reproduces_the_small_recipes_and_their_ablations():
    found = plans(1, 1, NUCLEUS_NOTIFY="a@example.com, b@example.com")
    assert found["reproduce-smoke"] == ["smoke", 64, 1] and found["reproduce-tiny"][0] == "tiny"
    assert {f"ablate-{path.stem}" for path in (ROOT / "recipes" / "ablations").glob("*.yaml")} <= found.keys()
    assert not any(name.startswith("pretrain-") for name in found)


@pytest.mark.parametrize(("shape", "expected"), [((8, 8), {"pretrain-nucleus_17b-8x8"}), ((2, 8), set())])
def test_a_shape_has_the_plans_of_the_recipes_that_train_on_it(shape, expected):
    found = plans(*shape)
    assert found.keys() == expected
    assert all(recipe == "nucleus_17b" and not mails for recipe, _, mails in found.values())
