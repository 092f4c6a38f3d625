"""What a training stage looked like: curves and sample grids as one HTML page without outside files."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", "loss (velocity MSE)", ("loss",)),
    ("bins", "loss by timestep", ("loss_t/",)),
    ("grad", "gradient norm before clipping", ("grad_norm",)),
    ("speed", "images per second", ("images_per_s",)),
    ("expert", "experts", ("expert/",)),
)


def training_html(checkpoints: Path) -> str:
    """The page of one sealed `checkpoints` directory: metrics.jsonl as curves, samples/*.png in order of steps."""
    rows = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    parts = [f"<h2>{html.escape(checkpoints.name)}</h2>"]
    if rows:
        last = rows[-1]
        parts.append(
            f"<p>step {last['step']}, loss {last['loss']:.4f}, {last.get('images_per_s', 0.0):.0f} images/s</p>"
            f'<img alt="training curves" src="{_curves(rows)}">'
        )
    for picture in sorted((checkpoints / "samples").glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h3>{html.escape(picture.stem)}</h3><img alt="samples" src="data:image/png;base64,{data}">')
    return "<!doctype html><meta charset=utf-8><style>body{font-family:sans-serif}img{max-width:100%}</style>" + "".join(
        parts
    )


def _curves(rows: list[dict[str, Any]]) -> str:
    """PNG data URI of the curves over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (_, title, prefixes) in zip(figure.subplots(1, len(PANELS)), PANELS):
        names = sorted({name for row in rows for name in row if name.startswith(prefixes)})
        if prefixes == ("loss",):
            names = ["loss"]
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), linewidth=1, label=name.split("/")[-1])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if len(names) > 1:
            axis.legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
