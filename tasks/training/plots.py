"""Curves, expert allocation and sample grids of a training stage as one self-contained HTML page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from eval.files import read_json_lines
from eval.html_page import data_uri, image, page, text

PANELS = (
    ("loss", "loss (velocity MSE)", ("loss",)),
    ("bins", "loss by timestep", ("loss_t/",)),
    ("grad", "gradient norm before clipping", ("grad_norm",)),
    ("speed", "images per second", ("images_per_s",)),
    ("expert", "experts", ("expert/",)),
)
# Statistics of each layer, from `RouterTrace.statistics`.
ALLOCATION = (
    ("dropped", "share of tokens that no expert took"),
    ("experts_max", "most experts on one token"),
    ("entropy", "entropy of a token's scores (1: uniform)"),
)
LAYER_TAG = re.compile(r"expert/layer(\d+)/(\w+)")


def training_html(checkpoints: Path) -> str:
    """The page of one sealed `checkpoints` directory: metrics.jsonl as curves, the routers' statistics of each layer from
    tensorboard/ as maps of layers and steps, samples/*.png in order of steps."""
    rows = [row for _, row in read_json_lines(checkpoints / "metrics.jsonl")]
    parts = [f"<h2>{text(checkpoints.name)}</h2>"]
    if rows:
        last = rows[-1]
        parts.append(
            f"<p>step {last['step']}, loss {last['loss']:.4f}, {last.get('images_per_s', 0.0):.0f} images/s</p>"
            f'<img alt="training curves" src="{_curves(rows)}">'
        )
    if allocation := allocation_by_layer(checkpoints / "tensorboard"):
        parts.append(
            "<h3>expert allocation by layer</h3>"
            f'<img alt="expert allocation by layer" src="{_allocation(allocation)}">'
            "<p>By tokens of an image: python -m model.routing_report CHECKPOINT --latents DIR --out DIR</p>"
        )
    for picture in sorted((checkpoints / "samples").glob("*.png")):
        parts.append(f"<h3>{text(picture.stem)}</h3>{image(picture.read_bytes(), 'samples')}")
    return page(f"Training: {checkpoints.name}", "".join(parts), "body{max-width:none}")


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
    return _png(figure)


def allocation_by_layer(tensorboard: Path) -> dict[str, dict[int, dict[int, float]]]:
    """Statistic -> layer -> logged step -> value; empty without MoE layers or event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not tensorboard.is_dir():
        return {}
    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})  # all events
    events.Reload()
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for tag in sorted(events.Tags()["scalars"]):
        if match := LAYER_TAG.fullmatch(tag):
            by_step = {event.step: event.value for event in events.Scalars(tag)}
            curves.setdefault(match[2], {})[int(match[1])] = dict(sorted(by_step.items()))
    return curves


def _allocation(statistics: dict[str, dict[int, dict[int, float]]]) -> str:
    """PNG data URI: a map for each statistic, with a row per MoE layer and a column per logged step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = sorted(statistics[ALLOCATION[0][0]])
    figure = Figure(figsize=(15, 1.6 + 0.14 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, title) in zip(figure.subplots(1, len(ALLOCATION)), ALLOCATION):
        steps = list(statistics[name][layers[0]])
        values = [list(statistics[name][layer].values()) for layer in layers]
        # Columns are logged steps, evenly spaced except the first and the last.
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axis)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        shown = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
        axis.set_xticks(shown, [str(steps[i]) for i in shown])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.tick_params(labelsize=7)
    return _png(figure)


def _png(figure: Any) -> str:
    """Data URI of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return data_uri(buffer.getvalue())
