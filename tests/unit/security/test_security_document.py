"""docs/security.md names the tests and the code of its findings: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "security.md").read_text()
FILES = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
ROWS = {
    match[1]: match[0].split(" | ") for match in re.finditer(r"^\| (F\d+) \|.*$", TEXT, re.M)
}  # finding -> cells: name, what, state, code, tests


def test_every_test_that_it_names_exists():
    missing, path = [], None
    for file, name in re.findall(r"((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?", TEXT):
        if file:
            path = FILES.get(file.rpartition("/")[2])
            if path is None or not path.as_posix().endswith(f"/{file}"):
                missing.append(file)
        if name and (path is None or f"def {name}(" not in path.read_text()):
            missing.append(f"{path}::{name}")
    assert not missing


def test_every_finding_has_its_state_and_tests():
    assert [int(name[1:]) for name in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 45
    for name, cells in ROWS.items():
        assert len(cells) == 5 and re.search("fixed|accepted", cells[2]), name
        assert "::test_" in cells[4] or "tests/fuzz/test_" in cells[4], name


def test_the_code_that_the_findings_name_exists():
    folders = [ROOT, ROOT / "tasks", ROOT / "tasks" / "curation"]
    folders += [ROOT / "tasks" / "curation" / name for name in ("scoring", "sources")]
    folders += [ROOT / "tasks" / "publishing", ROOT / "eval", ROOT / "model"]
    for name, cells in ROWS.items():
        for place in re.findall(r"`([\w/]+(?:\.\w+)?)`", cells[3]):
            file, _, what = place.partition(".")
            if "/" not in file and what != "py":
                continue  # a function of the module before it
            result = [p for f in folders for p in (f / file, f / f"{file}.py") if p.exists()]
            assert result, f"{name}: {place}"
            if what not in ("", "py"):
                texts = [path.read_text() for path in result if path.is_file()]
                texts += [module.read_text() for path in result if path.is_dir() for module in path.rglob("*.py")]
                assert any(re.search(rf"\b{what}\b", text) for text in texts), f"{name}: {place}"
