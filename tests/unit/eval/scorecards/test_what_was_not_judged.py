"""A scorecard counts missing images, black images and images without a judge separately, and is written even where the
official script stops."""

from __future__ import annotations

import numpy as np
import official_data
import pytest
from PIL import Image

from eval import catalog
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.scorecard import judge_run, rescore
from eval.scorecards.card import load
from tasks.publishing.card import _scores


def quiet(_):
    pass


class Judge:
    """Answers that are determined by skill and image."""

    model, spec = "m", {}

    def __init__(self, skill):
        self.skill = self.name = skill
        self.revision = skill * 8

    def selftest(self):
        pass

    def answer(self, requests):
        return [self.one([float(np.asarray(image).mean()) / 255 for image in r.images]) for r in requests]

    def one(self, levels):
        if self.skill == "diversity":
            return [abs(a - b) for i, a in enumerate(levels) for b in levels[:i]]
        return {"vqa": "Yes", "ocr": "Open"}.get(self.skill, levels[0])


def run_of(folder, benchmark="oneig", black=lambda prompt, image: False, images=4, seeds=(0,)):
    """(run, its configuration): noise, and black pictures where `black` says so."""
    checkout = folder / "checkout"
    checkout.mkdir()
    config = EvalConfig(
        benchmark=benchmark,
        prompts_file=str(official_data.write_oneig(checkout)),
        seeds=seeds,
        images_per_prompt=images,
        image_size_px=8,
    )
    prompts = catalog.prompts(config)
    places = iter([(prompt["id"], image) for _ in seeds for prompt in prompts for image in range(images)])

    def sampler(texts, noises, height, width):
        rng = np.random.default_rng(noises[0])
        pictures = rng.integers(0, 256, (len(texts), height, width, 3), dtype=np.uint8)
        return [Image.fromarray(p * (0 if black(*next(places)) else 1)) for p in pictures]

    generate(sampler, prompts, config, folder / "run", log=quiet)
    return folder / "run", config


def scored(run, config, *skills, out):
    rescore(run, out, config, judges={skill: Judge(skill) for skill in skills}, log=quiet)
    return load(out)


def test_images_without_a_judge_are_not_called_missing_on_card_page_and_model_card(tmp_path):
    run, config = run_of(tmp_path)
    card = scored(run, config, "vqa", "ocr", out=tmp_path / "scored")
    assert card.deviations.count("no judge for reasoning, style, diversity: left out") == 1
    assert not any("missing" in note for note in card.deviations) and card.missing_tasks == []
    counts = card.counts
    assert (counts.expected, counts.generated, counts.scored, counts.failed, counts.not_judged) == (20, 20, 16, 0, 4)
    page = (tmp_path / "scored" / "scorecard.html").read_text()
    assert "16 scored, 0 failed, 4 without a judge of their score" in page
    assert not any(wrong in page for wrong in ("without an image", "failed</b>", "missing or unreadable"))
    assert "16 of 20 images scored, 0 failed, 4 without a judge of their score" in _scores(card.model_dump(mode="json"))


def test_a_missing_image_is_counted_next_to_images_without_a_judge(tmp_path):
    run, config = run_of(tmp_path)
    (run / "images/seed0/00004/samples/0002.png").unlink()  # of reasoning, which has no judge
    (run / "images/seed0/00000/samples/0001.png").unlink()
    config = config.model_copy(update={"missing": "official"})
    card = scored(run, config, "vqa", "ocr", out=tmp_path / "scored")
    assert (card.counts.scored, card.counts.failed, card.counts.not_judged) == (15, 2, 3)
    assert any(note.startswith("2 missing or unreadable images were left out, the first of prompt ") for note in card.deviations)  # fmt: skip


def test_a_judge_of_diversity_alone_scores_every_prompt_as_the_official_code(tmp_path):
    run, config = run_of(tmp_path)
    card = scored(run, config, "diversity", out=tmp_path / "scored")
    assert list(card.tasks) == ["diversity"] and card.overall.prompts == 5
    assert card.overall.mean == pytest.approx(card.official["overall"])
    assert (card.counts.scored, card.counts.failed) == (20, 0)


@pytest.mark.parametrize("lost", ["black", "missing"])
def test_a_prompt_whose_first_image_is_lost_keeps_the_scores_of_its_others(tmp_path, lost):
    run, config = run_of(tmp_path, black=lambda prompt, image: lost == "black" and (prompt, image) == ("anime_001", 0))
    if lost == "missing":
        (run / "images/seed0/00001/samples/0000.png").unlink()
        config = config.model_copy(update={"missing": "official"})
    card = scored(run, config, *catalog.benchmark("oneig").judges, out=tmp_path / "scored")
    assert card.tasks["style"].mean == pytest.approx(card.official["categories"]["style"])
    assert card.tasks["diversity"].mean == pytest.approx(card.official["categories"]["diversity"])
    assert card.counts.failed == 1


@pytest.mark.parametrize("benchmark", ["oneig", "oneig-text"])
def test_where_the_official_script_of_text_stops_the_card_is_written_and_says_so(tmp_path, benchmark):
    run, config = run_of(tmp_path, benchmark, black=lambda prompt, image: prompt == "text_000")
    skills = [skill for skill in ("vqa", "ocr") if skill in catalog.benchmark(benchmark).judges]
    card = scored(run, config, *skills, out=tmp_path / "scored")
    assert card.official["categories"]["text"] is None and card.official["overall"] is None
    assert card.tasks["text"].official is None and card.tasks["text"].fixed == card.fixed["categories"]["text"] > 0
    (note,) = [note for note in card.deviations if "script" in note]
    assert note == (
        "seed 0: no official score of text: its script stops where the first picture that it reads is all black"
    )
    official = {path.name for path in (tmp_path / "scored" / "official" / "seed0").glob("*")}
    assert ("alignment_score_EN.csv" in official) == (benchmark == "oneig")
    assert not any(name.startswith("text") for name in official)
    if benchmark == "oneig":
        assert card.official["categories"]["alignment"] == pytest.approx(1.0)


def test_a_score_that_stops_at_one_seed_has_no_official_mean(tmp_path):
    calls = []

    def black(prompt, image):
        calls.append(prompt)
        return prompt == "text_000" and calls.count("text_000") <= 4  # of the first seed

    run, config = run_of(tmp_path, "oneig-text", black, seeds=(0, 3))
    card = scored(run, config, "ocr", out=tmp_path / "scored")
    assert card.official["overall"] is None and card.fixed["overall"] is not None
    assert len([note for note in card.deviations if "script" in note]) == 1


@pytest.mark.parametrize(
    "benchmark, skills, blacks, count",
    [("oneig", ("vqa", "ocr"), "", 20), ("oneig-text", ("ocr",), "", 8), ("oneig", ("ocr",), "text", 8)],
)
def test_a_seed_without_a_judged_image_has_no_part_in_the_official_scores(tmp_path, benchmark, skills, blacks, count):
    drawn = set()

    def black(prompt, image):  # of the second seed
        again = (prompt, image) in drawn
        drawn.add((prompt, image))
        return again and prompt.startswith(blacks)

    cards = []
    for seeds in ((0,), (0, 3)):
        drawn.clear()
        folder = tmp_path / f"{len(seeds)}"
        folder.mkdir()
        run, config = run_of(folder, benchmark, black, seeds=seeds)
        cards.append(scored(run, config, *skills, out=folder / "scored"))
    one, both = cards
    assert one.official["overall"] is not None and (both.official, both.fixed) == (one.official, one.fixed)
    assert both.overall.mean == one.overall.mean and both.overall.seeds == [0]
    assert f"{count} black images were left out, as the official code does" in both.deviations
    assert [path.name for path in (folder / "scored" / "official").iterdir()] == ["seed0"]


def test_judging_is_complete_with_a_judge_for_some_dimensions(tmp_path):
    run, config = run_of(tmp_path)
    judges = {skill: Judge(skill) for skill in ("vqa", "ocr")}
    assert judge_run(run, tmp_path / "judged", judges, config, log=quiet)["asked"] > 0
    assert judge_run(run, tmp_path / "judged", judges, config, log=quiet)["asked"] == 0
