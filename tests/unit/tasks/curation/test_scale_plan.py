"""The plan of curating a large corpus follows from the recipe, and docs/scale.md has what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

from tasks.curation import plan

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "scale.md"


def printed(capsys, *arguments: str) -> str:
    assert plan.main(arguments) == 0
    return capsys.readouterr().out


def test_the_document_has_what_the_command_prints(capsys):
    text = DOCUMENT.read_text()
    for line in printed(capsys).splitlines():
        assert line in text, line


def test_ten_times_the_images_take_ten_times_the_core_hours_and_no_more_sub_tasks(capsys):
    rows = []
    for images in ("7e7", "7e8"):
        lines = printed(capsys, "--images", images, "--recipe", "nucleus_17b").splitlines()
        rows.append([cell.strip() for cell in next(x for x in lines if "passes 1 and 2" in x).split("|")])
    assert rows[0][2] == rows[1][2] == "2,000"
    hours = [float(row[6].replace(",", "")) for row in rows]
    assert 9.9 < hours[1] / hours[0] < 10.1


def test_the_pairs_of_unrelated_hashes_are_few_within_4_bits_and_very_many_within_14():
    assert 5e3 < plan.within(700e6, 4) < 1.5e4
    assert 5e11 < plan.within(700e6, 14) < 1.5e12


def test_what_cannot_be_planned_is_one_line(capsys):
    assert plan.main(["--images", "-1"]) == 1
    assert re.match(r"ValueError: images=-1.0 must be above 0\n$", capsys.readouterr().out)
