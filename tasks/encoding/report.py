"""The encoding report, report.html: the outcome of every curated record, for texts or for the latents of one stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eval import html_page
from eval.html_page import table, text
from tasks.encoding.ledger import HELD_OUT, NOT_DRAWN, outcomes

PAGE = "report.html"
LISTED = 200  # lines of the ledger on the page; the Parquet file has them all
COLUMNS = ["file", "kept", "rule", "detail"]
MEANINGS = {
    "encoded": "",
    HELD_OUT: "of the val split",
    NOT_DRAWN: "the stage does not draw them",
}


def title(kind: str, report: Mapping[str, Any]) -> str:
    """ "texts", or "latents at 64 px": stages of one size share latents, so the title does not name a stage."""
    return f"{kind} at {report['image_size_px']} px" if "image_size_px" in report else kind


def page(report: Mapping[str, Any], ledger_file: Path, what: str) -> str:
    """
    Args:
        report: the content of report.json.
        ledger_file: the ledger of the same artifact.
        what: the title.

    Returns:
        HTML without scripts or references; every text is escaped.
    """
    records, examples = report["records"], report.get("examples", {})
    counts = outcomes(report)
    rows = [
        (name, count, f"{count / records:.1%}" if records else "-", MEANINGS.get(name, examples.get(name, "")))
        for name, count in [*counts.items(), ("all", sum(counts.values()))]
    ]
    parts = [
        f"<h1>{text(what)}</h1>",
        f"<p>{report['encoded']:,} of {records:,} curated records are encoded.</p>",
        table(["outcome", "records", "share", "such as"], rows),
    ]
    if remarks := report.get("remarks"):
        remarked = [(name, count, examples.get(name, "")) for name, count in remarks.items()]
        parts += ["<h2>Encoded, with a remark</h2>", table(["remark", "records", "such as"], remarked)]
    with pq.ParquetFile(ledger_file) as ledger:
        for batch in ledger.iter_batches(LISTED, columns=COLUMNS):
            parts += [
                f"<h2>Ledger: {len(batch):,} of {ledger.metadata.num_rows:,} lines</h2>",
                table(COLUMNS, [tuple(line.values()) for line in batch.to_pylist()]),
            ]
            break
    return html_page.page("Encoding report", "".join(parts))
