"""The limit of words of a caption, where a recipe for made images is used for the user's own.

The captions of made images are short, and so are the limits of these recipes: they are raised for own images
(`sections.for_own_images`). A limit that the user chose is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model.recipe_yaml import SHIPPED, parse, read_recipe
from tasks.recipe import Recipe

KEY = ("curation", "captions", "max_words")


def is_chosen(recipe: str, overrides: Sequence[str]) -> bool:
    """Whether the user set curation.captions.max_words: by an override, in an overlay, or in a recipe of his own.

    A whole recipe with the limit of a shipped one for made images counts as its copy, in which nobody chose the limit.

    Args:
        recipe: as for `tasks.recipe.load_recipe`, which has accepted it with these overrides.
    """
    if any(_sets(override) for override in overrides):
        return True
    for data in _own_files(recipe):
        limit = _value(data)
        if limit is not None and ("base" in data or limit not in _shipped_limits()):
            return True
    return False


def line(before: Recipe, after: Recipe, chosen: bool) -> str:
    """One line: the limit that applies to own images, and why."""
    was, words = before.curation.captions.max_words, after.curation.captions.max_words
    if words == was:
        why = "curation.captions.max_words as you set it" if chosen else "curation.captions.max_words of the recipe"
    else:
        why = f"not {was}, which the recipe sets for made images; an override of curation.captions.max_words changes it"
    return f"own images: captions of up to {words} words are kept ({why})"


def _sets(override: str) -> bool:
    steps = override.partition("=")[0].strip().split(".")
    if steps != list(KEY[: len(steps)]):
        return False
    value: Any = parse(override.partition("=")[2], f"override {override!r}")
    return len(steps) == len(KEY) or _value(value, KEY[len(steps) :]) is not None


def _own_files(recipe: str) -> Iterator[dict[str, Any]]:
    """The mappings of the recipe's file and of its bases, up to the first that comes with the code."""
    if recipe.startswith("{"):  # a text, in which bases are merged
        yield parse(recipe, "the recipe's text")
        return
    path = Path(recipe)
    if (SHIPPED / f"{recipe}.yaml").is_file():
        return
    while not path.resolve().is_relative_to(SHIPPED):
        data = parse(path.read_bytes(), str(path))
        yield data
        if "base" not in data:
            return
        path = path.parent / data["base"]


def _value(data: Any, key: Sequence[str] = KEY) -> Any:
    for step in key:
        data = data.get(step) if isinstance(data, dict) else None
    return data


def _shipped_limits() -> set[int]:
    shipped = [Recipe.model_validate(read_recipe(path)) for path in sorted(SHIPPED.glob("*.yaml"))]
    return {recipe.curation.captions.max_words for recipe in shipped if recipe.source.is_made}
