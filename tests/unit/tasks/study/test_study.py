"""A study: its runs, its comparisons, and which results depend on the machine."""

from __future__ import annotations

import json

import pytest

from tasks.manifest import seal
from tasks.recipe import load_recipe
from tasks.study.config import StudyRun, plan_runs
from tasks.study.measure import describe_run, training_flops
from tasks.study.report import LOGS, write_study


def run(variant: str, seed: int, overall: float, minutes: float = 1.0, **settings) -> dict:
    return {
        "variant": variant, "seed": seed, "scores": {"overall": overall, "counting": overall / 2},
        "settings": {"name": variant, "train": {"seed": seed, "lr": 0.1, **settings}, "eval": {"steps": 4}},
        "scored_by": {"score": "geneval[a]", "rule": "1", "prompts": "0", "judge_vqa": "a at 0"},
        "losses": [[step, 1.0 - step / 200 + seed / 100] for step in range(0, 101, 10)],
        "cost": {"steps": 100, "images": 800, "training_flops": 10**12, "parameters": 1000, "active_parameters": 500,
                 "skipped_steps": 0},
        "routing": {} if variant == "dense" else {"routing_stability": 0.5 + seed / 100},
        "timing": {"minutes": minutes, "device": "cpu", "ranks": 1},
        "parents": [],
    }  # fmt: skip


RUNS = [
    run(variant, seed, score, minutes=seed + 1.0, **settings)
    for variant, settings, scores in (
        ("tiny", {}, (0.80, 0.90, 0.85)),
        ("<slow>", {"lr": 0.01, "extra": [1, 2]}, (0.70, 0.84, 0.77)),
        ("dense", {}, (0.5, 0.5, 0.5)),
    )
    for seed, score in enumerate(scores)
]


def test_every_variant_meets_every_seed_and_the_recipe_comes_first():
    runs = plan_runs("tiny", "a, b", "0,7", ["x=1"])
    assert [(r.variant, r.seed) for r in runs] == [(v, s) for s in (0, 7) for v in ("tiny", "a", "b")]
    assert runs[-1].overrides == ("x=1", "train.seed=7")


def test_a_variant_may_be_a_recipe_with_changes_and_a_study_may_have_none():
    runs = plan_runs("tiny", "tiny:merge.last_n=1; a.b=2, my/x.yaml:c=3", "4", ["x=1"])
    assert [(r.variant, r.recipe) for r in runs] == [
        ("tiny", "tiny"), ("tiny: merge.last_n=1; a.b=2", "tiny"), ("x: c=3", "my/x.yaml")
    ]  # fmt: skip
    assert runs[1].overrides == ("x=1", "merge.last_n=1", "a.b=2", "train.seed=4")
    assert [(r.variant, r.seed) for r in plan_runs("tiny", "", "0,1", [])] == [("tiny", 0), ("tiny", 1)]


@pytest.mark.parametrize(("arguments", "message"), [
    (("tiny", "tiny:train.seed=3", "0", ()), "give --seeds instead"),
    (("tiny", "a,a", "0", ()), "must differ from each other by name, got tiny, a, a"),
    (("tiny", "my/tiny.yaml", "0", ()), "must differ from each other"),
    (("tiny", "a", "0,0", ()), "a repeated run is no new evidence"),
    (("tiny", "a", "0;1", ()), "whole numbers separated by commas"),
    (("tiny", "a", "-1", ()), "-1 must be 0 or more"),
    (("tiny", "a", "0", ("train.seed=3",)), "give --seeds instead"),
])  # fmt: skip
def test_what_is_no_study_is_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_runs(*arguments)


@pytest.mark.slow
def test_differences_are_paired_by_seed_and_have_intervals(tmp_path):
    study = write_study(RUNS, tmp_path)
    difference = study["differences"]["<slow>"]["overall"]
    assert difference["values"] == pytest.approx([-0.10, -0.06, -0.08]) and difference["mean"] == pytest.approx(-0.08)
    half = 4.3027 * 0.02 / 3**0.5  # Student's t of two degrees of freedom
    assert difference["interval"] == pytest.approx([-0.08 - half, -0.08 + half], abs=1e-5)
    assert study["smallest_visible"]["<slow>"]["overall"] == pytest.approx(half, abs=1e-5)
    assert study["changes"]["<slow>"] == {"train.extra[0]": 1, "train.extra[1]": 2, "train.lr": 0.01}
    # Dense models have no routing: a metric that one side lacks is not compared.
    assert "routing_stability" in study["differences"]["<slow>"]
    assert "routing_stability" not in study["differences"]["dense"]


@pytest.mark.slow
def test_tables_and_page_show_everything_and_escape_names(tmp_path):
    write_study(RUNS, tmp_path)
    text, page = (tmp_path / "study.md").read_text(), (tmp_path / "study.html").read_text()
    for words in ("Score: geneval[a]", "-0.080", "smallest visible", "1.000e+12", "| 2.0 |", "`train.lr=0.01`"):
        assert words in text, words
    assert "<slow>" not in page and "&lt;slow&gt;" in page and "data:image/png;base64" in page and "<table>" in page


def test_what_the_study_is_does_not_depend_on_how_long_it_took(tmp_path):
    slower = [{**each, "timing": {**each["timing"], "minutes": 99.0}} for each in RUNS]
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, runs in zip(folders, (RUNS, slower)):
        folder.mkdir()
        write_study(runs, folder)
    kept = [{p.name: p.read_bytes() for p in folder.iterdir() if p.name not in LOGS} for folder in folders]
    assert kept[0] == kept[1] and set(kept[0]) == {"study.json"}
    assert "99.0" in (folders[1] / "study.md").read_text()


def test_one_seed_makes_a_table_without_intervals(tmp_path):
    study = write_study([each for each in RUNS if each["seed"] == 0], tmp_path)
    assert study["differences"]["dense"]["overall"]["interval"] is None
    assert "one seed: none" in (tmp_path / "study.md").read_text()


def test_runs_that_were_scored_in_different_ways_are_refused(tmp_path):
    other = json.loads(json.dumps(RUNS[3]))
    other["settings"]["eval"]["steps"] = 5
    with pytest.raises(ValueError, match="one eval section"):
        write_study([RUNS[0], other], tmp_path)
    judged = {**RUNS[3], "scored_by": {**RUNS[3]["scored_by"], "judge_vqa": "b at 1"}}
    with pytest.raises(ValueError, match="b at 1"):
        write_study([RUNS[0], judged], tmp_path)


@pytest.mark.slow
def test_a_run_is_described_with_its_cost_and_the_losses_before_guidance(tmp_path):
    recipe = load_recipe("ablations/dense_ffn", ["train.stages[2].steps=100", "train.stages[2].decay=null",
                                                 "train.stages[2].guidance.steps=40"])  # fmt: skip
    report = {"steps": 100, "images_seen": 800, "parameters": 9, "active_parameters": 7, "skipped_steps": 1, "train_s": 30,
              "device": "cpu", "ranks": 1}  # fmt: skip
    card = {
        "overall": {"mean": 0.5}, "tasks": {"counting": {"mean": 0.4}}, "held_out": None, "name": "shapes", "version": "1",
        "settings": {"prompt_set_sha256": "0" * 64, "judges": []},
    }  # fmt: skip
    metrics = "\n".join(json.dumps({"step": step, "loss": step / 100}) for step in (20, 60, 80, 100))
    files = {
        "checkpoints": {"report.json": json.dumps(report), "metrics.jsonl": metrics},
        "merged": {"weights": ""},
        "scorecard": {"scorecard.json": json.dumps(card)},
    }
    for kind, texts in files.items():
        (tmp_path / kind).mkdir()
        for name, text in texts.items():
            (tmp_path / kind / name).write_text(text)
        seal(tmp_path / kind, kind, [], {})
    run = StudyRun(variant="dense", recipe="ablations/dense_ffn", overrides=(), seed=3)
    described = describe_run(
        run, recipe, [tmp_path / "checkpoints"] * 3, tmp_path / "merged", tmp_path, tmp_path / "scorecard"
    )
    assert described["losses"] == [[20, 0.2], [60, 0.6]]
    assert described["scores"] == {"overall": 0.5, "counting": 0.4} and described["routing"] == {}
    assert (described["cost"]["steps"], described["cost"]["images"], described["timing"]["minutes"]) == (300, 2400, 1.5)


@pytest.mark.slow
def test_flops_of_a_training_are_the_planners():
    from model.plan.planner import GPUS, plan
    from model.stages import training_stages

    recipe = load_recipe("smoke")
    planned = plan(recipe.model, recipe.train, GPUS["h100"], text_tokens=recipe.encoding.max_text_tokens)
    for stage, expected in zip(training_stages(recipe.model, recipe.train), planned["stages"], strict=True):
        counted = training_flops(stage, recipe.encoding.max_text_tokens)
        assert counted == expected["flops"]["forward_and_backward"] * stage.stage.steps
