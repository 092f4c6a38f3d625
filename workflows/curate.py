"""Raw images to curated shards."""

from __future__ import annotations

from functools import partial

from flytekit import map_task, workflow

from tasks.artifacts import CuratedDir
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.task import curate_records, gather_records, make_shard, score_shard


@workflow
def curate(
    source: SourceConfig,
    source_path: str,
    source_digest: str,
    shards: list[int],
    scoring: CurationConfig,
    config: CurationConfig,
) -> CuratedDir:
    """Makes or reads records shard by shard, scores them shard by shard, then decides over the whole corpus."""
    make = partial(make_shard, config=source, path=source_path, source_digest=source_digest)
    records = gather_records(shards=map_task(make)(shard=shards))
    scores = map_task(partial(score_shard, records=records, config=scoring))(shard=shards)
    return curate_records(records=records, scores=scores, config=config)
