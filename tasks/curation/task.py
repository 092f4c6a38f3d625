"""Raw images to curated shards: one map task makes records, one scores them, two gather."""

from __future__ import annotations

from pathlib import Path

from flytekit import Deck, task

from tasks import envs
from tasks.artifacts import CuratedDir, RecordsDir, ScoresDir, fetch, produce
from tasks.curation.config import CurationConfig, SourceConfig


@task(cache=envs.cache("records", ignored_inputs=("path",)), **envs.shard("curation"))
def make_shard(config: SourceConfig, path: str, source_digest: str, shard: int) -> RecordsDir:
    """One shard of raw records. The digest of a user's source, not its path, decides whether to read it again."""
    from tasks.curation import records

    if path:
        config = config.model_copy(update={"path": path})
    artifact, _, _ = produce(
        "records",
        lambda out: records.make_shard(config, shard, out),
        # Not the source's digest: a shard that none of its changes touched is the same artifact.
        config={"source": config.model_dump(mode="json", exclude={"path"}), "shard": shard},
    )
    return artifact


@task(cache=envs.cache("records"), **envs.gather("curation"))
def gather_records(shards: list[RecordsDir]) -> RecordsDir:
    """All shards as one artifact with one table."""
    from tasks.curation import records

    paths = [fetch(shard, "records") for shard in shards]
    artifact, _, _ = produce("records", lambda out: records.gather(paths, out), parents=paths, counts=_records)
    return artifact


@task(cache=envs.cache("curation"), **envs.shard("curation"))
def score_shard(records: RecordsDir, config: CurationConfig, shard: int) -> ScoresDir:
    """Adds columns to the records of one shard; decides nothing."""
    from tasks.curation import curate

    path = fetch(records, "records")
    artifact, _, _ = produce(
        "scores",
        lambda out: curate.score_shard(path, shard, config, out),
        parents=[path],
        config={"curation": config.model_dump(mode="json"), "shard": shard},
    )
    return artifact


@task(cache=envs.cache("curation"), enable_deck=True, **envs.gather("curation"))
def curate_records(records: RecordsDir, scores: list[ScoresDir], config: CurationConfig) -> CuratedDir:
    """Decides, deduplicates, tiers, keeps captions; the ledger accounts for every record."""
    from tasks.curation import curate

    path, score_paths = fetch(records, "records"), [fetch(part, "scores") for part in scores]
    artifact, final, _ = produce(
        "curated",
        lambda out: curate.curate(path, score_paths, config, out),
        parents=[path, *score_paths],
        config=config,
        counts=_counts,
    )
    Deck("Retention", (Path(final) / "report.html").read_text())
    return artifact


def _records(report: dict) -> dict[str, int]:
    return {"records": int(report["records"])}


def _counts(report: dict) -> dict[str, int]:
    return {key: int(report[key]) for key in ("input", "kept") if key in report}
