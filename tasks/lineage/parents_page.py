"""The parents of an artifact as a page for Flyte's console, with links to their executions."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eval.html_page import Markup, page, table, text
from tasks import sealed
from tasks.manifest import Parent, load_manifest

CONSOLE = "NUCLEUS_CONSOLE"  # such as https://flyte.example.com/console; without it executions are named, not linked
MAX_PARENTS = 50
COLUMNS = ("kind", "digest", "execution", "task", "at")


def parents_page(directory: Path) -> str:
    """The artifact's digest, and a table of its parents: kind, digest, producer, and location.

    Executions come from the parents' own manifests; for an unreadable parent only its digest is shown.
    """
    manifest = load_manifest(directory)
    rows = map(_row, manifest.parents[:MAX_PARENTS])
    more = len(manifest.parents) - MAX_PARENTS
    rest = f"<p>and {more:,} more: python -m tasks.trace lists them</p>" if more > 0 else ""
    return page(
        f"Parents of {manifest.kind}",
        f"<h3>{text(manifest.kind)} <code>{text(manifest.digest)}</code></h3><p>made from</p>{table(COLUMNS, rows)}{rest}",
    )


def _row(parent: Parent) -> tuple:
    try:
        made_by = sealed.load(parent.uri).made_by if parent.uri else {}
    except Exception:  # a store may raise errors of any library, and a page must not fail the task
        made_by = {}
    return (
        parent.kind,
        Markup(f"<code>{text(parent.digest)}</code>"),
        _execution(made_by.get("execution", "")),
        made_by.get("task", ""),
        Markup(f"<code>{text(parent.uri)}</code>"),
    )


def _execution(name: str) -> str:
    """PROJECT/DOMAIN/NAME, with a link if the console's address is known."""
    console = os.environ.get(CONSOLE, "").rstrip("/")
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+)/([\w.-]+)", name)
    if not match or not console.startswith(("https://", "http://")):
        return name
    project, domain, execution = match.groups()
    url = f"{console}/projects/{project}/domains/{domain}/executions/{execution}"
    return Markup(f'<a href="{text(url)}" target="_blank" rel="noopener">{text(name)}</a>')
