"""What encoding leaves out, in the format of curation's ledger: every curated record is encoded, or counted by a rule.

    curated records = encoded + held out + not drawn + those of the rules below, which the ledger lists one by one

Held-out records are of the val split. Records that are not drawn are of tiers or shares that the stage never reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.ledger import CAPTION_TOO_LONG, LEDGER, LEDGER_TABLE, SHARD_FAILED

HELD_OUT, NOT_DRAWN = "held_out", "not_drawn"  # counted, not listed
SHAPE_FITS_NO_BUCKET = "shape_fits_no_bucket"
CHANGED_SINCE_SCORING = "changed_since_scoring"
UNDECODABLE = "undecodable"
CAPTION_SPECIAL_TOKEN = "caption_special_token"  # the caption has a special token of the chat format
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
    """Collects what one part leaves out, and writes ledger.parquet and report.json."""

    def __init__(self, shard: str):
        self.shard = shard
        self.counts: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._lines: list[dict[str, Any]] = []

    def reject(self, record: dict[str, Any], rule: str, detail: str) -> None:
        """A curated record (key, record_id, locator, row) that is not encoded."""
        assert rule in RULES, rule
        self.counts[rule] += 1
        self.examples.setdefault(rule, f"{record['locator']}: {detail}")
        self._add(record, False, rule, detail)

    def remark(self, record: dict[str, Any], what: str, detail: str) -> None:
        """Something about a record that is encoded all the same, such as a caption of several that is left out."""
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
    """The sum of parts' reports: numbers are added, the first example of a kind is kept, and of a "max" the largest."""
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


def summary(report: dict[str, Any], what: str) -> str:
    """One line: what was encoded, and what was left out with an example of each kind."""
    examples = report.get("examples", {})
    counts = dict(report.get("counts", {}))
    parts = [f"{report['encoded']:,} of {report['records']:,} curated records"]
    for name, words in ((HELD_OUT, "held out"), (NOT_DRAWN, "not drawn by the stage")):
        if counts.pop(name, 0):
            parts.append(f"{report['counts'][name]:,} {words}")
    for name, count in sorted((counts | report.get("remarks", {})).items()):
        parts.append(f"{count:,} {name} (such as {examples[name]})")
    return f"{what}: " + "; ".join(parts)
