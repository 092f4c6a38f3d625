"""Two scorecards are compared prompt by prompt, a choice keeps the incumbent unless it is beaten, and scorecards that
cannot be compared are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from eval import catalog
from eval.benchmarks import benchmark_data
from eval.cli import main
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judges.shapes_judge import ShapesDetector
from eval.scorecard import rescore
from eval.scorecards.card import comparison_key, load, not_comparable, scored_by
from eval.scorecards.compare import compare_runs, compare_to_incumbent, lines
from eval.scorecards.select_candidate import select_candidate

CONFIG = EvalConfig(prompts_per_task=12, seeds=(0, 1), image_size_px=8, prompt_set="development")


class Chance(ShapesDetector):
    """Finds the objects in this share of the images: the first byte of an image decides."""

    def answer(self, requests):
        return [json.loads(request.images[0].text["objects"]) for request in requests]


def objects_of(prompt):
    """Objects that the rule finds right for the prompt."""
    boxes = {"left of": (0, 40), "right of": (80, 40), "above": (40, 0), "below": (40, 80)}
    result = {}
    for clause in prompt["include"]:
        x, y = boxes[clause["position"][0]] if "position" in clause else (40, 40)
        item = {"box": [x, y, x + 9, y + 9], "score": 1.0, "color": clause.get("color", "red")}
        result.setdefault(clause["class"], []).extend([item] * clause["count"])
    return result


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes the scorecard of a model that is right with a given chance."""
    from PIL import PngImagePlugin

    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()  # the page is not what is tested here, and takes most of the time
    patch.setattr("eval.scorecards.scorecard_page.render_page", lambda *_: "page")
    patch.setattr("eval.scorecards.scorecard_page.failure_pages", lambda *_: ())
    patch.setattr("eval.scorecards.scorecard_page.draw_grid", lambda *_: Image.new("RGB", (1, 1)))

    def make_run(name, chance, config=CONFIG, judge=None, seed=0):
        path = folder / name
        if (path / "scorecard.json").exists():
            return path
        prompts = catalog.prompts(config)
        rng = np.random.default_rng([seed, *name.encode()])
        generate(lambda p, s, h, w: [Image.new("RGB", (8, 8))] * len(p), prompts, config, path,
                 provenance={"model": name}, log=lambda _: None)  # fmt: skip
        for i, prompt in enumerate(prompts):
            for file in path.glob(f"images/seed*/{i:05d}/samples/*.png"):
                info = PngImagePlugin.PngInfo()
                info.add_text("objects", json.dumps(objects_of(prompt) if rng.random() < chance else {}))
                info.add_text("file", str(file.relative_to(path)))
                Image.new("RGB", (8, 8)).save(file, pnginfo=info)
        rescore(path, path, config, judges={"detector": judge or Chance()}, log=lambda _: None)
        return path

    yield make_run
    patch.undo()


@pytest.mark.slow
def test_the_objects_of_this_test_are_right(make):
    card = json.loads((make("perfect", 1.0) / "scorecard.json").read_text())
    assert card["overall"]["mean"] == 1.0 and card["overall"]["interval"][0] < 1.0


def test_a_clear_gain_is_better_and_the_other_way_round_worse(make):
    a, b = make("low", 0.4), make("high", 0.9)
    there, back = compare_runs(a, b), compare_runs(b, a)
    assert there.overall.verdict == "better" and back.overall.verdict == "worse"
    assert there.overall.difference == pytest.approx(-back.overall.difference)
    assert there.overall.b == pytest.approx(json.loads((b / "scorecard.json").read_text())["overall"]["mean"])
    assert there.differing["model_digests"] == ({"model": "low"}, {"model": "high"})
    assert set(there.categories) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert there.held_out is not None and there.held_out.difference > 0
    assert any("differs: model_digests" in line for line in lines(there))


def test_equal_models_cannot_be_told_apart_and_the_smallest_visible_difference_is_stated(make):
    comparison = compare_runs(make("same1", 0.8), make("same2", 0.8))
    assert comparison.overall.verdict == "cannot tell" and comparison.overall.visible > 0.02
    assert "the smallest visible difference is" in comparison.sentence
    assert compare_runs(make("same1", 0.8), make("same2", 0.8), margin=0.5).sentence.startswith("equal within +-0.5")


def test_categories_are_corrected_for_their_number(make):
    comparison = compare_runs(make("same1", 0.8), make("same2", 0.8))
    assert all(c.verdict == "cannot tell" for c in comparison.categories.values())
    assert all(0 < c.p <= 1 for c in comparison.categories.values())


@pytest.mark.slow
def test_other_prompts_and_other_judges_are_not_compared(make):
    class Other(Chance):
        name, revision = "other", "1" * 64

    official = make("official", 0.8, CONFIG.model_copy(update={"prompt_set": "official"}))
    judged = make("judged", 0.8, judge=Other())
    for run, message in ((official, "of different prompts"), (judged, "judged by shapes-detector at .* by other at")):
        with pytest.raises(ValueError, match=message):
            compare_runs(make("low", 0.4), run)
        verdict, sentence = compare_to_incumbent(make("high", 0.9), run)
        assert verdict is None and "shapes" in sentence and "not compared with the incumbent" in sentence


def test_two_cards_have_one_key_if_and_only_if_they_can_be_compared(make):
    card = load(make("high", 0.9))
    (judge,) = card.settings.judges
    settings = [
        {},
        {"guidance_scale": 99.0, "model_digests": {"model": "x"}},  # compared: these are what a comparison is about
        {"prompt_set_sha256": "0" * 64},
        {"judges": [judge.model_copy(update={"revision": "0" * 64})]},
        {"judges": [judge, judge.model_copy(update={"role": "color"})]},
    ]
    cards = [card.model_copy(update={"settings": card.settings.model_copy(update=change)}) for change in settings]
    cards += [card.model_copy(update={"benchmark": "other", "name": "other"}), card.model_copy(update={"version": "2"})]
    assert [not_comparable(card, other) is None for other in cards] == [True, True, *[False] * 5]
    for a in cards:
        for b in cards:
            assert (comparison_key(a) == comparison_key(b)) == (not_comparable(a, b) is None)
            same = scored_by(a.model_dump(mode="json")) == scored_by(b.model_dump(mode="json"))
            assert same == (not_comparable(a, b) is None)


def test_settings_that_differ_are_named_with_a_drop(make):
    low = make("guided", 0.4, CONFIG.model_copy(update={"guidance_scale": 99.0}))
    verdict, sentence = compare_to_incumbent(make("high", 0.9), low)
    assert verdict == "worse" and sentence.endswith("; settings that differ, too: guidance_scale")


def test_a_drop_beyond_noise_is_one_and_noise_is_none(make):
    assert compare_to_incumbent(make("high", 0.9), make("low", 0.4))[0] == "worse"
    assert compare_to_incumbent(make("low", 0.4), make("high", 0.9))[0] == "better"
    verdict, sentence = compare_to_incumbent(make("same1", 0.8), make("same2", 0.8))
    assert verdict == "cannot tell" and "cannot tell" in sentence


def test_the_candidate_that_beats_the_incumbent_is_chosen(make):
    candidates = [make("same2", 0.8), make("perfect", 1.0), make("low", 0.4)]
    selection = select_candidate(make("same1", 0.8), candidates)
    assert selection.chosen == str(candidates[1]) and "beats the incumbent" in selection.sentence
    assert selection.candidates[1].p <= 0.05 < min(selection.candidates[0].p, selection.candidates[2].p)
    assert selection.candidates[1].lowest > 0


@pytest.mark.slow
def test_of_equal_candidates_the_incumbent_stays(make):
    candidates = [make(f"equal{i}", 0.8) for i in range(4)]
    selection = select_candidate(make("same1", 0.8), candidates)
    assert selection.chosen == str(make("same1", 0.8)) and selection.sentence.startswith("the incumbent stays")


@pytest.mark.slow
def test_official_prompts_are_not_for_choosing(make):
    config = CONFIG.model_copy(update={"prompt_set": "official"})
    a, b = make("official", 0.8, config), make("official2", 0.8, config)
    with pytest.raises(ValueError, match="to report and not to choose by"):
        select_candidate(a, [b])
    assert select_candidate(a, [b], allow_official=True).chosen == str(a)
    with pytest.raises(ValueError, match="given twice"):
        select_candidate(a, [a])
    with pytest.raises(ValueError, match="no candidate"):
        select_candidate(a, [])


# ---- The command line


def test_the_command_compares_and_selects(make, capsys):
    assert main(["compare", str(make("low", 0.4)), str(make("high", 0.9))]) == 0
    assert capsys.readouterr().out.startswith("better: shapes ")
    assert main(["compare", str(make("low", 0.4)), str(make("high", 0.9)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"]["verdict"] == "better"
    assert main(["select", str(make("same1", 0.8)), str(make("perfect", 1.0))]) == 0
    assert f"chosen: {make('perfect', 1.0)}" in capsys.readouterr().out


def test_show_prints_the_card_and_opens_its_page(make, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = make("high", 0.9)
    assert main(["show", str(run)]) == 0 and opened == [(run / "scorecard.html").as_uri()]
    assert "note: development prompts" in capsys.readouterr().out
    assert main(["show", str(run / "scorecard.json"), "--no-open"]) == 0 and len(opened) == 1


def test_ls_names_benchmarks_judges_and_what_could_have_been_meant(capsys):
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert "geneval2" in out and "shapes-detector" in out
    assert main(["ls", "dpg"]) == 0 and "mplug" in capsys.readouterr().out
    assert main(["ls", "genevl"]) == 2
    assert "did you mean 'geneval'?" in capsys.readouterr().err


def no_network(url):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "./x", "--out", "r", "--benchmark", "shaps"], "did you mean 'shapes'?"),
        (["generate", "--model", "./x", "--out", "r", "--set", "guidance=4"], "guidance: there is no such key"),
        (["generate", "--model", "./x", "--out", "r", "--set", "guidance_scale=4"], "no model_index.json"),
        (["generate", "--model", "./x", "--out", "r", "--benchmark", "dpg"], "cannot be downloaded"),
        (["generate", "--model", "./x", "--out", "r", "--shard", "2/2"], "must be I/N"),
        (["generate", "--model", "./x", "--out", "r", "--set", "judges={detector: shape-detector}"], "did you mean"),
        (["generate", "--model", "./x", "--out", "r", "--set", "judges.eye=shapes-detector"], ""),
        (["judge", "nowhere"], "is not a run of eval.generation.generate"),
        (["score", "nowhere"], "is not a run of eval.generation.generate"),
        (["show", "nowhere"], "is not a scorecard"),
        (["compare", "nowhere", "nowhere"], "is not a scorecard"),
    ],
)
def test_every_mistake_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark_data, "read_url", no_network)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_recipe_is_a_configuration(tmp_path):
    from eval.cli import _parser, read_config

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\neval:\n  guidance_scale: 3.5\n  scheduler: {shift: 1.2}\n")
    arguments = ["generate", "--model", "./x", "--out", "r", "--config", str(recipe), "--limit", "3"]
    arguments += ["--set", "scheduler.stochastic_sampling=true", "--set", "seeds=[4, 5]"]
    config = read_config(_parser().parse_args(arguments))
    assert config.guidance_scale == 3.5 and config.scheduler.shift == 1.2 and config.scheduler.stochastic_sampling
    assert config.seeds == (4, 5) and config.prompts_per_task == 3
