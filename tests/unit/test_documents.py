"""References in documents exist, and the README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(document):
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_the_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_every_command_of_the_readme_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"^    (?!\s)(.+)$", README.replace("\\\n", ""), re.M):
        words = shlex.split(line, comments=True)
        if words[:2] == ["pyflyte", "--config"]:
            words[1:3] = []
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), line
        elif words[0] == "pyflyte":
            file, workflow = [word for word in words[2:] if not word.startswith("--")][:2]
            assert re.search(rf"@workflow\ndef {workflow}\(", (ROOT / file).read_text()), line
            options = [word.removeprefix("--") for word in words[4:] if word.startswith("--")]
            signature = re.search(rf"def {workflow}\((.*?)\) ->", (ROOT / file).read_text(), re.S)[1]
            assert all(f"{option}:" in signature for option in options if option != "remote"), line
        else:
            assert words[0] == "cp" and (ROOT / words[1]).is_file(), line


def test_the_index_of_decisions_lists_every_file():
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\]\((\w+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("*.md")} - {"README.md"}


DECISIONS = sorted(path for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("document", DECISIONS, ids=lambda path: path.stem)
def test_every_decision_has_a_date_a_context_a_choice_and_consequences(document):
    entries = re.split(r"^## ", document.read_text(), flags=re.M)[1:]
    complete = r".+\n\d{4}-\d{2}-\d{2}[^*]*\.\s\*\*Context\*\*:\s.+\*\*Choice\*\*:\s.+\*\*Consequences\*\*:\s.+"
    assert entries and not [entry.partition("\n")[0] for entry in entries if not re.fullmatch(complete, entry, re.S)]


def test_code_refers_to_every_file_of_decisions_and_to_no_other():
    sources = [path for name in ("model", "tasks", "eval", "workflows") for path in (ROOT / name).rglob("*.py")]
    referred = {link for path in sources for link in re.findall(r"docs/decisions/\w+\.md", path.read_text())}
    assert referred == {path.relative_to(ROOT).as_posix() for path in DECISIONS}
