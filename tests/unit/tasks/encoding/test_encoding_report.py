"""The encoding report accounts for every curated record, on a page and in the summary of a run."""

from __future__ import annotations

import json

import pytest

from tasks.encoding import report
from tasks.encoding.ledger import LEDGER_TABLE, Notes, summary
from tasks.manifest import seal
from tasks.publishing import summary as run_summary

COUNTS = {"held_out": 3, "not_drawn": 2, "undecodable": 1}
RECORD = {"key": "k", "record_id": "a" * 64, "locator": "<script>.tar:1.png", "row": 0}


@pytest.fixture
def encoded(tmp_path):
    """A latents artifact in which one of ten records was rejected, with its report and ledger."""
    folder = tmp_path / "latents"
    folder.mkdir()
    notes = Notes("shard")
    notes.reject(RECORD, "undecodable", "a & b " + "long " * 30)
    content = {"records": 10, "encoded": 4, "counts": COUNTS, "examples": notes.examples, "image_size_px": 32}
    notes.write(folder)
    (folder / "report.json").write_text(json.dumps(content))
    page = report.page(content, folder / LEDGER_TABLE, report.title("latents", content))
    (folder / report.PAGE).write_text(page)
    seal(folder, "latents", logs=(report.PAGE,))
    return folder, content, page


def test_the_page_accounts_for_every_record_and_escapes_what_users_named(encoded):
    _, _, page = encoded
    for cell in ("encoded", "held_out", "not_drawn", "undecodable", "40.0%", "30.0%", "20.0%", "10.0%"):
        assert f"<td>{cell}</td>" in page
    assert "latents at 32 px" in page and "4 of 10 curated records" in page
    assert "<script>" not in page and "&lt;script&gt;.tar:1.png" in page
    assert "a &amp; b " + ("long " * 30).strip() in page, "details are shown in full"


def test_counts_that_do_not_add_up_are_refused(encoded, tmp_path):
    folder, content, _ = encoded
    with pytest.raises(AssertionError):
        report.page(content | {"records": 11}, folder / LEDGER_TABLE, "latents")


def test_a_run_ends_with_the_encoding_ledger_of_texts_and_of_each_stage(encoded, tmp_path):
    folder, content, _ = encoded
    card = {"name": "shapes", "overall": {"mean": 0.5, "std": None, "runs": 1}, "tasks": {}}
    (tmp_path / "scorecard.json").write_text(json.dumps(card))
    lines = run_summary.lines(tmp_path, tmp_path, tmp_path, [folder, folder])
    (line,) = [line for line in lines if line.startswith("encoding")]
    assert str(folder / report.PAGE) in line and summary(content, "latents at 32 px") in line
    assert "4 of 10 curated records; 3 held out; 2 not drawn by the stage; 1 undecodable" in line
