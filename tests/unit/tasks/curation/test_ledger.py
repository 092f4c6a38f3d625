import hashlib

import pyarrow as pa
import pytest

from tasks.curation import ledger

RULES = ["", "min_side", "", "near_duplicate", "undecodable", "", "no_caption", "watermark", "min_side"]


def book(rules: list[str], kept: list[bool] | None = None) -> pa.Table:
    kept = [not rule for rule in rules] if kept is None else kept
    rows = [{"key": f"k{i}", "kept": k, "rule": r, "detail": r} for i, (r, k) in enumerate(zip(rules, kept))]
    return pa.Table.from_pylist(rows, ledger.LEDGER)


def test_retention_adds_up_to_the_input():
    ledger.check(book(RULES))
    counts = {rule: RULES.count(rule) for rule in ledger.RULES}
    steps = ledger.retention(len(RULES), counts)
    assert steps[0]["input"] == len(RULES) and steps[-1]["kept"] == 3
    assert all(a["kept"] == b["input"] for a, b in zip(steps, steps[1:], strict=False))
    assert {step["step"]: step["rejected"] for step in steps if step["rejected"]} == {
        "format and geometry": 3,
        "models": 1,
        "captions": 1,
        "deduplication": 1,
    }


def test_rules_are_named_once():
    assert len(set(ledger.RULES)) == len(ledger.RULES)
    # Published names: scripts read them from ledger.parquet.
    assert {"undecodable", "too_many_pixels", "no_caption", "exact_duplicate", "near_duplicate"} <= set(ledger.RULES)


@pytest.mark.parametrize(
    "table",
    [book(["min_side"], kept=[True]), book([""], kept=[False]), book(["made_up"])],
    ids=["kept with a rule", "rejected without one", "unknown rule"],
)
def test_a_row_that_is_neither_kept_nor_rejected_by_a_rule_is_caught(table):
    with pytest.raises(AssertionError):
        ledger.check(table)


def test_about_three_percent_are_held_out_by_their_hash():
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20_000)]
    share = sum(ledger.split(i) == "val" for i in ids) / len(ids)
    assert 0.025 < share < 0.035
    assert ledger.split("00" * 32) == "val" and ledger.split("ff" * 32) == "train"
