"""The prompts of the `shapes` benchmark: GenEval's six tasks, metadata and wording, over eval/benchmarks/shapes/vocabulary.py.

Each prompt has two keys in addition to GenEval's: "split" ("seen", or "held_out": no training caption says it and no
training image shows it) and "images" (the number of images of it in a run, since some tasks have few distinct prompts).
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np

from eval.benchmarks.shapes.vocabulary import (
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_COLOR_SHAPE,
    HELD_OUT_RELATIONS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
)
from eval.geneval import TASKS

DEFAULT_PER_TASK = 48
Metadata = dict[str, Any]


def make_prompts(prompts_per_task: int | None = None, seed: int = 0) -> list[Metadata]:
    """The benchmark's prompts, ordered by split ("seen" first), then by task.

    A task with fewer distinct prompts than requested repeats each as often as fits (key "images"), with other noise:
    the default of 48 gives 4 x 12 images for single_object, 12 x 4 for two_object and counting, 22 x 2 for colors,
    44 for position and 48 for color_attr. A held-out task has half of that: 2 x 12, 4 x 6 and 8 x 3.

    Args:
        prompts_per_task: images per task, seed and image per prompt, at most; None is the standard set of 48.
        seed: chooses prompts if there are more than requested.

    Raises:
        ValueError: `prompts_per_task` below 1.
    """
    wanted = DEFAULT_PER_TASK if prompts_per_task is None else prompts_per_task
    if wanted < 1:
        raise ValueError(f"prompts_per_task={prompts_per_task} must be at least 1, or None for {DEFAULT_PER_TASK}")
    prompts = []
    for split, number in (("seen", wanted), ("held_out", max(1, wanted // 2))):
        for index, task in enumerate(TASKS):
            groups = [[m for m in group if _split(m) == split] for group in _CANDIDATES[task]()]
            groups = [group for group in groups if group]
            rng = np.random.default_rng((seed, index, split == "held_out"))
            chosen = _draw(groups, number, rng)
            images = max(1, number // len(chosen)) if chosen else 1
            prompts += [{**metadata, "split": split, "images": images} for metadata in chosen]
    return prompts


def _draw(groups: list[list[Metadata]], number: int, rng: np.random.Generator) -> list[Metadata]:
    """`number` prompts, as evenly over the groups as possible, in the order of the candidates."""
    if not groups:
        return []
    ranked = []
    group_order = rng.permutation(len(groups))
    for g, group in enumerate(groups):
        for turn, i in enumerate(rng.permutation(len(group))):
            ranked.append((turn, int(group_order[g]), g, int(i)))
    return [groups[g][i] for g, i in sorted((g, i) for _, _, g, i in sorted(ranked)[:number])]


def _split(metadata: Metadata) -> str | None:
    """The split of a prompt; None if it contains a held-out part that its task does not test."""
    include = metadata["include"]
    colored = [(c["color"], c["class"]) for c in include if "color" in c]
    position = [c["position"][0] for c in include if "position" in c]
    if metadata["tag"] == "color_attr":
        if any(pair in HELD_OUT_COLOR_SHAPE for pair in colored):
            return None
        return "held_out" if frozenset(colored) in HELD_OUT_COLOR_PAIRS else "seen"
    if metadata["tag"] == "colors":
        return "held_out" if colored[0] in HELD_OUT_COLOR_SHAPE else "seen"
    if metadata["tag"] == "position":
        target, subject = (clause["class"] for clause in include)
        return "held_out" if (subject, position[0], target) in HELD_OUT_RELATIONS else "seen"
    return "seen"


def _single_object() -> list[list[Metadata]]:
    return [
        [{"tag": "single_object", "include": [{"class": s, "count": 1}], "prompt": f"a photo of a {s}"}] for s in SHAPES
    ]


def _two_object() -> list[list[Metadata]]:
    return [
        [
            {
                "tag": "two_object",
                "include": [{"class": a, "count": 1}, {"class": b, "count": 1}],
                "prompt": f"a photo of a {a} and a {b}",
            }
        ]
        for a, b in permutations(SHAPES, 2)
    ]


def _counting() -> list[list[Metadata]]:
    return [
        [
            {
                "tag": "counting",
                "include": [{"class": s, "count": n}],
                "exclude": [{"class": s, "count": n + 1}],
                "prompt": f"a photo of {word} {PLURALS[s]}",
            }
            for n, word in NUMBERS.items()
            if n > 1
        ]
        for s in SHAPES
    ]


def _colors() -> list[list[Metadata]]:
    return [
        [
            {
                "tag": "colors",
                "include": [{"class": s, "count": 1, "color": c}],
                "prompt": f"a photo of a {c} {s}",
            }
            for c in COLORS
        ]
        for s in SHAPES
    ]


def _position() -> list[list[Metadata]]:
    return [
        [
            {
                "tag": "position",
                "include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
                "prompt": f"a photo of a {a} {relation} a {b}",
            }
            for relation in RELATIONS
        ]
        for a, b in permutations(SHAPES, 2)
    ]


def _color_attr() -> list[list[Metadata]]:
    return [
        [
            {
                "tag": "color_attr",
                "include": [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}],
                "prompt": f"a photo of a {c} {a} and a {d} {b}",
            }
            for c, d in product(COLORS, repeat=2)
            if c != d
        ]
        for a, b in permutations(SHAPES, 2)
    ]


# A draw is spread evenly over groups: shapes, or ordered pairs of shapes.
_CANDIDATES = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
