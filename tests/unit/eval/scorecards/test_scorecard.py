"""A scorecard is recomputed from images and answers, states its error bars and settings, and lists what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from eval import catalog
from eval.benchmarks.shapes.prompts import make_prompts
from eval.benchmarks.shapes.vocabulary import COLORS
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judges.shapes_judge import ShapesDetector
from eval.judging.images import open_png
from eval.judging.protocols import score_name, with_ids
from eval.judging.run import read_rows
from eval.scorecard import evaluate, judge_run, main, rescore, write
from eval.scorecards.card import load, model_index
from eval.scorecards.make_card import scorecard, with_training_noise
from eval.scorecards.scorecard_page import draw_grid, failure_pages, render_page

CONFIG = EvalConfig(prompts_per_task=8, seeds=(0, 1), image_size_px=64)


def quiet(_):
    pass


def red_squares(prompts, seeds, height, width):
    """Two red squares side by side for every prompt; a corner pixel makes images different."""
    images = []
    for seed in seeds:
        image = Image.new("RGB", (width, height), (250, 250, 250))
        draw = ImageDraw.Draw(image)
        for left in (8, 38):
            draw.rectangle((left, 20, left + 17, 37), fill=COLORS["red"])
        image.putpixel((0, 0), (250, 250, 245 + seed % 5))
        images.append(image)
    return images


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
    card = evaluate(red_squares, CONFIG, path, provenance={"merged": "<abc>"}, log=quiet)
    return path, make_prompts(8), card


def test_scores_are_those_of_the_rule(run):
    _, prompts, card = run
    for tag, task in card["tasks"].items():
        mine = [m for m in prompts if m["tag"] == tag and m["split"] == "seen"]
        images = sum(m["images"] for m in mine)
        right = sum(m["images"] * right_by_red_squares(m) for m in mine)
        assert task["images"] == 2 * images and task["prompts"] == len(mine), tag
        assert task["mean"] == pytest.approx(right / images) == task["official"] == task["fixed"]
    assert card["tasks"]["single_object"]["mean"] == 0.25
    means = [task["mean"] for task in card["tasks"].values()]
    assert len(means) == 6 and card["overall"]["mean"] == pytest.approx(np.mean(means))
    assert card["overall"]["mean"] == pytest.approx(card["official"]["overall"])


def test_held_out_prompts_are_scored_apart(run):
    _, prompts, card = run
    assert set(card["held_out"]["tasks"]) == {"colors", "position", "color_attr"}
    images = sum(t["images"] for scores in (card, card["held_out"]) for t in scores["tasks"].values())
    assert images == card["counts"]["scored"] == card["counts"]["expected"] == 2 * sum(m["images"] for m in prompts)


def test_error_bars_name_runs_seeds_and_the_three_noises(run):
    overall = run[2]["overall"]
    assert overall["runs"] == 2 and overall["seeds"] == [0, 1] and overall["std"] == 0.0
    low, high = overall["interval"]
    assert low < overall["mean"] < high
    assert all(task["interval"][0] < task["interval"][1] for task in run[2]["tasks"].values())
    noise = overall["noise"]
    assert noise["sampling"] == 0.0 and noise["prompts"] > 0 and noise["training"] is None


def test_every_setting_that_moves_a_score_is_on_the_card(run):
    settings = run[2]["settings"]
    assert settings["judges"][0]["name"] == "shapes-detector" and len(settings["judges"][0]["revision"]) == 64
    assert settings["model_digests"] == {"merged": "<abc>"}
    assert settings["steps"] == 50 and settings["guidance_scale"] == 8.0 and settings["prompt_rewriting"] is None
    assert len(settings["prompt_set_sha256"]) == len(settings["images_sha256"]) == 64
    for key in ("dtype", "attention", "sampler", "negative_prompt", "device", "pipeline", "versions"):
        assert key in settings


def test_the_files_hold_every_image_and_the_card_is_typed(run):
    path, _, card = run
    table = pd.read_parquet(path / "scores.parquet")
    assert len(table) == card["counts"]["scored"] and set(table["seed"]) == {0, 1}
    wrong = table[(table["category"] == "counting") & (table["score"] == 0)].iloc[0]
    assert wrong["reason"].startswith("expected ") and json.loads(wrong["answers"])["objects"]["square"]
    assert load(path).model_dump(mode="json") == card == json.loads((path / "scorecard.json").read_text())
    with Image.open(path / "grid.png") as grid:
        assert grid.width > 8 * 96 and grid.height > 9 * 96
    assert not [p for p in path.iterdir() if p.name.startswith(".")]


def test_the_card_depends_on_neither_the_clock_nor_the_place(run, tmp_path):
    shutil.copytree(run[0] / "images", tmp_path / "elsewhere" / "images")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    rescore(tmp_path / "elsewhere", tmp_path / "out", CONFIG, log=quiet)
    for name in ("scorecard.json", "scorecard.html", "scores.parquet", "grid.png", "judged/answers.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (run[0] / name).read_bytes(), name


def test_the_page_is_whole_and_escaped(run):
    page = (run[0] / "scorecard.html").read_text()
    assert "&lt;abc&gt;" in page and "<abc>" not in page
    assert "data:image/png;base64," in page and 'src="http' not in page and "<script" not in page
    assert "held out of training" in page and "interval over prompts" in page and "not measured" in page
    wrong = read_rows(run[0] / "scores.parquet")
    failures = [row for row in wrong if row["score"] == 0]
    assert f"Failures ({len(failures)})" in page and page.count("data:image/jpeg") >= len(failures)


def test_texts_from_data_cannot_break_the_page(run):
    path, _, _ = run
    row = {
        **read_rows(path / "scores.parquet")[0],
        "prompt": "<script>alert(1)</script>", "reason": "<b>", "category": "<i>", "score": 0.0,
    }  # fmt: skip
    page = render_page(load(path), [row, {**row, "error": "<u>", "score": None}], path / "images", path / "grid.png")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<b>&lt;" not in page and "<i>" not in page and "<u>" not in page


def test_every_failure_has_its_picture_and_reason_on_one_of_the_linked_pages(run, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.scorecards.scorecard_page.PICTURES", 5)
    rows = read_rows(run[0] / "scores.parquet")[:17]
    rows = [{**row, "score": 0.0, "reason": f"reason {i}."} for i, row in enumerate(rows)]
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "0009.html").touch()  # of an earlier score
    write(load(run[0]), rows, run[0] / "images", tmp_path)
    pages = {path.name: path.read_text() for path in [tmp_path / "scorecard.html", *tmp_path.glob("failures/*")]}
    assert sorted(pages) == ["0002.html", "0003.html", "0004.html", "scorecard.html"]
    main = pages["scorecard.html"]
    pages["scorecard.html"] = main[main.index("<h2>Failures (17)</h2>") : main.index("<h2>Settings")]
    figures = {name: re.findall(r"<figure>.*?</figure>", page, re.S) for name, page in pages.items()}
    assert [len(figures[name]) for name in sorted(pages)] == [5, 5, 2, 5]
    shown = [figure for of_page in figures.values() for figure in of_page]
    assert all("data:image/jpeg" in figure for figure in shown)
    assert sorted(int(n) for figure in shown for n in re.findall(r"reason (\d+)\.", figure)) == list(range(17))
    for name, page in pages.items():  # each page leads to all others
        folder = tmp_path if name == "scorecard.html" else tmp_path / "failures"
        targets = {(folder / link).resolve() for link in re.findall(r'<a href="([^"]+)"', page)}
        assert targets == {path.resolve() for path in tmp_path.rglob("*.html")} - {(folder / name).resolve()}


def test_pages_of_failures_are_made_one_at_a_time(run, monkeypatch):
    from eval.scorecards import scorecard_page

    monkeypatch.setattr(scorecard_page, "PICTURES", 5)
    read = []
    monkeypatch.setattr(scorecard_page, "_thumbnail", lambda path, side: read.append(path))
    rows = [{**row, "score": 0.0} for row in read_rows(run[0] / "scores.parquet")[:17]]
    pages = failure_pages(load(run[0]), rows, run[0] / "images")
    assert [(next(pages)[0], len(read)) for _ in range(3)] == [
        ("failures/0002.html", 5), ("failures/0003.html", 10), ("failures/0004.html", 12),
    ]  # fmt: skip


def test_the_grid_picks_images_by_place_and_not_by_score(run):
    rows = read_rows(run[0] / "scores.parquet")
    flipped = [{**row, "score": 1 - row["score"]} for row in rows]
    a, b = (np.asarray(draw_grid(r, run[0] / "images")) for r in (rows, flipped))
    assert a.shape == b.shape and 0 < (a != b).any(axis=-1).mean() < 0.02  # only the marks differ


# ---- Scoring again


def test_the_command_scores_again_and_gets_the_same(run, tmp_path, capsys):
    main([str(run[0]), "--out", str(tmp_path)])
    assert "overall" in capsys.readouterr().out
    for name in ("scorecard.json", "grid.png", "scores.parquet"):
        assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


def test_answers_alone_give_the_same_scores_without_images_and_without_a_judge(run, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a judge was asked for")

    monkeypatch.setattr(catalog, "judge", never)
    for name in ("prompts.jsonl", "generation.json"):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copyfile(run[0] / "images" / name, tmp_path / "images" / name)
    card = rescore(tmp_path, tmp_path / "out", CONFIG, judged=run[0] / "judged", log=quiet)
    assert card == run[2]


def test_a_run_with_settings_that_this_version_no_longer_has_is_scored(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "images/generation.json"
    generation = json.loads(path.read_text())
    generation["config"] |= {"bootstrap_samples": 1000, "equal_within": 0.01}
    path.write_text(json.dumps(generation))
    assert rescore(tmp_path, tmp_path / "out", judged=tmp_path / "judged", log=quiet)["tasks"] == run[2]["tasks"]


def test_a_changed_image_changes_the_score_and_stale_answers_are_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    Image.new("RGB", (64, 64), (250, 250, 250)).save(tmp_path / "images/seed0/00001/samples/0000.png")
    os.utime(tmp_path / "images/seed0/00001/samples/0000.png", (0, 0))  # as of a restored backup: no time is trusted
    with pytest.raises(ValueError, match="0000.png changed since it was judged"):
        rescore(tmp_path, tmp_path / "out", CONFIG, judged=tmp_path / "judged", log=quiet)
    card = rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    before = run[2]["tasks"]["single_object"]
    assert card["tasks"]["single_object"]["mean"] == before["mean"] - 1 / before["images"]
    assert card["overall"]["std"] > 0
    assert card["settings"]["images_sha256"] != run[2]["settings"]["images_sha256"]


def test_missing_and_broken_images_fail_unless_the_official_way_is_asked_for(run, tmp_path):
    shutil.copytree(run[0] / "images", tmp_path / "images")
    samples = tmp_path / "images/seed1/00000/samples"
    data = (samples / "0000.png").read_bytes()
    (samples / "0000.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="seed1/00000/samples/0000.png is not a readable image"):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    (samples / "0001.png").unlink()
    with pytest.raises(ValueError, match="holds 1 images, not 2"):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    official = CONFIG.model_copy(update={"missing": "official"})
    card = rescore(tmp_path, tmp_path, official, log=quiet)
    assert card["counts"] == {**run[2]["counts"], "generated": 119, "scored": 118, "failed": 2}
    assert card["tasks"]["single_object"]["images"] == run[2]["tasks"]["single_object"]["images"] - 2
    first = pd.read_parquet(tmp_path / "scores.parquet")["prompt_id"][0]
    assert f"2 missing or unreadable images were left out, the first of prompt {first}, seed 1" in card["deviations"]
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["score"].isna().sum() == 1 and table["error"].str.contains("not a readable image").sum() == 1
    assert "not a readable image" in (tmp_path / "scorecard.html").read_text()


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"GIF89a", b"BM", b""])
def test_only_png_is_opened_whatever_a_file_is_called(run, tmp_path, content, monkeypatch):
    """An EPS would start Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="not a readable image"):
        open_png(content)
    shutil.copytree(run[0] / "images", tmp_path / "images")
    (tmp_path / "images/seed1/00000/samples/0000.png").write_bytes(content)
    with pytest.raises(ValueError, match="0000.png is not a readable image"):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("L", (300, 300)).save(tmp_path / "a.png")
    assert open_png(tmp_path / "a.png").size == (300, 300)
    with pytest.raises(ValueError, match="300 x 300 pixels are more than 80000"):
        open_png(tmp_path / "a.png", max_pixels=80_000)


def test_results_go_neither_into_a_sealed_directory_nor_to_a_file(run, tmp_path, capsys):
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed" / "manifest.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="sealed"):
        rescore(run[0], tmp_path / "sealed", log=quiet)
    for out in ("file", "file/below"):
        with pytest.raises(SystemExit, match=r"error: .*file is a file, and results need a directory"):
            main([str(run[0]), "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit, match="is not a run of eval.generation.generate"):
        main([str(tmp_path)])


def test_a_kill_while_writing_leaves_no_card_of_other_scores(run, tmp_path, monkeypatch):
    """scorecard.json is removed first and written last."""
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    from eval import scorecard as module

    class Killed(BaseException):
        pass

    def replacing(path):
        if path.name == "scorecard.html":
            raise Killed
        return real(path)

    real = module.replacing
    monkeypatch.setattr(module, "replacing", replacing)
    with pytest.raises(Killed):
        rescore(tmp_path, tmp_path, CONFIG, log=quiet)
    assert not (tmp_path / "scorecard.json").exists()


def test_no_scored_image_is_an_error():
    with pytest.raises(ValueError, match="none of"):
        scorecard([], with_ids(make_prompts(1)), CONFIG)


def test_a_card_of_another_schema_is_refused(tmp_path):
    (tmp_path / "scorecard.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="has schema 1, and this version reads schema 2"):
        load(tmp_path)
    (tmp_path / "scorecard.json").write_text("{")
    with pytest.raises(ValueError, match="is not a scorecard"):
        load(tmp_path)


# ---- Judges


class Counting(ShapesDetector):
    """Counts its questions; dies at one image."""

    def __init__(self, dies_at=10**9):
        self.asked, self.dies_at = 0, dies_at

    def answer(self, requests):
        if self.asked + len(requests) > self.dies_at:
            raise RuntimeError("out of memory")
        self.asked += len(requests)
        return super().answer(requests)


@pytest.fixture(scope="module")
def distinct(tmp_path_factory):
    """A run with different images."""
    path = tmp_path_factory.mktemp("distinct")

    def sampler(prompts, seeds, height, width):
        rng = [np.random.default_rng(seed) for seed in seeds]
        return [Image.fromarray(r.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for r in rng]

    generate(sampler, catalog.prompts(CONFIG), CONFIG, path, log=quiet)
    return path


BATCHED = CONFIG.model_copy(update={"judge_batch_size": 16})


def test_a_dying_judge_is_one_error_and_loses_no_answer(distinct, tmp_path):
    with pytest.raises(
        ValueError, match=r"judge shapes-detector stopped at seed0/.*RuntimeError: out of memory; 48 answers are kept"
    ):
        judge_run(distinct, tmp_path, {"detector": Counting(dies_at=50)}, BATCHED, log=quiet)
    rest = Counting()
    judge_run(distinct, tmp_path, {"detector": rest}, BATCHED, log=quiet)
    assert rest.asked == 120 - 48
    again = Counting()
    judge_run(distinct, tmp_path, {"detector": again}, BATCHED, log=quiet)
    assert again.asked == 0


def test_equal_images_are_asked_about_once_and_another_revision_again(run, tmp_path):
    first, other = Counting(), Counting()
    other.revision = "0" * 64
    judge_run(run[0], tmp_path, {"detector": first}, CONFIG, log=quiet)
    assert first.asked == 5  # the corner pixel
    judge_run(run[0], tmp_path, {"detector": other}, CONFIG, log=quiet)
    assert other.asked == 5


def test_shards_of_judging_together_ask_everything_once(distinct, tmp_path):
    judges = [Counting() for _ in range(3)]
    for i, judge in enumerate(judges):
        judge_run(distinct, tmp_path, {"detector": judge}, CONFIG, shard=i, shards=3, log=quiet)
    assert sum(judge.asked for judge in judges) == 120 and min(judge.asked for judge in judges) > 20
    judge_run(distinct, tmp_path / "whole", {"detector": Counting()}, CONFIG, log=quiet)
    assert (tmp_path / "answers.parquet").read_bytes() == (tmp_path / "whole" / "answers.parquet").read_bytes()


def test_a_judge_that_fails_its_selftest_answers_nothing(distinct, tmp_path):
    class Stale(Counting):
        def selftest(self):
            raise ValueError("judge x takes a red square for nothing")

    stale = Stale()
    with pytest.raises(ValueError, match="takes a red square for nothing"):
        judge_run(distinct, tmp_path, {"detector": stale}, CONFIG, log=quiet)
    assert stale.asked == 0


def test_the_shapes_detector_passes_its_own_selftest(monkeypatch):
    ShapesDetector().selftest()
    monkeypatch.setattr("eval.judges.shapes_judge.detect", lambda image: {"circle": [{"color": "red"}]})
    with pytest.raises(ValueError, match="takes a red square for"):
        ShapesDetector().selftest()


def test_scores_without_answers_are_refused(distinct, tmp_path):
    judge_run(distinct, tmp_path, {"detector": Counting()}, CONFIG, shard=0, shards=2, log=quiet)
    with pytest.raises(ValueError, match="has no answer to .* judge the run first"):
        rescore(distinct, tmp_path / "out", CONFIG, judged=tmp_path, log=quiet)
    with pytest.raises(ValueError, match=r"has no judges.json: judge the run first"):
        rescore(distinct, tmp_path / "out", CONFIG, judged=tmp_path / "out", log=quiet)


class Foreign(Counting):
    name, model = "other", "another detector"


def test_a_score_by_another_judge_has_its_name_everywhere(run, tmp_path):
    card = rescore(run[0], tmp_path, CONFIG, judges={"detector": Foreign()}, log=quiet)
    assert card["name"] == "shapes[other]" and not card["settings"]["judges"][0]["official"]
    page = (tmp_path / "scorecard.html").read_text()
    assert "<h1>shapes[other]</h1>" in page and "not comparable to published" in page
    names = {metric["name"] for metric in model_index(card, "x")["results"][0]["metrics"]}
    assert "shapes[other], overall" in names and all(name.startswith("shapes[other]") for name in names)


def test_a_score_is_official_only_if_every_judge_is():
    geneval = catalog.benchmark("geneval")
    official = {skill: {"name": f"our-{skill}", "model": model} for skill, model in geneval.judges.items()}
    assert score_name(geneval, official) == "geneval"
    other = {**official, "color": {"name": "xkcd", "model": "colour names"}}
    assert score_name(geneval, other) == "geneval[our-detector+xkcd]"
    assert score_name(geneval, {}) == "geneval[no judge]"
    assert score_name(geneval, {"detector": official["detector"]}) == "geneval[our-detector]"


def test_published_scores_are_beside_ours_only_as_comparable_as_they_are(run):
    from eval.scorecards.make_card import _references, _scores

    geneval = catalog.benchmark("geneval")
    rows = [row for row in read_rows(run[0] / "scores.parquet") if row["split"] == "seen"]
    for row in rows:
        row["score"] = float(row["prompt_index"] % 8 != 0)
    scores = _scores(rows, with_ids(make_prompts(8)), "categories", {})
    official, other = (_references(geneval, name, scores, None) for name in ("geneval", "geneval[x]"))
    assert {r.within_noise for r in other} == {None} and len(official) == len(geneval.published) == 9
    nucleus = next(r for r in official if r.model == "Nucleus-Image" and r.category == "overall")
    assert nucleus.published == 0.87 and nucleus.within_noise is True and "2604.12163" in nucleus.source
    sdxl = next(r for r in official if r.model == "SDXL")
    assert sdxl.within_noise is False


def test_published_scores_are_compared_with_what_the_official_code_computes(run):
    from eval.scorecards.make_card import _references, _scores

    dpg = catalog.benchmark("dpg")
    rows = [row for row in read_rows(run[0] / "scores.parquet") if row["split"] == "seen"]
    for row in rows:
        row["score"] = float(row["prompt_index"] % 8 != 0)  # 0.875 on the mean
    for overall, within in ((88.79, True), (88.79 + 60, None)):
        official = {"overall": overall, "categories": {"entity": 93.0}}
        scores = _scores(rows, with_ids(make_prompts(8)), "prompts", {"official": official})
        compared = {(r.model, r.category): r for r in _references(dpg, "dpg", scores, official)}
        ours = compared["Nucleus-Image", "overall"]
        assert (ours.ours, ours.within_noise) == (overall, within)  # far from the mean: its noise is not known
        assert (compared["Nucleus-Image", "entity"].ours, compared["Nucleus-Image", "other"].ours) == (93.0, None)


def test_every_official_benchmark_has_peers_with_a_source_on_its_own_scale_and_by_its_own_categories():
    official = [name for name in catalog.registry.BENCHMARKS if name not in ("shapes", "captions")]
    assert not catalog.benchmark("shapes").published and not catalog.benchmark("captions").published
    dimensions = {"alignment", "text", "reasoning", "style", "diversity"}
    for name in official:
        benchmark = catalog.benchmark(name)
        rows = benchmark.published
        known = {"overall", *benchmark.tasks} | (
            dimensions if name.startswith("oneig") else {"entity", "attribute", "other"}
        )
        for row in rows:
            assert re.search(r"arXiv \d{4}\.\d{5}", row.source) and row.category in known
            assert benchmark.scale / 100 < row.score < benchmark.scale
        assert len({(row.model, row.category) for row in rows}) == len(rows)
        overall = {row.model for row in rows if row.category == "overall"}
        assert ("Nucleus-Image" in overall) == (name in ("geneval", "dpg", "oneig"))
        assert len(overall) >= 4 or name == "geneval2"  # of which few figures are published


def test_the_noise_of_training_is_the_spread_over_cards_of_other_weights(run):
    card = load(run[0])
    settings = card.settings.model_copy(update={"model_digests": {"merged": "other"}})
    overall = card.overall.model_copy(update={"mean": card.overall.mean + 0.1})
    other = card.model_copy(update={"settings": settings, "overall": overall})
    noise = with_training_noise(card, [other]).overall.noise
    assert noise.training == pytest.approx(0.1 / 2**0.5) and noise.training_runs == 2
    with pytest.raises(ValueError, match="of the weights"):
        with_training_noise(card, [card])
    with pytest.raises(ValueError, match="different prompts"):
        changed = settings.model_copy(update={"prompt_set_sha256": "0" * 64})
        with_training_noise(card, [other.model_copy(update={"settings": changed})])


def test_scoring_imports_no_torch():
    code = "import sys, eval.cli, eval.scorecard, eval.scorecards.compare, eval.scorecards.select_candidate, eval.generation.pipelines; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
