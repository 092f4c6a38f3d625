"""Selections: of each shard the records that are kept, as one part.

A selections part depends on its shard's scores and on what was decided about them, so that a shard that a new decision
does not touch keeps its part, and whatever was encoded from it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation import ledger
from tasks.curation.captions import choose_captions, merge_captions
from tasks.curation.config import CaptionConfig
from tasks.curation.scoring.score import SCORES_TABLE

SELECTION_TABLE = "selection.parquet"
SELECTION = pa.schema(
    [
        ("key", pa.string()),
        ("record_id", pa.string()),  # SHA-256 of the image's bytes
        ("row", pa.int64()),  # in the shard
        ("ext", pa.string()),
        ("locator", pa.string()),  # the user's own file, member or row
        ("source", pa.string()),
        ("synthetic", pa.bool_()),
        ("width", pa.int64()),  # px, upright
        ("height", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("tier", pa.string()),
        ("bucket", pa.string()),  # the episode, under the name that stored tables have
        ("split", pa.string()),  # train or val
    ]
)
FROM_SCORES = ["key", "record_id", "row", "ext", "locator", "source", "synthetic", "width", "height"]


def write_selection(
    scores_dir: str | os.PathLike, decided: pa.Table, config: CaptionConfig, out_dir: str | os.PathLike
) -> int:
    """Writes the selection of one shard, with the captions that its tiers keep; returns the number of records.

    Args:
        scores_dir: the shard's score part.
        decided: row, tier, bucket and extra_captions of its kept records, in the order of rows (decide.KEPT).
    """
    scores = pq.read_table(Path(scores_dir) / SCORES_TABLE, columns=[*FROM_SCORES, "captions", "words"])
    at = pa.compute.index_in(decided["row"], value_set=scores["row"])
    assert at.null_count == 0, "a decision about a row that has no scores"
    kept = scores.take(at)
    ids = kept["record_id"].to_pylist()
    captions = [
        choose_captions(
            merge_captions(own, extra, config)
            if extra
            else [text for text, n in zip(own, words, strict=True) if n <= config.max_words],
            tier,
            record_id,
            config,
        )
        for own, words, extra, tier, record_id in zip(
            kept["captions"].to_pylist(),
            kept["words"].to_pylist(),
            decided["extra_captions"].to_pylist(),
            decided["tier"].to_pylist(),
            ids,
            strict=True,
        )
    ]
    columns = {name: kept[name] for name in FROM_SCORES}
    columns |= {"captions": pa.array(captions, pa.list_(pa.string())), "tier": decided["tier"]}
    columns |= {"bucket": decided["bucket"], "split": [ledger.split(record_id) for record_id in ids]}
    table = pa.table({name: columns[name] for name in SELECTION.names}).cast(SELECTION)
    pq.write_table(table.combine_chunks(), Path(out_dir) / SELECTION_TABLE, compression="zstd")
    return len(table)
