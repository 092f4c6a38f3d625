"""The table of docs/evaluation.md names the judges of a command that names none, and the scores by them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eval import catalog
from eval.benchmarks import registry as benchmarks
from eval.judges import registry as judges
from eval.judging.protocols import score_name

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"


def table() -> dict[str, list[str]]:
    """First benchmark of a row -> its cells."""
    text = DOCUMENT.read_text()
    body = text[text.index("| benchmark | judges if none is named") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[2:]]
    return {name: row for row in rows for name in re.findall("`([^`]+)`", row[0])}


def named(benchmark: str, packaged: bool) -> str:
    """The name of the score by the recommended judges, without loading any weights."""
    loaded = benchmarks.load(benchmark)
    record = {}
    for skill, judge in catalog.recommended(loaded, packaged).items():
        module, _, attribute = judges.JUDGES[judge].target.partition(":")
        model = getattr(__import__(module, fromlist=[attribute]), attribute).model
        record[skill] = {"name": judge, "model": model}
    return score_name(loaded, record)


@pytest.mark.parametrize("benchmark", benchmarks.BENCHMARKS)
def test_the_table_has_each_benchmarks_judges_and_the_name_of_its_score(benchmark):
    _, chosen, score, without_gpu = table()[benchmark]
    assert set(re.findall("`([^`]+)`", chosen)) == set(catalog.recommended(benchmarks.load(benchmark)).values())
    assert f"`{named(benchmark, packaged=False)}`" in score
    assert f"`{named(benchmark, packaged=True)}`" in (score if without_gpu == "the same" else without_gpu)


def test_scores_that_the_table_calls_by_a_plain_name_are_by_official_judges_alone():
    plain = {name for name in benchmarks.BENCHMARKS if named(name, packaged=False) == name}
    assert plain == {"geneval2", "oneig-text", "oneig-text-zh", "shapes"}
