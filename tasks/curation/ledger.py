"""The ledger: every record once, kept or with the first rule that rejected it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from tasks.curation.decisions import rules

LEDGER_TABLE = "ledger.parquet"
LEDGER = pa.schema(
    [
        ("key", pa.string()),
        ("record_id", pa.string()),
        ("kept", pa.bool_()),
        ("rule", pa.string()),  # "" for a kept record
        ("detail", pa.string()),
        ("file", pa.string()),  # the user's own file, archive member or table row
        ("shard", pa.string()),
        ("row", pa.int64()),  # in the shard
    ]
)
DEDUP, SHARDS = rules.DEDUP, "shards"
SHARD_FAILED = "shard_failed"
# Steps of curation -> their rules, in the order in which they are applied. These names are stable.
STEPS: dict[str, tuple[str, ...]] = {
    SHARDS: (SHARD_FAILED,),  # one row for a shard that could not be scored, instead of its records
    **{
        step: tuple(rule.name for rule in rules.RULES if rule.step == step)
        for step in dict.fromkeys(rule.step for rule in rules.RULES)
    },
    DEDUP: rules.DUPLICATES,
}
RULES = tuple(rule for names in STEPS.values() for rule in names)
VAL_FRACTION = 0.03


def check(table: pa.Table) -> None:
    """Asserts that each row is kept, or names a rule."""
    kept = table["kept"].to_numpy(zero_copy_only=False)
    rule = np.asarray(table["rule"].to_pylist(), object)
    assert (rule[kept] == "").all(), "a kept record names a rule"
    assert set(rule[~kept]) <= set(RULES), set(rule[~kept]) - set(RULES)


def retention(records: int, rejected: Mapping[str, int]) -> list[dict]:
    """Counts of each step: {"step", "input", "rejected", "kept"}; the input is the previous step's kept."""
    steps, left = [], records
    for step, names in STEPS.items():
        gone = sum(rejected[rule] for rule in names)
        steps.append({"step": step, "input": left, "rejected": gone, "kept": left - gone})
        left -= gone
    return steps


def split(record_id: str) -> str:
    """`val` for about `VAL_FRACTION` of the records, by their hash; `train` for the others."""
    return "val" if int(record_id[:8], 16) < VAL_FRACTION * 2**32 else "train"


def split_sql() -> str:
    """`split` of the column record_id."""
    return f"CASE WHEN hex_to_int(substr(record_id, 1, 8)) < {VAL_FRACTION * 2**32!r} THEN 'val' ELSE 'train' END"
