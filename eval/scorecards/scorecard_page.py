"""The scorecard as a picture and pages: a grid of images with their prompts, and self-contained HTML pages.

    scorecard.html            scores, gallery, the first `PICTURES` failures
    failures/0002.html ...    the next `PICTURES` each, linked with one another

Every text of a page is escaped: prompts, reasons and settings come from data.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval.html_page import image, page, text
from eval.judging.images import open_png
from eval.scorecards.card import CategoryScore, Scorecard

RIGHT, WRONG, INK, PAPER = (20, 140, 60), (200, 40, 40), (30, 30, 30), (255, 255, 255)
SHOWN = 12  # best and worst images
FAILURE = 0.5  # below it an image is a failure; for right and wrong images, the wrong ones
PICTURES = 600  # failures of a page: its pictures take a few MB
THUMBNAIL_PX = 128
FAILURES = "failures"  # folder of their further pages
STYLE = """
.score{font-size:2.4em;font-weight:600}.muted{color:#666}.note{background:#fff3cd;color:inherit;padding:.4em .8em;margin:.3em 0}
td,th{padding:.25em .7em}tr.all td{font-weight:600}.scroll{overflow-x:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
figure{font-size:12px;line-height:1.3;overflow-wrap:anywhere}figure img{display:block;width:128px;
height:auto;min-height:32px;background:#eee;margin-bottom:4px}figcaption b.good{color:#148c3c}figcaption b.bad{color:#c82828}
details pre{background:#f5f5f5;padding:1em;overflow-x:auto}
"""


def draw_grid(
    rows: Sequence[Mapping[str, Any]], images_dir: str | Path, per_category: int = 8, tile_px: int = 96
) -> Image.Image:
    """Images of the first seed above their prompts, each with its mark; a line per category, held-out ones last. If a
    prompt has a real image, it is shown next to the generated one.

    Shows of each category `per_category` prompts, evenly spaced over its list, and the first image of each (more images
    if there are fewer prompts): nothing is chosen by score.
    """
    font = ImageFont.load_default(size=11)
    first_seed = min((row["seed"] for row in rows), default=0)
    lines: dict[tuple[bool, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["split"] == "held_out", r["prompt_index"], r["image_index"])):
        if row["seed"] == first_seed:
            lines.setdefault((row["split"] == "held_out", row["category"]), []).append(row)
    for line, rows in lines.items():
        rows.sort(key=lambda row: (row["image_index"], row["prompt_index"]))
        firsts = [row for row in rows if row["image_index"] == rows[0]["image_index"]]
        count = min(per_category, len(firsts))
        lines[line] = [firsts[i * len(firsts) // count] for i in range(count)]
        if len(firsts) < per_category:
            lines[line] = rows[:per_category]
    named = {category + (", held out" if held_out else ""): line for (held_out, category), line in lines.items()}
    laid_out = [part for name, line in named.items() for part in _lay_out(name, line, per_category)]
    gap, text_px, head_px = 8, 54, 18
    cell_w, line_h = tile_px + gap, head_px + tile_px + text_px
    grid = Image.new("RGB", (gap + per_category * cell_w, gap + max(1, len(laid_out)) * line_h), PAPER)
    draw = ImageDraw.Draw(grid)
    for i, (name, cells) in enumerate(laid_out):
        top = gap + i * line_h
        draw.text((gap, top), name, INK, font)
        for j, (row, is_real) in enumerate(cells):
            corner = gap + j * cell_w, top + head_px
            if is_real:
                _draw_picture(grid, draw, Path(images_dir) / row["reference"], corner, tile_px)
            else:
                _draw_tile(grid, draw, row, Path(images_dir), corner, tile_px, font)
    return grid


def _lay_out(
    name: str, rows: Sequence[Mapping[str, Any]], width: int
) -> list[tuple[str, list[tuple[Mapping[str, Any], bool]]]]:
    """Lines of (row, whether its real image is shown), at most `width` cells each."""
    if not any(row.get("reference") for row in rows):
        return [(name, [(row, False) for row in rows])]
    cells = [(row, is_real) for row in rows for is_real in (False, True)]
    width -= width % 2
    return [(f"{name}: generated, real", cells[i : i + width]) for i in range(0, len(cells), width)]


def _draw_picture(grid, draw, path: Path, corner: tuple[int, int], tile_px: int) -> None:
    left, top = corner
    tile = _thumbnail(path, tile_px)
    if tile is None:
        draw.rectangle((left, top, left + tile_px - 1, top + tile_px - 1), outline=WRONG)
    else:
        grid.paste(tile, (left, top))


def _draw_tile(grid, draw, row, images_dir: Path, corner: tuple[int, int], tile_px: int, font) -> None:
    left, top = corner
    _draw_picture(grid, draw, images_dir / ("" if row["error"] else row["file"]), corner, tile_px)
    mark_px = 11
    x, y = left + 1, top + tile_px + 4
    if row["score"] == 1:
        joints = [(x, y + 0.55 * mark_px), (x + 0.35 * mark_px, y + 0.95 * mark_px), (x + mark_px, y + 0.1 * mark_px)]
        draw.line(joints, RIGHT, 3)
    elif not row["score"]:
        draw.line((x, y, x + mark_px, y + mark_px), WRONG, 3)
        draw.line((x, y + mark_px, x + mark_px, y), WRONG, 3)
    else:
        draw.text((x - 1, y - 1), f".{round(100 * row['score']):02d}", INK, font)
    indent = mark_px + 6
    for i, line in enumerate(_wrap(row["prompt"].removeprefix("a photo of "), font, tile_px - indent)[:4]):
        draw.text((left + indent, top + tile_px + 1 + 12 * i), line, INK, font)


def _thumbnail(path: Path, side_px: int) -> Image.Image | None:
    """The image, as large as fits; None if it is missing, as for scores from kept answers."""
    if not path.is_file():
        return None
    try:
        image = open_png(path).convert("RGB")
    except ValueError:
        return None
    factor = side_px / max(image.size)
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)


def _wrap(words: str, font: ImageFont.ImageFont, width_px: int) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def render_page(
    card: Scorecard, rows: Sequence[Mapping[str, Any]], images_dir: str | Path, grid_path: str | Path
) -> str:
    """The scorecard as HTML, pictures inlined. Links to `failure_pages`, which are next to it."""
    images_dir = Path(images_dir)
    grid = image(Path(grid_path).read_bytes(), "grid of images")
    parts = [
        _headline(card),
        _table(card, {**card.tasks, "overall": card.overall}),
        _measures(card),
        _noises(card),
        _references(card),
        f"<h2>Images and prompts</h2>{grid}",
        *_gallery(rows, images_dir),
        _settings(card),
    ]
    if card.held_out:
        held_out = {**card.held_out.tasks, "overall": card.held_out.overall}
        parts.insert(2, "<h2>Combinations held out of training</h2>" + _table(card, held_out))
    return page(f"{card.name} scorecard", "".join(parts), STYLE)


def _number(value: float | None, scale: float = 1.0) -> str:
    """A score in [0, 1] in the benchmark's own scale."""
    return "" if value is None else _official(value * scale, scale)


def _official(value: float | None, scale: float) -> str:
    """A number that is in the benchmark's own scale."""
    return "" if value is None else f"{value:.{3 if scale == 1 else 2}f}"


def _range(score: CategoryScore, scale: float) -> str:
    return f"{_number(score.interval[0], scale)} to {_number(score.interval[1], scale)}"


def _headline(card: Scorecard) -> str:
    counts, overall = card.counts, card.overall
    unofficial = [judge.name for judge in card.settings.judges if judge.official is False]
    notes = list(card.deviations)
    if unofficial:
        notes.append(f"judged by {', '.join(unofficial)}, not by the benchmark's official judge: not comparable to published {card.benchmark} scores")  # fmt: skip
    if card.missing_tasks:
        notes.append(f"without an image, and left out: {', '.join(card.missing_tasks)}")
    seeds = ", ".join(map(str, card.seeds))
    not_judged = f", {counts.not_judged} without a judge of their score" if counts.not_judged else ""
    return (
        f"<h1>{text(card.name)}</h1>"
        f'<p><span class="score">{_number(overall.mean, card.scale)}</span> '
        f'<span class="muted">{card.interval.level:.0%} interval over prompts {_range(overall, card.scale)}</span></p>'
        + "".join(f'<p class="note">{text(note)}</p>' for note in notes)
        + f"<p>{overall.runs} sampling seeds ({seeds}). Images: {counts.expected} expected, {counts.generated} generated, "
        f"{counts.scored} scored, {counts.failed} failed{not_judged}. Share of images with full score "
        f"{_number(card.image_accuracy)}, of prompts with such an image {_number(card.prompt_accuracy)}.</p>"
    )


def _table(card: Scorecard, scores: Mapping[str, CategoryScore]) -> str:
    scale = card.scale
    kinds = [k for k in ("official", "fixed") if any(_differs(s, getattr(s, k), scale) for s in scores.values())]
    if kinds:  # both or neither: columns that equal the score are left out
        kinds = ["official", "fixed"]
    heads = ["category", "score", "interval over prompts", *kinds, "&plusmn; over seeds", "prompts", "images"]
    lines = []
    for name, score in scores.items():
        spread = "" if score.std is None else _number(score.std, scale)
        official = [_official(getattr(score, kind), scale) for kind in kinds]
        cells = [_number(score.mean, scale), _range(score, scale), *official, spread, score.prompts, score.images]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        lines.append(f"<tr{' class=all' if name == 'overall' else ''}><td>{text(name)}</td>{numbers}</tr>")
    head = "".join(f"<th{'' if i == 0 else ' class=n'}>{h}</th>" for i, h in enumerate(heads))
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _differs(score: CategoryScore, other: float | None, scale: float) -> bool:
    return other is not None and abs(other - scale * score.mean) > 1e-6 * scale


def _noises(card: Scorecard) -> str:
    noise, scale = card.overall.noise, card.scale
    training = f"models of other training seeds, machine included (deviation over {noise.training_runs} runs)"
    if noise.training is None:
        training = "models of other training seeds, machine included: needs their scorecards (--training-runs)"
    rows = [
        ("sampling", noise.sampling, "other noise on the same prompts (standard error)"),
        ("prompts", noise.prompts, "other prompts of the same kind (standard error)"),
        ("training", noise.training, training),
    ]  # fmt: skip
    cells = "".join(
        f'<tr><td>{name}</td><td class="n">{"not measured" if value is None else _number(value, scale)}</td>'
        f"<td>{text(what)}</td></tr>"
        for name, value, what in rows
    )
    return f"<h2>Three noises of the overall score</h2><table>{cells}</table>"


def _measures(card: Scorecard) -> str:
    """Numbers next to the score: distances of distributions, and the held-out flow loss."""
    parts = []
    if card.measures:
        rows = "".join(
            f'<tr><td>{text(name.replace("_", " "))}</td><td class="n">{value:.4g}</td></tr>'
            for name, value in card.measures.items()
        )
        parts.append(f"<h2>Distances to the real images</h2><table>{rows}</table>")
    if card.flow_loss:
        rows = "".join(
            f'<tr><td class="n">{row.timestep:g}</td><td class="n">{row.loss:.4f}</td>'
            f'<td class="n">{"" if row.standard_error is None else f"{row.standard_error:.4f}"}</td>'
            f'<td class="n">{row.prompts}</td></tr>'
            for row in card.flow_loss
        )
        parts.append(
            "<h2>Held-out flow loss</h2><p>Mean squared error of the predicted velocity of real images; timestep 1 is noise."
            '</p><table><tr><th class="n">timestep</th><th class="n">loss</th><th class="n">standard error over prompts</th>'
            f'<th class="n">prompts</th></tr>{rows}</table>'
        )
    return "".join(parts)


def _references(card: Scorecard) -> str:
    if not card.references:
        return ""
    words = {True: "within our interval", False: "outside our interval", None: "no interval of the official score"}
    if card.name != card.benchmark:
        words[None] = "not comparable: other or missing judges"

    def absent(category: str) -> str:
        return "no official score" if category in {"overall", *card.tasks} else "no such category here"

    rows = "".join(
        f'<tr><td>{text(r.model)}</td><td>{text(r.category)}</td><td class="n">{r.published:g}</td>'
        f'<td class="n">{_official(r.ours, card.scale)}</td>'
        f"<td>{absent(r.category) if r.ours is None else words[r.within_noise]}</td><td>{text(r.source)}</td></tr>"
        for r in card.references
    )
    return (
        "<h2>Published scores</h2><p>Single figures without error bars, of the official judges.</p>"
        '<div class="scroll"><table><tr><th>model</th><th>category</th><th class="n">published</th><th class="n">here</th>'
        f"<th>difference</th><th>source</th></tr>{rows}</table></div>"
    )


def _gallery(rows: Sequence[Mapping[str, Any]], images_dir: Path) -> Iterable[str]:
    scored = [row for row in rows if row["score"] is not None]
    ranked = sorted(scored, key=lambda row: (-row["score"], row["seed"], row["image_index"], row["prompt_index"]))
    best = [row for row in ranked if row["score"] >= FAILURE]
    worst = [row for row in ranked[::-1] if row["score"] < 1]
    yield f"<h2>Best</h2>{_figures(_spread(best), images_dir)}"
    yield f"<h2>Worst</h2>{_figures(_spread(worst), images_dir)}"
    failures = _failures(rows)
    yield f"<h2>Failures ({len(failures)})</h2>"
    yield _links(len(failures), 1)
    yield _figures(failures[:PICTURES], images_dir)


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    failures = [row for row in rows if row["error"] or (row["score"] is not None and row["score"] < FAILURE)]
    return sorted(failures, key=lambda row: (row["category"], row["prompt_index"], row["seed"], row["image_index"]))


def failure_pages(
    card: Scorecard, rows: Sequence[Mapping[str, Any]], images_dir: str | Path
) -> Iterator[tuple[str, str]]:
    """(path next to the scorecard's page, HTML) of each page of failures after the first `PICTURES`, made one at a time."""
    failures = _failures(rows)
    for number, begin in enumerate(range(PICTURES, len(failures), PICTURES), start=2):
        title = f"{card.name} failures, page {number}"
        body = _figures(failures[begin : begin + PICTURES], Path(images_dir))
        yield _page_path(number), page(title, f"<h1>{text(title)}</h1>{_links(len(failures), number)}{body}", STYLE)


def _page_path(number: int) -> str:
    return f"{FAILURES}/{number:04d}.html"


def _links(failures: int, current: int) -> str:
    """Links from one page of failures to the others; "" if there is one page."""
    begins = range(0, failures, PICTURES)
    if len(begins) < 2:
        return ""
    links = []
    for number, begin in enumerate(begins, start=1):
        span = f"{begin + 1} to {min(begin + PICTURES, failures)}"
        path = "scorecard.html" if number == 1 else _page_path(number)
        place = path if current == 1 else f"../{path}"
        links.append(span if number == current else f'<a href="{place}">{span}</a>')
    return f"<p>Failures {', '.join(links)}</p>"


def _spread(ranked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first of each category, then the second of each, and so on, up to `SHOWN`."""
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in ranked:
        by_category.setdefault(row["category"], []).append(row)
    turns = max(map(len, by_category.values()), default=0)
    picked = [rows[i] for i in range(min(turns, SHOWN)) for _, rows in sorted(by_category.items()) if i < len(rows)]
    return picked[:SHOWN]


def _figures(rows: Sequence[Mapping[str, Any]], images_dir: Path) -> str:
    figures = []
    for row in rows:
        shown = "" if row["error"] else _inlined(images_dir / row["file"])
        shown = shown or '<p class="muted">no picture</p>'
        if row.get("reference"):
            shown += (
                _inlined(images_dir / row["reference"], "real image") + '<p class="muted">above: generated, real</p>'
            )
        figures.append(f"<figure>{shown}<figcaption>{_caption(row)}</figcaption></figure>")
    return f'<div class="gallery">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def _inlined(path: Path, alt: str = "") -> str:
    """The picture as an element; "" if it is missing."""
    picture = _thumbnail(path, THUMBNAIL_PX)
    if picture is None:
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return image(buffer.getvalue(), alt, "jpeg")


def _caption(row: Mapping[str, Any]) -> str:
    score = "failed" if row["score"] is None else _number(row["score"])
    kind = "good" if row["score"] is not None and row["score"] >= FAILURE else "bad"
    reason = "<br>".join(text(line) for line in (row["error"] or row["reason"]).splitlines())
    return (
        f'<b class="{kind}">{score}</b> {text(row["prompt"])} <span class="muted">{text(row["category"])}, seed '
        f"{row['seed']}, image {row['image_index']}</span>{'<br>' + reason if reason else ''}"
    )


def _settings(card: Scorecard) -> str:
    lines = []
    for key, value in card.settings.model_dump(mode="json").items():
        shown = value if isinstance(value, (str, int, float)) else json.dumps(value)
        shown = "none" if shown in ("null", "") else shown
        lines.append(f"<tr><td>{text(key.replace('_', ' '))}</td><td><code>{text(shown)}</code></td></tr>")
    rest = json.dumps({"config": card.config, "generation": card.generation}, indent=1)
    method = f"Intervals: {card.interval.level:.0%}, {card.interval.method}."
    return (
        f"<h2>Settings that move the score</h2><table>{''.join(lines)}</table><p>{text(method)}</p>"
        f"<details><summary>Configuration as recorded</summary><pre>{text(rest)}</pre></details>"
    )
