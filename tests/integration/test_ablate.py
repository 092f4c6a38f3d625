"""An ablation, by the command that users type, beside the reproduction that it overlays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tasks.manifest import load_manifest, verify
from tasks.recipe import RECIPES


@pytest.fixture
def overlay(tmp_path) -> str:
    path = tmp_path / "small_token_choice.yaml"
    values = {
        "base": str(RECIPES / "smoke.yaml"),
        "name": "small_token_choice",
        "model": {"routing": {"kind": "token_choice"}},
        "train": {"losses": {"load_balance": 0.01}},
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.long
def test_an_ablation_shares_the_data_and_ends_in_a_scorecard(smoke, smoke_home, overlay):
    before = smoke_home.listing()
    made = smoke_home.outputs(smoke_home.run("--recipe", overlay, workflow="ablate"), of="Ablation")
    after = smoke_home.listing()
    added = {kind: len(after[kind] - before.get(kind, set())) for kind in after}
    assert {kind: count for kind, count in added.items() if count} == {
        "checkpoints": 3, "merged": 1, "images": 3, "scorecard": 1,
    }  # fmt: skip
    for path in made.values():
        verify(path)
    assert json.loads((made["scorecard"] / "scorecard.json").read_text())["counts"]["failed"] == 0
    config = json.loads((made["merged"] / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "NucleusTransformer" and config["routing"]["kind"] == "token_choice"
    parent = next(p for p in load_manifest(made["merged"]).parents if p.kind == "checkpoints")
    rows = (Path(parent.uri) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["expert/dropped"] == 0


def test_reproduce_refuses_an_ablation_before_any_work(new_home, overlay):
    done = new_home.run("--recipe", overlay)
    assert done.returncode != 0 and not new_home.artifacts.is_dir()
    assert "is an ablation, and diffusers has no class that computes it" in " ".join(
        (done.stdout + done.stderr).split()
    )
