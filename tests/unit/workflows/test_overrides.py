"""--overrides may be given several times, and every change reaches the workflow in the order given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Runs pyflyte with the workflow's own entry point replaced, so that it prints its inputs and does nothing.
SHOW = """
import importlib, sys
from flytekit.clis.sdk_in_container import pyflyte, run
run.run_command = lambda ctx, entity: lambda **inputs: print("OVERRIDES", inputs["overrides"])
for words in {cases!r}:
    pyflyte.main(["run", {file!r}, {name!r}, *words], standalone_mode=False)
"""
CASES = {
    ("--overrides", "a.b=1", "--overrides", "c.d=2"): ["a.b=1", "c.d=2"],
    ("--overrides=c.d=2", "--recipe", "smoke", "--overrides=a.b=1"): ["c.d=2", "a.b=1"],
    ("--overrides", '["a.b=1", "c.d=[2, 3]"]', "--overrides", "e=5"): ["a.b=1", "c.d=[2, 3]", "e=5"],
    ("--overrides", '["a.b=1", "c.d=2"]'): ["a.b=1", "c.d=2"],
    ("--overrides", "a.b=1"): ["a.b=1"],
    ("--overrides", "a.b=--overrides=1"): ["a.b=--overrides=1"],
    (): None,  # pyflyte then takes the workflow's own default
}


@pytest.mark.parametrize("name", ["reproduce", "ablate", "pretrain"])
def test_every_change_reaches_the_workflow_in_order(name):
    cases = [list(words) + ([] if "--recipe" in words else ["--recipe", "smoke"]) for words in CASES]
    code = SHOW.format(cases=cases, file=f"workflows/{name}.py", name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    shown = [line for line in done.stdout.splitlines() if line.startswith("OVERRIDES")]
    assert shown == [f"OVERRIDES {wanted}" for wanted in CASES.values()], done.stderr


def test_help_shows_the_option_as_it_was():
    done = subprocess.run(
        [sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte", "run", "workflows/reproduce.py", "reproduce", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--overrides" in done.stdout and "a JSON list of them" in " ".join(done.stdout.split())
