"""Chooses which candidate replaces the incumbent: WSM windows, guidance values or checkpoints of one model.

    incumbent, candidates: scorecards on development prompts --max-T--> one of them, or the incumbent

The best of many equal candidates always looks better: of 16, by .009 on GenEval. So candidates are scored on
development prompts (`prompt_set: development`), the test corrects for their number, the incumbent stays unless it is
beaten, and the official prompts are scored once, for the chosen candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from eval import stats
from eval.scorecards.card import not_comparable
from eval.scorecards.compare import prompt_means, read_scores


class Candidate(BaseModel):
    """p is adjusted for the number of candidates; lowest: simultaneous 95% lower limit of the gain."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    score: float
    difference: float
    lowest: float
    p: float


class Selection(BaseModel):
    """chosen: path of the candidate that beats the incumbent, or the incumbent's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    incumbent: str
    incumbent_score: float
    chosen: str
    candidates: list[Candidate]
    sentence: str


def select_candidate(
    incumbent: str | Path, candidates: Sequence[str | Path], *, allow_official: bool = False
) -> Selection:
    """
    Args:
        incumbent, candidates: folders with scorecard.json and scores.parquet.
        allow_official: also choose on official prompts, whose scores are then biased upwards.

    Raises:
        ValueError: no candidates, a repeated one, or cards that cannot be compared; official prompts without
            `allow_official`.
    """
    folders = [Path(incumbent), *map(Path, candidates)]
    if len(folders) < 2:
        raise ValueError("there is no candidate to choose from")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a scorecard is given twice: each candidate is one folder")
    read = [read_scores(folder) for folder in folders]
    base = read[0][0]
    for folder, (card, _) in zip(folders, read, strict=True):
        if reason := not_comparable(base, card):
            raise ValueError(f"{folders[0]} and {folder} cannot be compared: {reason}")
        if card.settings.prompt_set != "development" and not allow_official:
            raise ValueError(
                f"{folder} is of official prompts, which are to report and not to choose by: score it with "
                "prompt_set=development, or allow official prompts"
            )
    means = [prompt_means(rows, base.pooling) for _, rows in read]
    common = {
        name: sorted(set.intersection(*(set(of.get(name, ())) for of in means)))
        for name in sorted(set.intersection(*map(set, means)))
    }
    scores = [{name: [of[name][i] for i in ids] for name, ids in common.items() if ids} for of in means]
    choice = stats.choose(scores[0], scores[1:], "prompts" if base.pooling == "prompts" else "categories")
    scale = base.scale
    candidates = [
        Candidate(
            path=str(folder), score=scale * card.overall.mean, difference=scale * difference, lowest=scale * low, p=p
        )
        for folder, (card, _), difference, low, p in zip(
            folders[1:], read[1:], choice.differences, choice.low, choice.p, strict=True
        )
    ]
    chosen = folders[0] if choice.index is None else folders[1 + choice.index]
    best = max(candidates, key=lambda candidate: candidate.difference)
    if choice.index is None:
        sentence = (
            f"the incumbent stays: the best of {len(candidates)} differs by {best.difference:+.3f}, p {best.p:.3f}"
        )
    else:
        sentence = f"{best.path} beats the incumbent by {best.difference:+.3f}, p {best.p:.3f} among {len(candidates)}"
    return Selection(
        name=base.name,
        incumbent=str(folders[0]),
        incumbent_score=scale * base.overall.mean,
        chosen=str(chosen),
        candidates=candidates,
        sentence=sentence,
    )


def lines(selection: Selection, names: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The incumbent and the candidates, one per line, with their scores and tests.

    Args:
        names: {path of a scorecard: its name in the text}; default: the path.
    """
    rows = [f"  incumbent {selection.incumbent_score:.3f}  {names.get(selection.incumbent, selection.incumbent)}"]
    for c in selection.candidates:
        rows.append(
            f"  {c.score:.3f}  {c.difference:+.3f} (above {c.lowest:+.3f})  p {c.p:.3f}  {names.get(c.path, c.path)}"
        )
    return rows
