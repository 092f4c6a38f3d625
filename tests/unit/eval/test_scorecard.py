"""A scorecard is recomputed from a folder of images, states its error bars, and hides nothing that is missing."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from eval import scorecard as module
from eval.benchmarks.shapes.prompts import make_prompts
from eval.benchmarks.shapes.vocabulary import COLORS
from eval.config import EvalConfig
from eval.scorecard import benchmark_prompts, evaluate, main, rescore, score, scorecard
from eval.scorecard_page import draw_grid, render_page

CONFIG = EvalConfig(prompts_per_task=2, seeds=(0, 1), image_size_px=64, bootstrap_samples=100)


def quiet(_):
    pass


def red_squares(prompts, seeds, height, width):
    """Two red squares side by side, whatever is asked for."""
    image = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for left in (8, 38):
        draw.rectangle((left, 20, left + 17, 37), fill=COLORS["red"])
    return [image] * len(prompts)


def right_by_red_squares(metadata):
    include = metadata["include"]
    return (
        all(c["class"] == "square" and c["count"] <= 2 and c.get("color", "red") == "red" for c in include)
        and (metadata["tag"] != "counting" or include[0]["count"] == 2)
        and metadata["tag"] not in ("two_object", "position", "color_attr")
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    prompts = make_prompts(8)
    card = evaluate(red_squares, CONFIG, path, prompts=prompts, provenance={"merged": "<abc>"}, log=quiet)
    return path, prompts, card


def test_scores_are_those_of_the_rule(run):
    _, prompts, card = run
    for tag, task in card["tasks"].items():
        mine = [m for m in prompts if m["tag"] == tag and m["split"] == "seen"]
        images = sum(m["images"] for m in mine)
        right = sum(m["images"] * right_by_red_squares(m) for m in mine)
        assert task["images"] == 2 * images and task["correct"] == 2 * right, tag
        assert task["mean"] == pytest.approx(right / images) and task["prompts"] == len(mine)
    assert card["tasks"]["single_object"]["mean"] == 0.25
    means = [task["mean"] for task in card["tasks"].values()]
    assert len(means) == 6 and card["overall"]["mean"] == pytest.approx(np.mean(means))


def test_held_out_prompts_are_scored_apart(run):
    _, prompts, card = run
    assert set(card["held_out"]["tasks"]) == {"colors", "position", "color_attr"}
    images = sum(t["images"] for scores in (card, card["held_out"]) for t in scores["tasks"].values())
    assert images == card["counts"]["scored"] == card["counts"]["expected"] == 2 * sum(m["images"] for m in prompts)


def test_error_bars_name_runs_seeds_and_draws(run):
    card = run[2]
    overall = card["overall"]
    assert overall["runs"] == 2 and overall["seeds"] == [0, 1] and overall["std"] == 0.0
    low, high = overall["interval"]
    assert low < overall["mean"] < high and card["bootstrap"]["samples"] == 100
    # every draw of the four single-object prompts holds 0 to 4 squares
    assert card["tasks"]["single_object"]["interval"][1] >= 0.5


def test_the_files_hold_every_image_and_how_it_was_made(run):
    path, prompts, card = run
    table = pd.read_parquet(path / "scores.parquet")
    assert len(table) == card["counts"]["scored"] and set(table["seed"]) == {0, 1}
    wrong = table[(table["tag"] == "counting") & ~table["correct"]].iloc[0]
    assert wrong["reason"].startswith("expected ") and json.loads(wrong["objects"])["square"]
    assert json.loads((path / "scorecard.json").read_text()) == card
    assert card["generation"]["provenance"] == {"merged": "<abc>"}
    assert card["config"]["guidance_scale"] == 8.0 and card["config"]["num_inference_steps"] == 50
    with Image.open(path / "grid.png") as grid:
        assert grid.width > 8 * 96 and grid.height > 9 * 96


def test_the_page_is_whole_and_escaped(run):
    page = (run[0] / "scorecard.html").read_text()
    assert "&lt;abc&gt;" in page and "<abc>" not in page
    assert "data:image/png;base64," in page and 'src="http' not in page and "<script" not in page
    assert "held out of training" in page and "95% interval" in page


def test_texts_from_prompts_cannot_break_the_page(run):
    path, _, card = run
    row = {"file": "a.png", "prompt": "<script>alert(1)</script>", "reason": "<b>", "error": "", "correct": False}
    page = render_page(card, [row], path / "grid.png")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>&lt;" not in page


def test_the_command_scores_again_and_gets_the_same(run, tmp_path, capsys):
    path = run[0]
    main([str(path), "--out", str(tmp_path)])
    assert "overall" in capsys.readouterr().out
    for name in ("scorecard.json", "grid.png", "scores.parquet"):
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()


def test_a_changed_image_changes_the_score(run, tmp_path):
    import shutil

    shutil.copytree(run[0] / "images", tmp_path / "images")
    Image.new("RGB", (64, 64), (250, 250, 250)).save(tmp_path / "images/seed0/00001/samples/0000.png")
    card = rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    assert card["tasks"]["single_object"]["correct"] == run[2]["tasks"]["single_object"]["correct"] - 1
    assert card["overall"]["std"] > 0


def test_missing_and_broken_images_fail_unless_the_official_way_is_asked_for(run, tmp_path):
    import shutil

    shutil.copytree(run[0] / "images", tmp_path / "images")
    samples = tmp_path / "images/seed1/00000/samples"
    data = (samples / "0000.png").read_bytes()
    (samples / "0000.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable image"):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    (samples / "0001.png").unlink()
    with pytest.raises(ValueError, match="holds 1 images, not 2"):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    official = CONFIG.model_copy(update={"missing": "official"})
    card = rescore(tmp_path, tmp_path, official, log=quiet)
    assert card["counts"]["failed"] == 2
    assert card["tasks"]["single_object"]["images"] == run[2]["tasks"]["single_object"]["images"] - 2
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["correct"].isna().sum() == 1 and table["error"].str.startswith("unreadable").sum() == 1


def test_a_sealed_directory_is_not_written_to(run, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="sealed"):
        rescore(run[0], tmp_path, log=quiet)
    with pytest.raises(SystemExit, match="no run of eval.generate"):
        main([str(tmp_path)])


def test_another_benchmark_needs_prompts_and_a_detector_before_any_sampling(run, tmp_path):
    config = CONFIG.model_copy(update={"benchmark": "geneval"})
    with pytest.raises(ValueError, match="prompt file"):
        benchmark_prompts(config)

    def never(*_):
        raise AssertionError("sampled")

    with pytest.raises(ValueError, match="needs a detector"):
        evaluate(never, config, tmp_path, prompts=make_prompts(1), log=quiet)
    detect = lambda image: {"square": [{"box": [0, 0, 9, 9], "score": 0.95, "color": "red"}]}  # noqa: E731
    rows = score(run[0] / "images", run[1], config, detector=detect, log=quiet)
    assert {row["correct"] for row in rows if row["prompt"] == "a photo of a square"} == {True}


def test_no_scored_image_is_an_error():
    with pytest.raises(ValueError, match="none of"):
        scorecard([], make_prompts(1), CONFIG)


def test_the_grid_picks_images_by_place_and_not_by_score(run):
    rows = score(run[0] / "images", run[1], CONFIG, log=quiet)
    flipped = [{**row, "correct": not row["correct"]} for row in rows]
    a, b = (np.asarray(draw_grid(r, run[0] / "images")) for r in (rows, flipped))
    assert a.shape == b.shape and 0 < (a != b).any(axis=-1).mean() < 0.02  # only the marks differ


def test_the_module_names_its_benchmark_prompts():
    assert benchmark_prompts(CONFIG) == make_prompts(2)
    assert module.SCHEMA_VERSION == 1
