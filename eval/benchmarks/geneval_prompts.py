"""Development prompts for GenEval: its six tasks, wording and metadata, over COCO's classes.

Choosing by the official 553 prompts would bias the reported score upwards. These are other samples of the same kind (a
few short ones, such as "a photo of a bench", are in both sets), for choosing settings and checkpoints. Wording after
prompts/create_prompts.py of github.com/djghosh13/geneval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.geneval import COLORS, TASKS
from eval.official.geneval_files import RELATIONS

NUMBERS = {2: "two", 3: "three", 4: "four"}
DEFAULT_PER_TASK = 100


def make_prompts(classes: Sequence[str], prompts_per_task: int | None = None, seed: int = 1) -> list[dict[str, Any]]:
    """Distinct prompts, ordered by task.

    Args:
        classes: names of objects; single_object has at most as many prompts.
        prompts_per_task: None is 100, about as many as the official set has.
        seed: of the draw.

    Raises:
        ValueError: `prompts_per_task` below 1.
    """
    number = DEFAULT_PER_TASK if prompts_per_task is None else prompts_per_task
    if number < 1:
        raise ValueError(f"prompts_per_task={prompts_per_task} must be at least 1")
    prompts: list[dict[str, Any]] = []
    for index, task in enumerate(TASKS):
        rng = np.random.default_rng((seed, index))
        drawn: dict[str, dict[str, Any]] = {}
        wanted = min(number, len(classes)) if task == "single_object" else number
        for _ in range(50 * wanted):
            prompt = _DRAW[task](rng, classes)
            drawn.setdefault(prompt["prompt"], {"tag": task, **prompt})
            if len(drawn) == wanted:
                break
        prompts += drawn.values()
    return prompts


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _two(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    first, second = rng.choice(len(names), size=2, replace=False)
    return names[first], names[second]


def _things(classes: Sequence[str]) -> list[str]:
    return [name for name in classes if name != "person"]  # people have no colour in prompts


def _single_object(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    name = classes[rng.integers(len(classes))]
    return {"include": [{"class": name, "count": 1}], "prompt": f"a photo of {_a(name)}"}


def _two_object(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    a, b = _two(rng, classes)
    return {
        "include": [{"class": a, "count": 1}, {"class": b, "count": 1}],
        "prompt": f"a photo of {_a(a)} and {_a(b)}",
    }


def _counting(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    name, count = classes[rng.integers(len(classes))], int(rng.integers(2, 5))
    plural = f"{name}es" if name.endswith("s") else f"{name}s"  # the official plural, such as "knifes" and "buses"
    return {
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural}",
    }


def _colors(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    things = _things(classes)
    name, color = things[rng.integers(len(things))], COLORS[rng.integers(len(COLORS))]
    return {"include": [{"class": name, "count": 1, "color": color}], "prompt": f"a photo of {_a(color)} {name}"}


def _position(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    a, b = _two(rng, classes)
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    return {
        "include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
        "prompt": f"a photo of {_a(a)} {relation} {_a(b)}",
    }


def _color_attr(rng: np.random.Generator, classes: Sequence[str]) -> dict[str, Any]:
    (a, b), (c, d) = _two(rng, _things(classes)), _two(rng, COLORS)
    return {
        "include": [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}],
        "prompt": f"a photo of {_a(c)} {a} and {_a(d)} {b}",
    }


_DRAW: dict[str, Callable[[np.random.Generator, Sequence[str]], dict[str, Any]]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
