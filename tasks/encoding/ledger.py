"""The encoding ledger, in the format of curation's: every curated record is encoded, or counted under a rule.

    curated records = encoded + held out + not drawn + rejected by RULES (listed one by one)

Held-out records are those of the val split. Records that are not drawn are in tiers, or in the part of a tier, that the
stage does not read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.decisions.rules import CAPTION_TOO_LONG
from tasks.curation.ledger import LEDGER, LEDGER_TABLE, SHARD_FAILED

HELD_OUT, NOT_DRAWN = "held_out", "not_drawn"  # counted, not listed
SHAPE_FITS_NO_BUCKET = "shape_fits_no_bucket"
CHANGED_SINCE_SCORING = "changed_since_scoring"
UNDECODABLE = "undecodable"
CAPTION_SPECIAL_TOKEN = "caption_special_token"  # the caption contains a special token of the chat format
RULES = (
    SHAPE_FITS_NO_BUCKET,
    CHANGED_SINCE_SCORING,
    UNDECODABLE,
    CAPTION_TOO_LONG,
    CAPTION_SPECIAL_TOKEN,
    SHARD_FAILED,
)
REPORT = "report.json"


class Notes:
    """Collects rejections and remarks for one part, and writes ledger.parquet and report.json."""

    def __init__(self, shard: str):
        self.shard = shard
        self.counts: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._lines: list[dict[str, Any]] = []

    def reject(self, record: dict[str, Any], rule: str, detail: str) -> None:
        """Notes a curated record (key, record_id, locator, row) that is not encoded."""
        assert rule in RULES, rule
        self.counts[rule] += 1
        self.examples.setdefault(rule, f"{record['locator']}: {detail}")
        self._add(record, False, rule, detail)

    def remark(self, record: dict[str, Any], what: str, detail: str) -> None:
        """Notes something about a record that is encoded, such as one rejected caption out of several."""
        self.remarks[what] += 1
        self.examples.setdefault(what, f"{record['locator']}: {detail}")
        self._add(record, True, "", f"{what}: {detail}")

    def _add(self, record: dict[str, Any], kept: bool, rule: str, detail: str) -> None:
        fields = {name: record[name] for name in ("key", "record_id", "row")}
        line = {"kept": kept, "rule": rule, "detail": detail, "file": record["locator"], "shard": self.shard}
        self._lines.append(fields | line)

    def write(self, out_dir: Path, **report: Any) -> None:
        pq.write_table(pa.Table.from_pylist(self._lines, LEDGER), out_dir / LEDGER_TABLE, compression="zstd")
        summary = {name: dict(sorted(getattr(self, name).items())) for name in ("counts", "remarks", "examples")}
        (out_dir / REPORT).write_text(json.dumps(summary | report, indent=1, sort_keys=True) + "\n")


def add_up(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the parts' reports: adds numbers, keeps the first of each example, and the maximum of keys in "max..."."""
    total: dict[str, Any] = {}
    for report in reports:
        _add_into(total, report)
    return total


def _add_into(total: dict[str, Any], report: dict[str, Any]) -> None:
    for name, value in report.items():
        if isinstance(value, dict):
            _add_into(total.setdefault(name, {}), value)
        elif isinstance(value, str):
            total.setdefault(name, value)
        elif name.startswith("max"):
            total[name] = max(total.get(name, value), value)
        else:
            total[name] = total.get(name, 0) + value


def outcomes(report: Mapping[str, Any]) -> dict[str, int]:
    """Outcomes of the curated records: numbers encoded, held out, not drawn, and rejected by each rule."""
    counts = {"encoded": report["encoded"]} | report.get("counts", {})
    assert sum(counts.values()) == report["records"], (counts, report["records"])
    return counts


def summary(report: dict[str, Any], what: str) -> str:
    """One line: the number of encoded records, and counts of all others with an example of each kind."""
    examples = report.get("examples", {})
    counts = dict(report.get("counts", {}))
    parts = [f"{report['encoded']:,} of {report['records']:,} curated records"]
    for name, words in ((HELD_OUT, "held out"), (NOT_DRAWN, "not drawn by the stage")):
        if counts.pop(name, 0):
            parts.append(f"{report['counts'][name]:,} {words}")
    for name, count in sorted((counts | report.get("remarks", {})).items()):
        parts.append(f"{count:,} {name} (such as {examples[name]})")
    return f"{what}: " + "; ".join(parts)
