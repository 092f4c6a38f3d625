"""The results of a run, as lines for the terminal and as a page for Flyte's console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import html_page
from eval.html_page import image, text
from tasks.encoding.ledger import REPORT
from tasks.encoding.ledger import summary as ledger_summary
from tasks.encoding.report import PAGE, title
from tasks.manifest import load_manifest


def lines(
    pipeline: Path,
    scorecard: Path,
    curated: Path,
    encoded: Sequence[Path] = (),
    further: Sequence[Path] = (),
) -> list[str]:
    """The scores, and the paths of the results.

    Args:
        encoded: the artifacts of texts, and of each stage's latents.
        further: scorecards of further benchmarks.
    """
    card, *others = (json.loads((path / "scorecard.json").read_text()) for path in (scorecard, *further))
    measures = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in card.get("measures", {}).items()]
    losses = ", ".join(f"{row['loss']:.3f} at t={row['timestep']:g}" for row in card.get("flow_loss", []))
    return [
        *(_score(one) for one in (card, *others)),
        *([", ".join(measures)] if measures else []),
        *([f"held-out flow loss {losses}"] if losses else []),
        f"pipeline   {pipeline}",
        *(f"scorecard  {path / 'scorecard.html'}" for path in (scorecard, *further)),
        f"grid       {scorecard / 'grid.png'}",
        f"retention  {curated / 'report.html'}",
        *dict.fromkeys(_encoding(path) for path in encoded),  # stages of one size share latents
        f"lineage    python -m tasks.trace {pipeline}",
    ]


def _score(card: Mapping[str, Any]) -> str:
    """The overall score and its categories, on the benchmark's own scale."""
    overall, scale = card["overall"], card.get("scale", 1.0)
    spread = "" if overall["std"] is None else f" +- {scale * overall['std']:.3f} over {overall['runs']} seeds"
    tasks = ", ".join(f"{name} {scale * task['mean']:.2f}" for name, task in card["tasks"].items())
    return f"{card['name']} overall {scale * overall['mean']:.3f}{spread} ({tasks})"


def _encoding(directory: Path) -> str:
    report = json.loads((directory / REPORT).read_text())
    what = title(load_manifest(directory).kind, report)
    return f"encoding   {directory / PAGE} ({ledger_summary(report, what)})"


def page(pipeline: Path) -> str:
    """The model card (as text) and the image grid of a published directory, as one HTML page."""
    card, grid = text((pipeline / "README.md").read_text()), pipeline / "grid.png"
    picture = image(grid.read_bytes(), "generated images") if grid.is_file() else ""
    return html_page.page("Model card", f"{picture}<pre style='white-space:pre-wrap'>{card}</pre>")
