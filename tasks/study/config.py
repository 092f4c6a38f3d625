"""The runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.config import Section, Seed


class StudyRun(Section):
    """One training of a study: a variant (a recipe with changes) and a training seed."""

    variant: str
    recipe: str
    overrides: tuple[str, ...]
    seed: Seed


def plan_runs(recipe: str, variants: str, seeds: str, overrides: Sequence[str]) -> list[StudyRun]:
    """Every variant with every training seed, the recipe itself first: the others are compared with it.

    Args:
        variants: names of recipes or paths of YAML files, separated by commas.
        seeds: whole numbers separated by commas.
        overrides: changes of every run.

    Raises:
        ValueError: no or repeated names or seeds; an override of train.seed; a seed that is not a whole number.
    """
    recipes = [recipe, *(name.strip() for name in variants.split(",") if name.strip())]
    names = {_label(name): name for name in recipes}
    if len(names) < len(recipes):
        raise ValueError(f"recipe and variants must differ from each other by name, got {', '.join(recipes)}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ValueError(f"seeds={seeds!r} must be whole numbers separated by commas, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds={seeds!r} must differ from each other: a repeated run is no new evidence")
    if outside := [seed for seed in numbers if not 0 <= seed < 2**32]:
        raise ValueError(f"seeds: {outside[0]} must be 0 or more and less than {2**32}")
    if any(change.partition("=")[0].strip() == "train.seed" for change in overrides):
        raise ValueError("overrides set train.seed, which a study varies: give --seeds instead")
    return [
        StudyRun(variant=label, recipe=name, overrides=(*overrides, f"train.seed={seed}"), seed=seed)
        for seed in numbers  # seed by seed: a study that is interrupted has compared something
        for label, name in names.items()
    ]


def _label(recipe: str) -> str:
    """The name of a recipe in tables: of a file, its own."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
