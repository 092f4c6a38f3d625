"""Scorecards of random answers: order never matters, a missing image never helps, and intervals contain their means."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import stats
from eval.benchmarks.base import Benchmark, Judged
from eval.config import EvalConfig
from eval.judging.answers import SEALED, Answers
from eval.judging.run import score_rows
from eval.scorecards.card import Scorecard
from eval.scorecards.make_card import scorecard, with_training_noise

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
randoms = st.integers(0, 2**64 - 1).map(random.Random)  # cases are drawn by Python's generator, which is faster


class Graded(Benchmark):
    """The judge's number is the score."""

    name, judges, tasks, images_per_prompt = "graded", {"grade": "m"}, ("a", "b"), 3

    def score_image(self, prompt, answers):
        return answers["grade"], ""


class ByCategory(Graded):
    pooling = "categories"


JUDGE = {"grade": {"name": "grader", "model": "m", "revision": "0" * 64, "spec": {}}}


class Run:
    """Random answers about the images of some prompts; None for an image that is missing."""

    def __init__(self, rng, size: int = 6):
        self.benchmark = rng.choice([Graded, ByCategory])()
        values = rng.choice([[0.0, 1.0], [0.1, 0.7, 1 / 3], [1.0, 1.0, 1.0, 0.0]])
        self.prompts = [
            {"id": f"p{i}", "prompt": f"prompt {i}", "tag": rng.choice("ab"), "split": rng.choice(["seen", "seen", "held_out"])}
            for i in range(1, rng.randrange(2, size))
        ]  # fmt: skip
        self.prompts.insert(0, {"id": "p0", "prompt": "prompt 0", "tag": "a", "split": "seen"})
        self.grades = {
            (seed, prompt["id"], image): None if rng.random() < 0.2 else rng.choice(values)
            for seed in (0, 1)
            for prompt in self.prompts
            for image in range(3)
        }
        self.grades[0, "p0", 0] = self.grades[1, "p0", 0] = 0.5

    def card(self, rng=None, digest: str = "w") -> Scorecard:
        """With `rng`, everything is given in another order."""

        def mixed(items):
            items = list(items)
            return rng.sample(items, len(items)) if rng else items

        name = f"{__name__}:{type(self.benchmark).__name__}"
        config = EvalConfig(benchmark=name, seeds=(0, 1), images_per_prompt=3, missing="official")
        answered = {
            seed: {
                prompt["id"]: Judged([None if (g := self.grades[seed, prompt["id"], i]) is None else {"grade": g} for i in range(3)])
                for prompt in mixed(self.prompts)
            }
            for seed in (0, 1)
        }  # fmt: skip
        index = {prompt["id"]: i for i, prompt in enumerate(self.prompts)}
        rows = [
            {
                "seed": seed, "prompt_index": index[key], "prompt_id": key, "image_index": image, "prompt": key, "error": "",
                "category": self.prompts[index[key]]["tag"], "split": self.prompts[index[key]]["split"], "sha256": f"{seed}{key}{image}",
                "file": f"{seed}/{key}/{image}",
            }
            for (seed, key, image), grade in mixed(self.grades.items())
            if grade is not None
        ]  # fmt: skip
        scored = score_rows(rows, self.prompts, self.benchmark, answered)
        return scorecard(scored, self.prompts, config, {"provenance": {"model": digest}}, JUDGE, answered)

    def means(self, split: str = "seen") -> tuple[dict[str, Fraction], list[Fraction]]:
        """{category: mean of its images}, [mean of each prompt's images]."""
        images: dict[str, list[Fraction]] = {}
        prompts = []
        for prompt in (prompt for prompt in self.prompts if prompt["split"] == split):
            grades = [self.grades[seed, prompt["id"], i] for seed in (0, 1) for i in range(3)]
            known = [Fraction(grade) for grade in grades if grade is not None]
            if known:
                images.setdefault(prompt["tag"], []).extend(known)
                prompts.append(sum(known) / len(known))
        return {name: sum(values) / len(values) for name, values in images.items()}, prompts


@SETTINGS
@given(randoms)
def test_a_card_does_not_depend_on_the_order_of_images_prompts_or_answers(rng):
    run = Run(rng)
    assert run.card(rng).model_dump() == run.card().model_dump()


@SETTINGS
@given(randoms)
def test_the_overall_score_is_the_plain_mean_of_categories_or_of_prompts_without_held_out_ones(rng):
    run = Run(rng)
    card = run.card()
    categories, prompts = run.means()
    chosen = list(categories.values()) if run.benchmark.pooling == "categories" else prompts
    assert card.overall.mean == pytest.approx(float(sum(chosen) / len(chosen)), abs=1e-12)
    if run.benchmark.pooling == "categories":
        assert {name: task.mean for name, task in card.tasks.items()} == pytest.approx({k: float(v) for k, v in categories.items()})  # fmt: skip
    assert (card.held_out is None) == (not run.means("held_out")[1])


@SETTINGS
@given(randoms)
def test_without_an_answered_image_no_count_rises_and_no_fixed_score(rng):
    run = Run(rng)
    before = run.card()
    known = [key for key, grade in run.grades.items() if grade is not None and key[1] != "p0"]
    if not known:
        return
    run.grades[rng.choice(known)] = None
    after = run.card()
    assert after.counts.expected == before.counts.expected
    assert after.counts.scored == before.counts.scored - 1 and after.counts.failed == before.counts.failed + 1
    assert after.overall.images <= before.overall.images and after.overall.prompts <= before.overall.prompts
    for name, task in after.tasks.items():
        assert task.images <= before.tasks[name].images and task.prompts <= before.tasks[name].prompts
    assert after.fixed["overall"] <= before.fixed["overall"] + 1e-12
    said = f"{after.counts.failed} missing or unreadable images were left out, the first of prompt "
    assert any(note.startswith(said) for note in after.deviations)


@SETTINGS
@given(randoms)
def test_intervals_contain_their_means_and_noises_add_up(rng):
    card = Run(rng, size=9).card()
    for score in [card.overall, *card.tasks.values(), *(card.held_out.tasks.values() if card.held_out else ())]:
        low, high = score.interval
        assert 0 <= low <= score.mean <= high <= 1 and low < high
        if score.noise.sampling is not None:
            parts = math.hypot(score.noise.sampling, score.noise.prompts)
            assert parts == pytest.approx(score.standard_error, rel=1e-9)


@SETTINGS
@given(randoms)
def test_the_noise_of_training_is_the_same_from_whichever_card_the_others_are_added(rng):
    run, cards = Run(rng), []
    for i in range(rng.randrange(2, 4)):
        run.grades = {key: rng.choice([0.0, 1.0]) for key in run.grades}
        cards.append(run.card(digest=f"weights {i}"))
    spreads = []
    for order in itertools.permutations(cards):
        noise = with_training_noise(order[0], order[1:]).overall.noise
        assert noise.training_runs == len(cards)
        spreads.append(noise.training)
    values = [card.overall.mean for card in cards]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert spreads == pytest.approx([std] * len(spreads), abs=1e-12)


@SETTINGS
@given(randoms)
def test_a_narrower_level_gives_an_interval_inside_and_more_prompts_alike_a_narrower_one(rng):
    values = rng.choice([[0.0], [1.0], [0.0, 0.5, 1.0]])
    prompts = [[rng.choice(values) for _ in range(rng.randrange(1, 5))] for _ in range(rng.randrange(1, 9))]
    weight = rng.choice(["image", "prompt"])
    wide, narrow = (stats.interval(prompts, level, weight) for level in (0.99, 0.8))
    assert 0 <= wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high <= 1
    repeated = stats.interval(prompts * 4, 0.99, weight)
    assert repeated.high - repeated.low < wide.high - wide.low and repeated.mean == pytest.approx(wide.mean)


@settings(SETTINGS, max_examples=15)
@given(randoms)
def test_answers_of_several_runs_are_sealed_as_the_same_bytes_whatever_is_merged_first(rng):
    rows = [((f"image {i}", f"question {j}", "judge"), rng.random()) for i in range(4) for j in range(2)]
    parts = [rng.sample(rows, rng.randrange(len(rows) + 1)) for _ in range(3)]  # of overlapping images
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):  # a sync takes milliseconds

        def merged(name: str, *sources) -> str:
            """The answers of some folders, or rows, in one folder."""
            with Answers(Path(folder, name), write=True) as answers:
                for source in sources:
                    other = Answers(Path(folder, source)) if isinstance(source, str) else None
                    answers.add(source if other is None else [(key, other[key]) for key in other])
                answers.seal()
            return name

        a, b, c = (merged(f"part{i}", part) for i, part in enumerate(parts))
        whole = [
            merged("left", merged("ab", a, b), c),
            merged("right", a, merged("bc", b, c)),
            merged("reversed", c, b, a),
            merged("at once", *parts),
        ]
        (content,) = {Path(folder, name, SEALED).read_bytes() for name in whole}
        assert len(Answers(Path(folder, "left"))) == len({key for part in parts for key, _ in part}) and content
