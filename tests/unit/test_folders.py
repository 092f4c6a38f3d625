"""Folders stay small enough to read at a glance. docs/decisions/structure.md has the reasons for the exceptions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "benchmarks",
    "containers",
    "docs",
    "eval",
    "k8s",
    "model",
    "recipes",
    "tasks",
    "tests",
    "tools",
    "workflows",
)
LIMIT = 14  # files of a folder, without __init__.py
EXCEPTIONS = {
    "workflows": 18,  # a file for each command that users type
    "eval/judges": 20,  # a file for each judge, and their base and registry
    "tests/fuzz/seeds": 40,  # a file for each finding of the fuzz targets
    "docs/decisions": 18,  # a file for each topic, listed in its README
}


def test_no_folder_has_more_than_about_a_dozen_files():
    files = [path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file()]
    counts = Counter(
        path.parent.as_posix()
        for path in files
        if path.name != "__init__.py" and not any(name == "__pycache__" or name.startswith(".") for name in path.parts)
    )
    assert sum(counts.values()) > 400
    assert not {folder: count for folder, count in counts.items() if count > EXCEPTIONS.get(folder, LIMIT)}
