"""What people look at: the grid of images beside their prompts, and the scorecard as one page without outside files."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval.geneval import TASKS

RIGHT, WRONG, INK, PAPER = (20, 140, 60), (200, 40, 40), (30, 30, 30), (255, 255, 255)
FAILURES_SHOWN = 60


def draw_grid(
    rows: Sequence[Mapping[str, Any]], images_dir: str | Path, per_task: int = 8, tile_px: int = 96
) -> Image.Image:
    """Images of the first seed above their prompts, each with a tick or a cross; a line per task, held-out ones last.

    Of each task, `per_task` prompts evenly spaced over its list, the first image of each (and further images where
    there are fewer prompts): nothing is picked by score.
    """
    font = ImageFont.load_default(size=11)
    first_seed = min((row["seed"] for row in rows), default=0)
    lines: dict[tuple[bool, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["seed"] == first_seed:
            rank = TASKS.index(row["tag"]) if row["tag"] in TASKS else len(TASKS)
            lines.setdefault((row["split"] == "held_out", rank, row["tag"]), []).append(row)
    for line, found in lines.items():
        found.sort(key=lambda row: (row["image_index"], row["prompt_index"]))
        firsts = [row for row in found if row["image_index"] == found[0]["image_index"]]
        count = min(per_task, len(firsts))
        lines[line] = [firsts[i * len(firsts) // count] for i in range(count)]
        if len(firsts) < per_task:
            lines[line] = found[:per_task]
    gap, text_px, head_px = 8, 54, 18
    cell_w, line_h = tile_px + gap, head_px + tile_px + text_px
    grid = Image.new("RGB", (gap + per_task * cell_w, gap + max(1, len(lines)) * line_h), PAPER)
    draw = ImageDraw.Draw(grid)
    for number, ((held_out, _, tag), found) in enumerate(sorted(lines.items(), key=lambda item: item[0])):
        top = gap + number * line_h
        draw.text((gap, top), tag + (" (held out of training)" if held_out else ""), INK, font)
        for column, row in enumerate(found):
            _draw_cell(grid, draw, row, Path(images_dir), (gap + column * cell_w, top + head_px), tile_px, font)
    return grid


def _draw_cell(grid, draw, row, images_dir, corner, tile_px, font) -> None:
    left, top = corner
    if row["error"]:
        draw.rectangle((left, top, left + tile_px - 1, top + tile_px - 1), outline=WRONG)
    else:
        with Image.open(images_dir / row["file"]) as image:
            tile = image.convert("RGB")
        factor = tile_px / max(tile.size)
        size = [max(1, round(side * factor)) for side in tile.size]
        grid.paste(tile.resize(size, Image.Resampling.BICUBIC), (left, top))
    mark_px = 11
    x, y = left + 1, top + tile_px + 4
    if row["correct"]:
        joints = [(x, y + 0.55 * mark_px), (x + 0.35 * mark_px, y + 0.95 * mark_px), (x + mark_px, y + 0.1 * mark_px)]
        draw.line(joints, RIGHT, 3)
    else:
        draw.line((x, y, x + mark_px, y + mark_px), WRONG, 3)
        draw.line((x, y + mark_px, x + mark_px, y), WRONG, 3)
    indent = mark_px + 6
    for i, line in enumerate(_wrap(row["prompt"].removeprefix("a photo of "), font, tile_px - indent)[:4]):
        draw.text((left + indent, top + tile_px + 1 + 12 * i), line, INK, font)


def _wrap(text: str, font: ImageFont.ImageFont, width_px: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def render_page(card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], grid_path: str | Path) -> str:
    """The scorecard as HTML; the grid is inlined, and every text is escaped."""
    grid = base64.b64encode(Path(grid_path).read_bytes()).decode("ascii")
    counts, settings = card["counts"], {k: card[k] for k in ("config", "generation", "bootstrap")}
    seeds = ", ".join(str(seed) for seed in card["seeds"])
    parts = [
        f"<h1>{html.escape(card['benchmark'])} scorecard</h1>",
        f"<p>Overall <b>{_score(card['overall'])}</b>. {len(card['seeds'])} runs (seeds {seeds}); "
        f"{counts['scored']} of {counts['expected']} images scored, {counts['failed']} failed. Shares of right images "
        f"{_score(card['image_accuracy'])}, of prompts with any right image {_score(card['prompt_accuracy'])}.</p>",
        _table(card),
    ]
    if card["missing_tasks"]:
        parts.append(f"<p>Without an image, and left out: {html.escape(', '.join(card['missing_tasks']))}.</p>")
    if card["held_out"]:
        parts += ["<h2>Combinations held out of training</h2>", _table(card["held_out"])]
    parts += ["<h2>Images and prompts</h2>", f'<img alt="grid of images" src="data:image/png;base64,{grid}">']
    wrong = [row for row in rows if not row["correct"]]
    shown = wrong[:: max(1, len(wrong) // FAILURES_SHOWN)][:FAILURES_SHOWN]
    parts.append(f"<h2>Wrong images ({len(shown)} of {len(wrong)})</h2>")
    lines = "".join(
        f"<tr><td>{html.escape(str(row['file']))}</td><td>{html.escape(row['prompt'])}</td>"
        f"<td>{html.escape(row['reason'] or row['error'])}</td></tr>"
        for row in shown
    )
    parts.append(f"<table><tr><th>image</th><th>prompt</th><th>why</th></tr>{lines}</table>")
    parts += ["<h2>How</h2>", f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>"]
    style = (
        "body{font:15px sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left}"
        "td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}pre{background:#f5f5f5;padding:1em}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(card["benchmark"])} scorecard'
        f"</title><style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _score(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" &plusmn; {value['std']:.3f}")


def _table(scores: Mapping[str, Any]) -> str:
    lines = []
    for name, task in [*scores["tasks"].items(), ("overall", scores["overall"])]:
        low, high = task["interval"]
        cells = (_score(task), f"{low:.3f} to {high:.3f}", task.get("prompts", ""), task.get("images", ""))
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        lines.append(f"<tr><td>{html.escape(name)}</td>{numbers}</tr>")
    return (
        "<table><tr><th>task</th><th>mean &plusmn; deviation over seeds</th><th>95% interval over prompts</th>"
        f"<th>prompts</th><th>images</th></tr>{''.join(lines)}</table>"
    )
