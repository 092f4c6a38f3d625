"""The user's command on a folder of images, and how much is computed again after one image changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recipe_home import Home, small_recipe

from tasks.curation.sources.made import scenes


@pytest.fixture
def own_images(tmp_path) -> Path:
    """80 images with caption files, and two bad ones: a decompression bomb and a broken file."""
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for i in range(80):
        scene = scenes.sample_scene(rng)
        scenes.render(scene).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(scenes.captions(scene, rng)[0])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "bomb.txt").write_text("a photo of nothing")
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:100])
    return folder


@pytest.mark.slow
def test_own_images_go_the_same_way_and_a_changed_image_redoes_its_own_shard(own_images, tmp_path):
    home, source = Home(tmp_path / "home"), ["--source", str(own_images)]
    # Shards of a few images. The small VAE is trained on them, so that after a change all images are encoded again.
    train = {"stages": [{"name": "only", "image_size_px": 64, "steps": 2, "batch_size": 64, "capacity_factors": 2.0}]}
    recipe = small_recipe(tmp_path, [64], train=train, source={"images_per_shard": 20})
    first = home.outputs(home.invoke("--recipe", recipe, *source))
    ledger = pd.read_parquet(first["curated"] / "ledger.parquet")
    assert ledger["rule"].value_counts()[["too_many_pixels", "undecodable"]].tolist() == [1, 1]
    assert ledger["kept"].sum() > 60
    card = json.loads((first["scorecard"] / "scorecard.json").read_text())
    # Coloured shapes do not measure a user's model: its own held-out captions do.
    assert card["name"] == "captions[efficientnet-lite0]" and set(card["tasks"]) >= {"match", "precision", "coverage"}
    assert card["measures"]["frechet_distance"] > 0 and [row["timestep"] for row in card["flow_loss"]]
    assert "held-out flow loss" in (first["pipeline"] / "README.md").read_text()
    before = home.listing()
    assert "records" not in before, "original bytes are not copied"
    scenes.render(scenes.sample_scene(np.random.default_rng(99))).save(own_images / "001.png")
    second = home.outputs(home.invoke("--recipe", recipe, *source))
    added = {kind: len(digests - before[kind]) for kind, digests in home.listing().items()}
    assert second["curated"] != first["curated"] and second["pipeline"] != first["pipeline"]
    assert added["checkpoints"] == added["merged"] == added["pipeline"] == 1
    parts = {
        kind: [path for path in _parts(home, kind) if path.name not in before[kind]]
        for kind in ("scores", "selections")
    }
    assert {kind: len(new) for kind, new in parts.items()} == {"scores": 1, "selections": 1}


def _parts(home: Home, kind: str) -> list[Path]:
    """The parts of shards; indices of parts are of the same kind."""
    return [path for path in (home.artifacts / kind).iterdir() if not (path / "parts.parquet").is_file()]
