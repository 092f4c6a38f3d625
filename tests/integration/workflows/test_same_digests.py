"""Digests depend neither on the clock nor on how often the run was killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time

import pytest
from recipe_home import ROOT, Home, small_recipe

from tasks.manifest import verify
from tasks.trace import walk

# Beginnings of lines, in the order in which a run prints them.
MARKS = (
    r"source: shard",
    r"curation: kept",
    r"vae 3/4",
    r"text encoder 3/4",
    r"texts: shard",
    r"latents: shard",
    r"\[stage0\] step 1/2",
    r"\[stage1\] step 2/2",
    r"\[seed 0",
    r"answers: ",
)
# NUCLEUS_TEST_KILLS=10 python -m pytest tests/integration/workflows/test_same_digests.py: ten times, after each of the marks.
KILLS = int(os.environ.get("NUCLEUS_TEST_KILLS", "3"))  # up to 10
DELAY_S = 1.5
LIMIT_S = 1800


def kill_after(home: Home, recipe: str, mark: str, delay_s: float) -> bool:
    """Starts a reproduction and kills its process group `delay_s` after the first line that matches `mark`. Returns whether
    it was killed; it may also have ended before."""
    home.path.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        home.command("--recipe", recipe),
        cwd=ROOT,
        env=home.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + LIMIT_S
    for line in process.stdout:
        assert time.monotonic() < deadline
        if re.match(mark, line):
            time.sleep(delay_s)
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_digests_of_an_undisturbed_one(tmp_path):
    """With NUCLEUS_TEST_KILLS=10, ten times, at random moments after different marks."""
    recipe = small_recipe(tmp_path, [32, 64])
    undisturbed, disturbed = Home(tmp_path / "undisturbed"), Home(tmp_path / "disturbed")
    expected = undisturbed.outputs(undisturbed.invoke("--recipe", recipe))
    marks = [MARKS[(2 * i + 1) * len(MARKS) // (2 * KILLS)] for i in range(KILLS)]
    for mark in marks:
        delay_s = random.uniform(0, DELAY_S)
        assert kill_after(disturbed, recipe, mark, delay_s), mark
        print(f"killed {delay_s:.2f} s after {mark}", flush=True)
    outputs = disturbed.outputs(disturbed.run("--recipe", recipe))
    digests = {name: path.name for name, path in outputs.items()}
    assert digests == {name: path.name for name, path in expected.items()}
    assert disturbed.listing() == undisturbed.listing(), "each artifact and part, of every kind"
    for path in outputs.values():
        verify(path)
    kinds = {node.manifest.kind for node in walk(outputs["pipeline"], disturbed.path).values()}
    assert kinds >= {"checkpoints", "merged", "images", "scorecard", "pipeline"}
