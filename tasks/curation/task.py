"""Curation as tasks: list the source's shards, score them in groups, decide once, write selections in groups.

    make_group (made sources) -> list_corpus -> score_group -> decide_corpus -> select_group -> gather_curated
        per group                                 per group      columns only     per group

If a scorer needs a GPU, `score_group_on_gpu` follows `score_group` and runs the remaining scorers.
With a captioner, between scoring and deciding:  draft_corpus -> caption_group
                                                 columns only    per group

The map tasks have no Flyte cache: a part is made once for its inputs (store.make_part), so that one new shard costs one
part, in any group. A shard that fails does not stop the others: its part names the error.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from flytekit import Deck, task

from model.logs import get_logger
from model.storage import is_remote
from tasks import envs
from tasks.artifacts import (
    CaptionsDir,
    CorpusDir,
    CuratedDir,
    DecisionsDir,
    RecordsDir,
    ScoresDir,
    SelectionsDir,
    UrlsDir,
    fetch,
    is_local,
    plain_errors,
    produce,
)
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.store import (
    LOCATIONS,
    Part,
    fetch_part,
    group_range,
    num_groups,
    read_index,
    store,
    write_index,
)

logger = get_logger(__name__)


class Listed(NamedTuple):
    """A corpus, and the groups of its shards for map tasks."""

    corpus: CorpusDir
    groups: list[int]


@task(**envs.shard("curation"))
def make_group(config: SourceConfig, groups: int, group: int) -> RecordsDir:
    """Makes the shards of one group of a made source: rendered scenes and digits."""
    from tasks.curation import flow

    _check_store()
    with plain_errors():
        parts = [flow.make_shard(config, index) for index in group_range(group, groups, config.shards)]
    return _index("records", parts)


class ListedUrls(NamedTuple):
    """A list of URLs, and the groups of its shards for map tasks."""

    urls: UrlsDir
    groups: list[int]


@task(**envs.gather("curation"))
def list_urls(source: SourceConfig, path: str, config: CurationConfig) -> ListedUrls:
    """Lists the tables of URLs of a source. Not cached, like `list_corpus`."""
    from tasks.curation import flow

    _check_store()
    artifact, _, report = produce(
        "urls", lambda out: flow.write_listing(source, path, out, config.needs_captions), logs=("report.json",)
    )
    return ListedUrls(urls=artifact, groups=list(range(num_groups(report["shards"], config.max_groups))))


@task(**envs.shard("curation"))
def download_group(urls: UrlsDir, source: SourceConfig, groups: list[int], group: int) -> RecordsDir:
    """Downloads the images of one group of a list of URLs into shards of the store."""
    from tasks.curation import flow

    with plain_errors():
        return _index("records", flow.download_group(fetch(urls, "urls"), source, group, len(groups)))


@task(**envs.gather("curation"))
def list_corpus(
    source: SourceConfig, path: str, made: list[RecordsDir], config: CurationConfig, urls: Optional[UrlsDir] = None
) -> Listed:
    """Lists the shards of a source: the user's own at `path`, else made ones, or those downloaded from `urls`.

    Not cached: shards are named by their content, but their current locations must be read.
    """
    from tasks.curation import flow

    _check_store()
    parts = [part for directory in made for part in read_index(fetch(directory, "records"))]
    listing = fetch(urls, "urls") if urls is not None else None
    with plain_errors():
        flow.check_made(parts)
    artifact, corpus, report = produce(
        "corpus",
        lambda out: flow.write_corpus(source, path, parts, out, listing),
        parents=[part.as_parent() for part in parts],
        counts=lambda report: {"shards": int(report["shards"])},
        logs=flow.CORPUS_LOGS,
    )
    with plain_errors():
        flow.check_size(report["images"], config)
        flow.check_captions(corpus, config)
    return Listed(corpus=artifact, groups=list(range(num_groups(report["shards"], config.max_groups))))


@task(**envs.shard("scorer"))
def score_group(corpus: CorpusDir, config: CurationConfig, groups: list[int], group: int) -> ScoresDir:
    """Adds columns to the records of the shards of one group, without scorers that need a GPU."""
    from tasks.curation import flow

    with plain_errors():
        return _index("scores", flow.score_group(_fetch_tables(corpus), config, group, len(groups), "shard"))


@task(**envs.gpu_single("scorer", reads_hub=True))
def score_group_on_gpu(
    corpus: CorpusDir, config: CurationConfig, groups: list[int], group: int, scored: Optional[ScoresDir]
) -> ScoresDir:
    """Runs the scorers that `score_group` left out, for one group. `scored`, its result, is only a dependency: finished
    parts are in the store."""
    from tasks.curation import flow

    with plain_errors():
        return _index("scores", flow.score_group(_fetch_tables(corpus), config, group, len(groups), "gpu_single"))


@task(**envs.tables("curation"))
def draft_corpus(
    corpus: CorpusDir, scores: list[Optional[ScoresDir]], config: CurationConfig, groups: list[int]
) -> DecisionsDir:
    """Decides which images to caption, and their tiers, before captioning."""
    from tasks.curation import flow

    indices = [fetch(directory, "scores") if directory is not None else None for directory in scores]
    with plain_errors():
        return _index("decisions", [flow.draft_corpus(_fetch_tables(corpus), indices, config, len(groups))])


@task(**envs.captioner())
def caption_group(
    corpus: CorpusDir, drafts: DecisionsDir, config: CurationConfig, groups: list[int], group: int
) -> CaptionsDir:
    """Writes captions for the images of the shards of one group, with an endpoint or by rules."""
    return _caption_group(corpus, drafts, config, len(groups), group)


@task(**envs.gpu_single("scorer", reads_hub=True))
def caption_group_gpu(
    corpus: CorpusDir, drafts: DecisionsDir, config: CurationConfig, groups: list[int], group: int
) -> CaptionsDir:
    """Like `caption_group`, with a model in this task, on an accelerator."""
    return _caption_group(corpus, drafts, config, len(groups), group)


def _caption_group(corpus: CorpusDir, drafts: DecisionsDir, config: CurationConfig, groups: int, group: int):
    from tasks.curation import flow

    (draft,) = read_index(fetch(drafts, "decisions"))
    with plain_errors():
        return _index("captions", flow.caption_group(_fetch_tables(corpus), draft, config, group, groups))


@task(**envs.gather("curation"))
def gather_captions(captions: list[Optional[CaptionsDir]]) -> CaptionsDir:
    """Writes the index of the captions of a whole corpus."""
    parts = [part for directory in captions if directory for part in read_index(fetch(directory, "captions"))]
    with plain_errors():
        failed = [part for part in parts if part.error]
        if failed:
            few = "; ".join(f"{part.name}: {part.error}" for part in failed[:3])
            raise ValueError(
                f"{len(failed)} of {len(parts)} shards were not described: {few}. Run again for these alone"
            )
    return _index("captions", parts)


@task(enable_deck=True, **envs.tables("curation"))
def decide_corpus(
    corpus: CorpusDir, scores: list[Optional[ScoresDir]], config: CurationConfig, groups: list[int]
) -> DecisionsDir:
    """Decides the fate of each record of the corpus, from columns alone; the ledger lists every record.

    `scores`: of each group; with a captioner, the captions parts, which contain scores.
    """
    from tasks.curation import flow

    kind = "scores" if config.captioner is None else "captions"
    indices = [fetch(directory, kind) if directory is not None else None for directory in scores]
    with plain_errors():
        part = flow.decide_corpus(_fetch_tables(corpus), indices, config, len(groups))
    directory = fetch_part(part)
    Deck("Retention", (directory / flow.REPORT_PAGE).read_text())
    with plain_errors():
        logger.info(flow.result_line(directory, part, config))
    return _index("decisions", [part])


@task(**envs.shard("curation"))
def select_group(decisions: DecisionsDir, config: CurationConfig, groups: list[int], group: int) -> SelectionsDir:
    """Writes the kept records of the shards of one group, a part for each shard."""
    from tasks.curation import flow

    (part,) = read_index(fetch(decisions, "decisions"))
    with plain_errors():
        return _index("selections", flow.select_group(part, config, group, len(groups)))


@task(**envs.gather("curation"))
def gather_curated(
    corpus: CorpusDir, decisions: DecisionsDir, selections: list[SelectionsDir], config: CurationConfig
) -> CuratedDir:
    """Writes the index of the selections, with the tables of the corpus, the ledger and the report."""
    from tasks.curation import flow

    corpus_path = fetch(corpus, "corpus")
    (decision,) = read_index(fetch(decisions, "decisions"))
    parts = (part for directory in selections for part in read_index(fetch(directory, "selections")))
    artifact, _, _ = produce(
        "curated",
        lambda out: flow.gather_curated(corpus_path, decision, parts, out),
        parents=[corpus_path],
        config=config.deciding(),
        counts=lambda report: {name: int(report[name]) for name in ("input", "kept")},
        logs=flow.CURATED_LOGS,
    )
    return artifact


def _check_store() -> None:
    """Parts outlive a pod only in a store that all pods can access."""
    if not is_local() and not is_remote(store()):
        raise ValueError("NUCLEUS_STORE is not set: register the workflows with NUCLEUS_STORE=s3://BUCKET/PREFIX")


def _fetch_tables(corpus: CorpusDir) -> Path:
    """Fetches the corpus without its lists of loose files. A task that reads a shard downloads the list of that
    shard."""
    from tasks.curation.sources.base import LISTS

    return fetch(corpus, "corpus", without=(LISTS,))


def _index(kind: str, parts: list[Part]):
    artifact, _, _ = produce(kind, lambda out: write_index(out, parts), logs=(LOCATIONS,))
    return artifact
