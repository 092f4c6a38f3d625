"""The ledger: every input record once, kept, or with the rule that rejected it first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from tasks.curation import filters

COLUMNS = ("key", "record_id", "kept", "rule", "detail")
CAPTIONS, DEDUP = "captions", "deduplication"
# The whole life of a record: step -> the rules in it, in the order in which they are applied. These names are stable.
STEPS: dict[str, tuple[str, ...]] = {
    **{
        step: tuple(rule.name for rule in filters.RULES if rule.step == step)
        for step in dict.fromkeys(rule.step for rule in filters.RULES)
    },
    # Before deduplication, so that a record without a caption never displaces its twin that has one.
    CAPTIONS: ("no_caption",),
    DEDUP: ("exact_duplicate", "near_duplicate"),
}
RULES = tuple(rule for rules in STEPS.values() for rule in rules)
VAL_FRACTION = 0.03


def reject(ledger: pd.DataFrame, rows: Iterable[int], rule: str, details: Iterable[str]) -> pd.DataFrame:
    """A ledger in which these rows (positions), kept so far, are rejected."""
    assert rule in RULES, rule
    rows = np.asarray(list(rows), int)
    ledger = ledger.copy()
    assert ledger["kept"].to_numpy()[rows].all(), "a record is rejected once"
    ledger.iloc[rows, ledger.columns.get_loc("kept")] = False
    ledger.iloc[rows, ledger.columns.get_loc("rule")] = rule
    ledger.iloc[rows, ledger.columns.get_loc("detail")] = list(details)
    return ledger


def check(ledger: pd.DataFrame, keys: Iterable[str]) -> None:
    """Asserts that the ledger accounts for each of `keys` exactly once."""
    keys = list(keys)
    assert tuple(ledger.columns) == COLUMNS, list(ledger.columns)
    assert len(keys) == len(set(keys)), "input keys repeat"
    assert list(ledger["key"]) == keys, "the ledger's keys are not the input's"
    kept = ledger["kept"].to_numpy(bool)
    assert (ledger["rule"].to_numpy()[kept] == "").all(), "a kept record names a rule"
    assert set(ledger["rule"].to_numpy()[~kept]) <= set(RULES), set(ledger["rule"]) - set(RULES) - {""}
    assert sum(counts(ledger).values()) + kept.sum() == len(keys)


def counts(ledger: pd.DataFrame) -> dict[str, int]:
    """Rule -> records it rejected, every rule in order, zeros too."""
    found = Counter(ledger["rule"])
    return {rule: int(found[rule]) for rule in RULES}


def retention(ledger: pd.DataFrame) -> list[dict]:
    """How many survive each step: {"step", "input", "rejected", "kept"}, each input being the last one's kept."""
    rejected = counts(ledger)
    steps, left = [], len(ledger)
    for step, rules in STEPS.items():
        gone = sum(rejected[rule] for rule in rules)
        steps.append({"step": step, "input": left, "rejected": gone, "kept": left - gone})
        left -= gone
    assert left == int(ledger["kept"].sum())
    return steps


def split(record_id: str) -> str:
    """`val` for about `VAL_FRACTION` of the records, by their hash; `train` for the others."""
    return "val" if int(record_id[:8], 16) < VAL_FRACTION * 2**32 else "train"
