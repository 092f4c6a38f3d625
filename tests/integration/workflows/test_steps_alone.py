"""Each step alone makes what it makes within a whole run; results in its cache are not made again."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from recipe_home import Home


def last_paths(text: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"/[^\s,\])]+/artifacts/\w+/[0-9a-f]{64}", text)]


@pytest.mark.slow
def test_encode_train_one_stage_and_merge_give_the_whole_runs_artifacts(smoke, smoke_home):
    before = smoke_home.listing()
    done = smoke_home.run("--recipe", "smoke", "--curated", str(smoke["curated"]), workflow="encode")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    components, texts, *latents = last_paths(done.stdout[done.stdout.rindex("Encoded(") :])
    assert len(latents) == 3
    third = parent(smoke["merged"])
    second = parent(third)
    first = parent(second)
    given = ["--latents", str(latents[1]), "--texts", str(texts), "--components", str(components), "--init", str(first)]
    trained = start(smoke_home, "train_one_stage", "--stage", stage_of(second), *given)
    assert last_paths(trained.stdout)[-1] == second
    merged = start(smoke_home, "merge", "--checkpoints", str(third))
    assert last_paths(merged.stdout)[-1] == smoke["merged"]
    after = smoke_home.listing()
    assert all(after[kind] == before[kind] for kind in ("components", "checkpoints", "merged"))


def parent(path: Path) -> Path:
    """The checkpoints from which an artifact was made: other tests may have left more in the home."""
    parents = json.loads((path / "manifest.json").read_text())["parents"]
    (digest,) = [one["digest"] for one in parents if one["kind"] == "checkpoints"]
    return path.parents[1] / "checkpoints" / digest


def stage_of(checkpoints: Path) -> str:
    return json.loads((checkpoints / "manifest.json").read_text())["config"]["stage"]["name"]


def start(home: Home, workflow: str, *options: str):
    command = home.command("--recipe", "smoke", *options, workflow="train")
    command[command.index("workflows/train.py") + 1] = workflow
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=home.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done
