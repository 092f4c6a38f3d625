"""Decks name an artifact's parents, with the execution that made each."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from flytekit import FlyteContextManager

from tasks.artifacts import produce
from tasks.lineage.parents_page import parents_page
from tasks.manifest import load_manifest, seal

EXECUTION = {"FLYTE_INTERNAL_EXECUTION_PROJECT": "nucleus", "FLYTE_INTERNAL_EXECUTION_DOMAIN": "production",
             "FLYTE_INTERNAL_EXECUTION_ID": "abc123", "FLYTE_INTERNAL_TASK_NAME": "tasks.x.task.make"}  # fmt: skip


class Links(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.hrefs: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "img", "iframe", "link")
        self.hrefs += [value for name, value in attrs if name == "href"]


@pytest.fixture
def curated(tmp_path, monkeypatch) -> Path:
    """A curated directory as made on a cluster."""
    path = tmp_path / "curated"
    path.mkdir()
    (path / "a.txt").write_text("a")
    with monkeypatch.context() as patch:
        for name, value in EXECUTION.items():
            patch.setenv(name, value)
        seal(path, "curated")
    return path


def child(tmp_path: Path, parents: list) -> Path:
    path = tmp_path / "merged"
    path.mkdir()
    (path / "b.txt").write_text("b")
    seal(path, "merged", parents)
    return path


def test_a_parents_execution_is_linked_in_the_console(curated, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_CONSOLE", "https://flyte.example.com/console/")
    page = parents_page(child(tmp_path, [curated]))
    url = "https://flyte.example.com/console/projects/nucleus/domains/production/executions/abc123"
    assert Links(page).hrefs == [url]
    for text in (load_manifest(curated).digest, "curated", "nucleus/production/abc123", "tasks.x.task.make"):
        assert text in page


@pytest.mark.parametrize("console", ["", "javascript:alert(1)//"])
def test_without_an_address_it_is_named(curated, tmp_path, monkeypatch, console):
    monkeypatch.setenv("NUCLEUS_CONSOLE", console)
    page = parents_page(child(tmp_path, [curated]))
    assert not Links(page).hrefs and "nucleus/production/abc123" in page


def test_a_parent_that_is_gone_is_named_by_its_digest(curated, tmp_path):
    path, digest = child(tmp_path, [curated]), load_manifest(curated).digest
    (curated / "manifest.json").unlink()
    page = parents_page(path)
    assert digest in page and "abc123" not in page


def test_what_a_manifest_says_is_escaped(tmp_path, curated, monkeypatch):
    place = tmp_path / "<img src=x>"
    curated.rename(place)
    assert "<img" not in parents_page(child(tmp_path, [place]))


def test_every_artifact_that_a_task_with_a_deck_makes_has_the_page(curated, tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    decks = FlyteContextManager.current_context().user_space_params.decks
    before = len(decks)
    produce("merged", lambda out: (out / "b.txt").write_text("b"), parents=[curated])
    (deck,) = decks[before:]
    assert deck.name == "Made from" and load_manifest(curated).digest in deck.html
