"""A study: recipes compared over training seeds.

    study.json                scores, losses, cost and routing of each run, differences with intervals
    study.md study.html       tables for a paper, and the same with plots as one page
    study.png                 losses and scores
    timing.json               minutes and devices

Only study.json is part of the digest; the other files also show times, which differ between machines (`LOGS`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.html_page import image, page
from eval.html_page import text as escape
from tasks.compare import Run, Variant, compare, draw, render

LOGS = ("study.md", "study.html", "study.png", "timing.json")
COST = ("steps", "images", "training_flops", "parameters", "active_parameters", "skipped_steps")


def write_study(runs: list[dict[str, Any]], out_dir: Path) -> dict[str, Any]:
    """Writes the study of `tasks.study.measure.describe_run`'s results, the first variant being the base.

    Returns:
        study.json's content.

    Raises:
        ValueError: runs were scored with different settings.
    """
    variants = _variants(runs)
    result = compare(variants)
    study = {
        "base": variants[0].name,
        "seeds": sorted({run["seed"] for run in runs}),
        "changes": {variant.name: _changes(runs, variants[0].name, variant.name) for variant in variants},
        **result,
        "smallest_visible": {
            name: {score: _half_width(value) for score, value in scores.items()}
            for name, scores in result["differences"].items()
        },
        "runs": [
            {key: value for key, value in run.items() if key not in ("settings", "timing", "parents")} for run in runs
        ],
    }
    timing = [{"variant": run["variant"], "seed": run["seed"], **run["timing"]} for run in runs]
    (out_dir / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    (out_dir / "timing.json").write_text(json.dumps(timing, indent=1) + "\n")
    draw(variants, out_dir / "study.png")
    text = markdown(study, timing)
    (out_dir / "study.md").write_text(text)
    picture = (out_dir / "study.png").read_bytes()
    (out_dir / "study.html").write_text(
        page(
            "Study",
            f"<h1>{escape(study['base'])} and variants</h1>{image(picture, 'losses and scores')}{_html_tables(text)}",
            "td,th{text-align:right}",
        )
    )
    return study


def _variants(runs: list[dict[str, Any]]) -> list[Variant]:
    scored = sorted({json.dumps([run["settings"]["eval"], run["scored_by"]], sort_keys=True) for run in runs})
    if len(scored) > 1:
        names = " and ".join(sorted({json.dumps(run["scored_by"]) for run in runs}))
        raise ValueError(
            "the runs of a study must have one eval section, and the same judges and prompts: their scores cannot be "
            f"compared ({names})"
        )
    variants: dict[str, Variant] = {}
    for run in runs:
        variant = variants.setdefault(run["variant"], Variant(run["variant"]))
        losses = [(step, loss) for step, loss in run["losses"]]
        variant.runs[run["seed"]] = Run(
            "", run["seed"], {}, run["scores"], losses, run["scored_by"]["score"], run["routing"]
        )
    return list(variants.values())


def _changes(runs: list[dict[str, Any]], base: str, name: str) -> dict[str, Any]:
    """Dotted keys of the recipe in which a variant differs from the base, with its value."""
    first, other = (next(_flat(run["settings"]) for run in runs if run["variant"] == each) for each in (base, name))
    return {key: other.get(key) for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}" if key else name).items()
        }
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{key}[{i}]").items()}
    return {} if key in ("name", "train.seed") else {key: value}


def _half_width(value: dict[str, Any]) -> float | None:
    """The smallest difference that is distinguishable from 0; None for a single seed."""
    return None if value["interval"] is None else (value["interval"][1] - value["interval"][0]) / 2


def markdown(study: dict[str, Any], timing: list[dict[str, Any]]) -> str:
    """The tables of a study."""
    lines = [
        f"# {study['base']} and variants",
        "",
        f"Training seeds {', '.join(map(str, study['seeds']))}. Means (standard deviations over training seeds).",
        "",
        render({"score": study["score"], "variants": study["variants"], "differences": {}}),
    ]
    if study["differences"]:
        lines += [
            "",
            f"Differences to {study['base']}, paired by seed, with 95% intervals (Student's):",
            "",
            *_differences(study),
        ]
    lines += ["", "Cost of one training:", "", *_costs(study, timing), "", "Changes:", ""]
    for name, changes in study["changes"].items():
        if name != study["base"]:
            lines.append(
                f"- {name}: " + ("; ".join(f"`{key}={json.dumps(v)}`" for key, v in changes.items()) or "none")
            )
    return "\n".join(lines) + "\n"


def _differences(study: dict[str, Any]) -> list[str]:
    lines = ["| variant | score | seeds | difference | interval | smallest visible | verdict |", "| --- " * 7 + "|"]
    for name, scores in study["differences"].items():
        for score, value in scores.items():
            interval, visible = "one seed: none", ""
            if value["interval"] is not None:
                low, high = value["interval"]
                interval, visible = f"{low:+.3f} to {high:+.3f}", f"{study['smallest_visible'][name][score]:.3f}"
            lines.append(
                f"| {name} | {score} | {value['runs']} | {value['mean']:+.3f} | {interval} | {visible} | {value['verdict'] or ''} |"
            )
    return lines


def _costs(study: dict[str, Any], timing: list[dict[str, Any]]) -> list[str]:
    titles = ("variant", "steps", "images", "FLOPs", "parameters", "active per token", "skipped steps", "minutes")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name in study["variants"]:
        cost = next(run["cost"] for run in study["runs"] if run["variant"] == name)
        minutes = [entry["minutes"] for entry in timing if entry["variant"] == name]
        cells = [f"{cost[key]:.3e}" if key == "training_flops" else f"{cost[key]:,}" for key in COST]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(minutes) / len(minutes):.1f} |")
    return lines


def _html_tables(text: str) -> str:
    """The Markdown of `markdown` as HTML: headings, tables, lists and paragraphs."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
