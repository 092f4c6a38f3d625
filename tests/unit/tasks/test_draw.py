"""Drawing one image from a published pipeline, by prompt and seed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from tasks import draw
from tasks.manifest import seal
from tasks.publishing import publish
from tasks.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fixtures" / "models"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home with one published pipeline of random weights."""
    import json

    import tiny_pipeline

    home = tmp_path_factory.mktemp("home")
    parts = home / "parts"
    tiny_pipeline.make_components(parts / "components")
    tiny_pipeline.make_transformer(parts / "merged")
    (parts / "scorecard").mkdir()
    score = {"mean": 0.5, "std": 0.1, "runs": 2, "seeds": [0, 1], "interval": [0.4, 0.6]}
    score["noise"] = {"sampling": 0.05, "prompts": 0.05, "training": None, "training_runs": 0}
    card = {
        "name": "shapes",
        "benchmark": "shapes",
        "overall": score,
        "tasks": {},
        "held_out": None,
        "counts": {"expected": 6, "generated": 6, "scored": 6, "failed": 0},
        "interval": {"method": "Wilson", "level": 0.95},
        "settings": {"model_digests": {name: seal(parts / name, name).digest for name in ("merged", "components")}},
    }
    (parts / "scorecard/scorecard.json").write_text(json.dumps(card))
    seal(parts / "scorecard", "scorecard")
    recipe = load_recipe("tiny", ["eval.num_inference_steps=2", "eval.image_size_px=32"]).model_dump(mode="json")
    out = home / "artifacts/pipeline/one"
    out.mkdir(parents=True)
    publish.publish(parts / "merged", parts / "components", parts / "scorecard", recipe, out)
    seal(out, "pipeline", config={"recipe": recipe})
    return home


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(home))


def test_the_seed_decides_the_image(home, tmp_path):
    pictures = []
    for seed in (0, 0, 1):
        made = draw.draw("a photo of a red circle", draw.newest_pipeline(), tmp_path / f"{len(pictures)}.png", seed)
        pictures.append(Image.open(made["path"]).tobytes())
        assert Image.open(made["path"]).size == (32, 32)
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_command_prints_the_path(home, capsys):
    assert draw.main(["A red circle, left!", "--seed", "3"]) == 0
    path = Path(capsys.readouterr().out.split("  (")[0])
    assert path == home / "drawn/a-red-circle-left-3.png" and path.is_file()


def test_the_newest_pipeline_is_taken(home):
    newer = home / "artifacts/pipeline/newer"
    newer.mkdir()
    (newer / "x").write_text("x")
    seal(newer, "pipeline")
    try:
        assert draw.newest_pipeline().name == "newer"
        os.utime(newer / "manifest.json", (1, 1))
        assert draw.newest_pipeline().name == "one"
    finally:
        for file in newer.iterdir():
            file.unlink()
        newer.rmdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "the prompt is empty"),
        (["a", "--seed", "-1"], "seed=-1 must be from 0"),
        (["a", "--pipeline", "/nowhere"], "is not a diffusers pipeline"),
    ],
)
def test_bad_input_is_one_message(arguments, message, capsys):
    assert draw.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_pipeline_the_message_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path))
    assert draw.main(["a"]) == 2
    assert "run `make reproduce`" in capsys.readouterr().err
