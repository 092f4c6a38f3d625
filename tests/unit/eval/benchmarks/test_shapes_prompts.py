"""The shapes benchmark asks GenEval's questions, about content that training has and has not shown."""

import re
from collections import Counter

import pytest

from eval.benchmarks.shapes.prompts import make_prompts
from eval.benchmarks.shapes.vocabulary import (
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_RELATIONS,
    SHAPES,
)
from eval.geneval import TASKS

PROMPTS = make_prompts()
SEEN = [m for m in PROMPTS if m["split"] == "seen"]
SHAPE, COLOR = f"({'|'.join(SHAPES)})", f"({'|'.join(COLORS)})"
WORDING = {
    "single_object": f"a photo of a {SHAPE}",
    "two_object": f"a photo of a {SHAPE} and a {SHAPE}",
    "counting": "a photo of (two|three|four) (circles|squares|triangles|crosses)",
    "colors": f"a photo of a {COLOR} {SHAPE}",
    "position": f"a photo of a {SHAPE} (left of|right of|above|below) a {SHAPE}",
    "color_attr": f"a photo of a {COLOR} {SHAPE} and a {COLOR} {SHAPE}",
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_geneval_s_wording_and_no_prompt_twice(task):
    texts = [m["prompt"] for m in PROMPTS if m["tag"] == task]
    assert texts and all(re.fullmatch(WORDING[task], text) for text in texts)
    assert len(set(texts)) == len(texts)


def test_the_standard_set_has_40_to_60_images_of_each_task():
    images = Counter()
    for metadata in SEEN:
        images[metadata["tag"]] += metadata["images"]
    assert set(images) == set(TASKS) and all(40 <= n <= 60 for n in images.values())


def test_metadata_says_what_the_prompt_says():
    by_text = {m["prompt"]: m for m in make_prompts(1000)}
    assert by_text["a photo of three crosses"]["include"] == [{"class": "cross", "count": 3}]
    assert by_text["a photo of three crosses"]["exclude"] == [{"class": "cross", "count": 4}]
    assert by_text["a photo of a circle left of a square"]["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
    assert by_text["a photo of a green circle and a red square"]["include"] == [
        {"class": "circle", "count": 1, "color": "green"},
        {"class": "square", "count": 1, "color": "red"},
    ]


def held_out_parts(metadata):
    include = metadata["include"]
    colored = frozenset((c["color"], c["class"]) for c in include if "color" in c)
    parts = len(colored & HELD_OUT_COLOR_SHAPE) + (colored in HELD_OUT_COLOR_PAIRS)
    for clause in include:
        if "position" in clause:
            parts += (clause["class"], clause["position"][0], include[0]["class"]) in HELD_OUT_RELATIONS
    return parts


def test_seen_prompts_hold_no_held_out_part_and_held_out_ones_exactly_one():
    for metadata in make_prompts(1000):
        assert held_out_parts(metadata) == (metadata["split"] == "held_out"), metadata["prompt"]


def test_every_held_out_combination_is_asked_for():
    held_out = [m for m in PROMPTS if m["split"] == "held_out"]
    counts = Counter(m["tag"] for m in held_out)
    assert counts == {
        "colors": len(HELD_OUT_COLOR_SHAPE),
        "position": len(HELD_OUT_RELATIONS),
        "color_attr": 2 * len(HELD_OUT_COLOR_PAIRS),
    }


def test_two_shapes_of_a_prompt_differ_and_so_do_their_colors():
    for metadata in make_prompts(1000):
        if len(metadata["include"]) == 2:
            a, b = metadata["include"]
            assert a["class"] != b["class"] and (a.get("color", 1) != b.get("color", 2))


def test_the_same_seed_draws_the_same_prompts_and_another_seed_others():
    assert make_prompts(8, seed=1) == make_prompts(8, seed=1) != make_prompts(8, seed=2)


def test_a_small_draw_is_spread_over_the_shapes():
    chosen = [m for m in make_prompts(12) if m["split"] == "seen" and m["tag"] == "color_attr"]
    assert len({tuple(c["class"] for c in m["include"]) for m in chosen}) == 12


@pytest.mark.parametrize("number", [1, 2, 8])
def test_no_task_asks_for_more_images_than_wanted(number):
    images = Counter()
    for metadata in make_prompts(number):
        images[metadata["tag"], metadata["split"]] += metadata["images"]
    assert all(images[task, "seen"] == number for task in TASKS)
    assert all(n <= max(1, number // 2) or n <= number for n in images.values())


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_prompts(0)
