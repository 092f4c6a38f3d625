"""Writes the duplicates of each group of shards, which captioning needs from the draft decision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.curation import ledger
from tasks.store import Part, group_range

DUPLICATES = "duplicates"
SCHEMA = pa.schema([("shard", pa.string()), ("row", pa.int64()), ("rule", pa.string()), ("detail", pa.string())])


def write_duplicates(decision_dir: Path, parts: Sequence[Part], groups: int) -> None:
    """Writes duplicates/GROUP.parquet into a decision directory, from its ledger, which is in the order of the shards."""
    folder = decision_dir / DUPLICATES
    folder.mkdir()
    group_of = {parts[i].name: group for group in range(groups) for i in group_range(group, groups, len(parts))}
    rules = pa.array(ledger.STEPS[ledger.DEDUP])
    current, writer = -1, None

    def advance(to: int) -> pq.ParquetWriter | None:
        nonlocal current, writer
        while current < to:
            if writer is not None:
                writer.close()
            current += 1
            writer = pq.ParquetWriter(folder / f"{current:05d}.parquet", SCHEMA) if current < groups else None
        return writer

    with pq.ParquetFile(decision_dir / ledger.LEDGER_TABLE) as book:
        for batch in book.iter_batches(columns=SCHEMA.names):
            duplicates = (
                pa.Table.from_batches([batch]).filter(pc.is_in(batch["rule"], value_set=rules)).select(SCHEMA.names)
            )
            for shard in duplicates["shard"].unique().to_pylist():
                into = advance(group_of[shard])
                assert into is not None
                into.write_table(duplicates.filter(pc.equal(duplicates["shard"], shard)).cast(SCHEMA))
    advance(groups)
