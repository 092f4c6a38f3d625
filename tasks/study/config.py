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
        variants: names of recipes or paths of YAML files, separated by commas. Each may be followed by changes of it:
            tiny:merge.last_n=1;train.optim.muon_lr=0.02
        seeds: whole numbers separated by commas.
        overrides: changes of every run.

    Raises:
        ValueError: no or repeated names or seeds; an override of train.seed; a seed that is not a whole number.
    """
    recipes = [recipe, *(name.strip() for name in variants.split(",") if name.strip())]
    parsed = dict(map(_variant, recipes))
    if len(parsed) < len(recipes):
        raise ValueError(f"recipe and variants must differ from each other by name, got {', '.join(recipes)}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ValueError(f"seeds={seeds!r} must be whole numbers separated by commas, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds={seeds!r} must differ from each other: a repeated run is no new evidence")
    if outside := [seed for seed in numbers if not 0 <= seed < 2**32]:
        raise ValueError(f"seeds: {outside[0]} must be 0 or more and less than {2**32}")
    changes = [*overrides, *(change for _, own in parsed.values() for change in own)]
    if any(change.partition("=")[0].strip() == "train.seed" for change in changes):
        raise ValueError("overrides set train.seed, which a study varies: give --seeds instead")
    return [
        StudyRun(variant=label, recipe=name, overrides=(*overrides, *own, f"train.seed={seed}"), seed=seed)
        for seed in numbers  # seed by seed, so that an interrupted study still has a comparison
        for label, (name, own) in parsed.items()
    ]


def _variant(text: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
    """(name in tables, (recipe, its own changes)) of `RECIPE` or `RECIPE:KEY=VALUE;KEY=VALUE`. A file is listed by its
    name."""
    recipe, _, changes = text.partition(":")
    label = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    own = tuple(change.strip() for change in changes.split(";") if change.strip())
    return ": ".join((label, "; ".join(own))) if own else label, (recipe, own)
