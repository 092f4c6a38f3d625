"""--overrides may be given several times, and every change reaches the workflow in the order given."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from workflows.command_line import join_overrides

ROOT = Path(__file__).resolve().parents[3]
# Runs pyflyte with the workflow's own entry point replaced, so that it prints its inputs and does nothing.
SHOW = """
from flytekit.clis.sdk_in_container import pyflyte, run
from flytekit.configuration.plugin import get_plugin
from workflows.pyflyte_plugin import RepeatableOverrides
if get_plugin() is not RepeatableOverrides:  # an environment that was installed before pyproject.toml named it
    RepeatableOverrides.configure_pyflyte_cli(pyflyte.main)
run.run_command = lambda ctx, entity: lambda **inputs: print("OVERRIDES", inputs["overrides"])
for name in {names!r}:
    for words in {cases!r}:
        pyflyte.main(["run", f"workflows/{{name}}.py", name, *words], standalone_mode=False)
"""
CASES = {
    ("--overrides", "a.b=1", "--overrides", "c.d=2"): ["a.b=1", "c.d=2"],
    ("--overrides=c.d=2", "--recipe", "smoke", "--overrides=a.b=1"): ["c.d=2", "a.b=1"],
    ("--overrides", '["a.b=1", "c.d=[2, 3]"]', "--overrides", "e=5"): ["a.b=1", "c.d=[2, 3]", "e=5"],
    ("--overrides", '["a.b=1", "c.d=2"]'): ["a.b=1", "c.d=2"],
    ("--overrides", "a.b=1"): "a.b=1",
    ("--overrides", "a.b=--overrides=1", "--overrides", "1"): ["a.b=--overrides=1", "1"],
    (): None,  # pyflyte then takes the workflow's own default
}


@pytest.mark.slow
def test_every_change_reaches_the_workflow_in_order():
    names = ["reproduce", "ablate", "pretrain"]
    cases = [list(words) + ([] if "--recipe" in words else ["--recipe", "smoke"]) for words in CASES]
    code = SHOW.format(cases=cases, names=names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    shown = [line for line in done.stdout.splitlines() if line.startswith("OVERRIDES")]
    assert shown == [f"OVERRIDES {wanted}" for wanted in CASES.values()] * len(names), done.stderr


def test_repeats_are_joined_whatever_is_run():
    """The options of a launch plan come from flyteadmin: no module of ours is loaded for them."""
    args = ["run", "remote-launchplan", "nightly", "--overrides", "a=1", "--recipe", "tiny", "--overrides=b=[1]"]
    assert join_overrides(args) == [
        "run", "remote-launchplan", "nightly", "--overrides", '["a=1", "b=[1]"]', "--recipe", "tiny",
    ]  # fmt: skip


def test_flytekit_finds_the_plugin_through_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["flytekit.configuration.plugin"] == {
        "nucleus": "workflows.pyflyte_plugin:RepeatableOverrides"
    }
