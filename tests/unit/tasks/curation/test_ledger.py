import hashlib

import pandas as pd
import pytest

from tasks.curation import ledger


def book(rules: list[str]) -> pd.DataFrame:
    keys = [f"k{i}" for i in range(len(rules))]
    return pd.DataFrame(
        {"key": keys, "record_id": keys, "kept": [not r for r in rules], "rule": rules, "detail": rules}
    )


RULES = ["", "min_side", "", "near_duplicate", "undecodable", "", "no_caption", "watermark", "min_side"]


def test_counts_and_retention_add_up_to_the_input():
    table = book(RULES)
    ledger.check(table, table["key"])
    counts = ledger.counts(table)
    assert counts["min_side"] == 2 and counts["border"] == 0
    assert sum(counts.values()) + 3 == len(RULES)
    steps = ledger.retention(table)
    assert steps[0]["input"] == len(RULES) and steps[-1]["kept"] == 3
    assert all(a["kept"] == b["input"] for a, b in zip(steps, steps[1:], strict=False))
    assert [step["rejected"] for step in steps] == [3, 0, 1, 1, 1]


def test_rules_are_named_once():
    assert len(set(ledger.RULES)) == len(ledger.RULES)
    # Published names: scripts read them from ledger.parquet.
    assert {"undecodable", "too_many_pixels", "no_caption", "exact_duplicate", "near_duplicate"} <= set(ledger.RULES)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.iloc[1:],
        lambda t: t.iloc[::-1],
        lambda t: pd.concat([t, t.iloc[:1]]),
        lambda t: t.assign(rule=["min_side"] * len(t)),
        lambda t: t.assign(rule=t["rule"].replace("watermark", "made_up")),
    ],
)
def test_a_ledger_that_does_not_account_for_every_record_is_caught(spoil):
    table = book(RULES)
    with pytest.raises(AssertionError):
        ledger.check(spoil(table), table["key"])


def test_a_record_is_rejected_once_and_the_given_ledger_stays():
    table = book(["", "", "min_side"])
    after = ledger.reject(table, [1], "near_duplicate", ["like k0"])
    assert list(after["rule"]) == ["", "near_duplicate", "min_side"]
    assert list(after["kept"]) == [True, False, False]
    assert list(table["kept"]) == [True, True, False]
    with pytest.raises(AssertionError):
        ledger.reject(after, [2], "near_duplicate", [""])
    with pytest.raises(AssertionError):
        ledger.reject(table, [0], "made_up", [""])


def test_about_three_percent_are_held_out_by_their_hash():
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20_000)]
    share = sum(ledger.split(i) == "val" for i in ids) / len(ids)
    assert 0.025 < share < 0.035
    assert ledger.split("00" * 32) == "val" and ledger.split("ff" * 32) == "train"
