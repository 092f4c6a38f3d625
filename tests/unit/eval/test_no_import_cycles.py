"""No module of eval/ imports itself by way of others, not even inside functions."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports anywhere, except for annotations (TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    annotations = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def test_imports_of_eval_have_no_cycle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "eval").rglob("*.py")}
    assert len(files) > 40
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert "eval.official.oneig_files" in graph["eval.oneig"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle
