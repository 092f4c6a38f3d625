"""What an artifact is does not depend on the clock, nor on how often its making was interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT, Home

from tasks.trace import walk

# Beginnings of lines, in the order in which a run prints them: a run that has just printed one is killed.
MARKS = (
    r"curate: kept",
    r"vae [2-9]\d/60",
    r"text encoder [2-9]\d/60",
    r"latents: [1-9]",
    r"\[stage1_32px\] step 1/12",
    r"\[stage1_32px\] step 12/12",
    r"\[stage2_48px\] step 1/12",
    r"\[stage3_64px\] step 12/12",
    r"\[seed 1\] images",
    r"publish 2/4",
)
KILLS = int(os.environ.get("NUCLEUS_TEST_KILLS", "3"))
LIMIT_S = 900


def run_until(home: Home, mark: str) -> bool:
    """Starts the smoke reproduction and kills it, with its children, at the first line that matches `mark`. Returns whether it
    was killed; a run may also come to its end, where the mark's work is done already."""
    home.path.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        home.command("--recipe", "smoke"),
        cwd=ROOT,
        env=home.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + LIMIT_S
    for line in process.stdout:
        assert time.monotonic() < deadline
        if re.match(mark, line):
            os.killpg(process.pid, signal.SIGKILL)
            break
    return process.wait() == -signal.SIGKILL


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_in_the_digests_of_an_undisturbed_one(smoke, smoke_home, new_home):
    marks = [MARKS[(2 * i + 1) * len(MARKS) // (2 * KILLS)] for i in range(KILLS)]
    killed = [mark for mark in marks if run_until(new_home, mark)]
    assert killed == marks
    again = new_home.outputs(new_home.run("--recipe", "smoke"))
    expected, found = (
        sorted((node.manifest.kind, digest) for digest, node in walk(outputs["pipeline"], home.path).items())
        for outputs, home in ((smoke, smoke_home), (again, new_home))
    )
    assert found == expected
    assert {kind for kind, _ in found} >= {"checkpoints", "merged", "images", "scorecard", "pipeline"}
