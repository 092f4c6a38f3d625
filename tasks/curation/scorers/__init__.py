"""Pass 3: scorers by name. The recipe chooses one for each column (`curation.scorers`); `none` leaves it empty (NaN).

A scorer is a line of `SCORERS` and a function that builds it, imported only where a recipe names it. A rule never
rejects on an empty score.
"""

from __future__ import annotations

import difflib
import importlib
from typing import NamedTuple

from tasks.curation.config import ScorerConfig
from tasks.curation.scorers.base import Sample, Scorer

COLUMNS = ("watermark", "aesthetic", "nsfw", "similarity")


class ScorerSpec(NamedTuple):
    """A scorer that recipes can name.

    column: the column that it fills.
    build: `module:function` that builds it.
    revision: raise it when the scorer gives other numbers for the same image; scores are made again then.
    needs: "cpu", or "gpu" where it is hopeless without one.
    needs_image: False for one that looks at `Sample.pixels` and `gray` alone.
    """

    name: str
    column: str
    build: str
    revision: str = "1"
    needs: str = "cpu"
    needs_image: bool = True


SCORERS = (
    ScorerSpec("classical", "watermark", "tasks.curation.scorers.classical:watermark_scorer", needs_image=False),
    ScorerSpec("proxy", "aesthetic", "tasks.curation.scorers.classical:aesthetic_scorer", needs_image=False),
)


def chosen_scorers(config: ScorerConfig) -> list[ScorerSpec]:
    """The scorers that the recipe names, in the order of `COLUMNS`.

    Raises:
        ValueError: there is no scorer of that name for that column.
    """
    chosen = []
    for column in COLUMNS:
        name = getattr(config, column)
        known = {spec.name: spec for spec in SCORERS if spec.column == column}
        if name in known:
            chosen.append(known[name])
        elif name != "none":
            near = difflib.get_close_matches(name, ["none", *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(['none', *known])}"
            raise ValueError(f"curation.scorers.{column}={name!r} is unknown; {hint}")
    return chosen


def needs_image(config: ScorerConfig) -> bool:
    """Whether a scorer that the recipe names looks at `Sample.image`."""
    return any(spec.needs_image for spec in chosen_scorers(config))


def scorer_revisions(config: ScorerConfig) -> dict[str, str]:
    """Column -> name and revision of the scorer that fills it: what scores depend on, beside the image."""
    return {spec.column: f"{spec.name}@{spec.revision}" for spec in chosen_scorers(config)}


def build_scorers(config: ScorerConfig) -> list[Scorer]:
    """Builds the scorers that the recipe names.

    Raises:
        ValueError: see `chosen_scorers`.
    """
    scorers = []
    for spec in chosen_scorers(config):
        module, _, function = spec.build.partition(":")
        scorer = getattr(importlib.import_module(module), function)()
        assert scorer.column == spec.column, spec
        scorers.append(scorer)
    return scorers


__all__ = [
    "COLUMNS",
    "SCORERS",
    "Sample",
    "Scorer",
    "ScorerSpec",
    "build_scorers",
    "chosen_scorers",
    "needs_image",
    "scorer_revisions",
]
