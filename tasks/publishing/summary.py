"""One page about a published pipeline, for a Deck: its scores, its grid, its files. Everything from data is escaped."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from tasks.manifest import MANIFEST, load_manifest


def published_html(directory: str | Path) -> str:
    """A self-contained HTML fragment about a pipeline directory, sealed or not yet."""
    directory = Path(directory)
    parts = []
    if (directory / MANIFEST).is_file():
        manifest = load_manifest(directory)
        parents = "".join(
            f"<li>{escape(parent.kind)} <code>{escape(parent.digest)}</code></li>" for parent in manifest.parents
        )
        parts.append(f"<p>Sealed as <code>{escape(manifest.digest)}</code>, made from</p><ul>{parents}</ul>")
    scorecard = directory / "scorecard.json"
    if scorecard.is_file():
        scores = json.loads(scorecard.read_text())
        rows = "".join(
            _row(name, score) for name, score in {**scores["tasks"], "overall": scores["overall"]}.items()
        )
        parts.append(
            f"<h3>{escape(str(scores['benchmark']))}, {scores['overall']['runs']} seeds</h3><table><tr><th>task</th>"
            f"<th>mean</th><th>deviation over seeds</th><th>interval over prompts</th></tr>{rows}</table>"
        )
    grid = directory / "grid.png"
    if grid.is_file():
        data = base64.b64encode(grid.read_bytes()).decode()
        parts.append(f'<p><img alt="prompts and generated images" src="data:image/png;base64,{data}"></p>')
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = "".join(
        f"<tr><td><code>{escape(path.relative_to(directory).as_posix())}</code></td>"
        f"<td>{path.stat().st_size:,}</td></tr>"
        for path in files
    )
    parts.append(f"<h3>Files</h3><table><tr><th>file</th><th>bytes</th></tr>{lines}</table>")
    return "".join(parts)


def _row(name: str, score: dict) -> str:
    deviation = "one run" if score["std"] is None else f"{score['std']:.3f}"
    low, high = score["interval"]
    return (
        f"<tr><td>{escape(str(name))}</td><td>{score['mean']:.3f}</td><td>{deviation}</td>"
        f"<td>{low:.3f} to {high:.3f}</td></tr>"
    )
