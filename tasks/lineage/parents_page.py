"""What an artifact was made from, as a page for Flyte's console: each parent with its execution there, to walk on."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path

from tasks import sealed
from tasks.manifest import Parent, load_manifest

CONSOLE = "NUCLEUS_CONSOLE"  # such as https://flyte.example.com/console; without it executions are named, not linked
MAX_PARENTS = 50
STYLE = "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:4px 10px;text-align:left}"


def parents_page(directory: Path) -> str:
    """The artifact's digest, and a table of its parents: kind, digest, who made them, and where they are.

    Executions come from the parents' own manifests; of a parent that cannot be read, only its digest is known.
    """
    manifest = load_manifest(directory)
    rows = "".join(_row(parent) for parent in manifest.parents[:MAX_PARENTS])
    more = len(manifest.parents) - MAX_PARENTS
    rest = f"<p>and {more:,} more: python -m tasks.trace lists them" if more > 0 else ""
    return (
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>"
        f"<h3>{escape(manifest.kind)} <code>{escape(manifest.digest)}</code></h3><p>made from"
        f"<table><tr><th>kind<th>digest<th>execution<th>task<th>at</tr>{rows}</table>{rest}"
    )


def _row(parent: Parent) -> str:
    try:
        made_by = sealed.load(parent.uri).made_by if parent.uri else {}
    except Exception:  # a store may answer with an error of any library, and a page never fails the task
        made_by = {}
    cells = (
        escape(parent.kind),
        f"<code>{escape(parent.digest)}</code>",
        _execution(made_by.get("execution", "")),
        escape(made_by.get("task", "")),
        f"<code>{escape(parent.uri)}</code>",
    )
    return f"<tr><td>{'<td>'.join(cells)}</tr>"


def _execution(name: str) -> str:
    """PROJECT/DOMAIN/NAME, linked where the console's address is known."""
    console = os.environ.get(CONSOLE, "").rstrip("/")
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)/([\w.-]+)", name)
    if not match or not console.startswith(("https://", "http://")):
        return escape(name)
    project, domain, execution = match.groups()
    url = f"{console}/projects/{project}/domains/{domain}/executions/{execution}"
    return f'<a href="{escape(url)}" target="_blank" rel="noopener">{escape(name)}</a>'
