"""Curates a source.

pyflyte run workflows/curate.py curate --recipe tiny
pyflyte run workflows/curate.py curate --recipe smoke --source my_images/

source -> corpus -> scores -> decisions -> selections -> curated
          shards    per shard  one task     per shard    index, ledger, report

Scores are computed on CPUs; scorers that need a GPU run in a second map task on GPUs. With `curation.captioner` in the
recipe, images are described between scores and decisions (workflows/caption.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Union

from flytekit import dynamic, map_task, workflow

from tasks import envs
from tasks.artifacts import CuratedDir
from tasks.curation.captioning import chosen_captioner
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.scorers import needs_gpu
from tasks.curation.task import (
    caption_group,
    caption_group_gpu,
    decide_corpus,
    download_group,
    draft_corpus,
    gather_curated,
    list_corpus,
    list_urls,
    make_group,
    score_group,
    score_group_on_gpu,
    select_group,
)
from tasks.planning.task import resolve_recipe
from tasks.store import num_groups


@dynamic(**envs.dynamic("curation"))
def curate_source(source: SourceConfig, path: str, config: CurationConfig) -> CuratedDir:
    """Curates the images at `path`, or if it is empty those that `source` makes.

    Dynamic, since the recipe sets how many sub-tasks run at a time, and how many may fail.
    """
    corpus, groups, columns = score_source(source, path, config)
    if config.captioner is not None:
        columns = describe(corpus, groups, columns, config)
    decisions = decide_corpus(corpus=corpus, scores=columns, config=config, groups=groups)
    select = partial(select_group, decisions=decisions, config=config, groups=groups)
    selections = map_task(select, concurrency=config.concurrency or None)(group=groups)
    return gather_curated(corpus=corpus, decisions=decisions, selections=selections, config=config)


class Scored(NamedTuple):
    """Outputs of the tasks that list and score a corpus, in a dynamic workflow."""

    corpus: Any
    groups: Any
    columns: Any


def score_source(source: SourceConfig, path: str, config: CurationConfig) -> Scored:
    """Adds the tasks that list and score a source to a dynamic workflow."""
    concurrency = config.concurrency or None
    if source.urls is not None:
        listed_urls = list_urls(source=source, path=path, config=config)
        download = partial(download_group, urls=listed_urls.urls, source=source, groups=listed_urls.groups)
        made = map_task(download, concurrency=concurrency)(group=listed_urls.groups)
        listed = list_corpus(source=source, path="", made=made, config=config, urls=listed_urls.urls)
    else:
        groups = 0 if path else num_groups(source.shards, config.max_groups)
        make = partial(make_group, config=source, groups=groups)
        made = map_task(make, concurrency=concurrency)(group=list(range(groups))) if groups else []
        listed = list_corpus(source=source, path=path, made=made, config=config)
    score = partial(score_group, corpus=listed.corpus, config=config, groups=listed.groups)
    scores = map_task(score, **_limits(config))(group=listed.groups)
    if needs_gpu(config):
        score = partial(score_group_on_gpu, corpus=listed.corpus, config=config, groups=listed.groups)
        scores = map_task(score, **_limits(config))(group=listed.groups, scored=scores)
    return Scored(listed.corpus, listed.groups, scores)


def describe(corpus: Any, groups: Any, scores: Any, config: CurationConfig) -> Any:
    """Adds the tasks that write captions, by groups, to a dynamic workflow."""
    drafts = draft_corpus(corpus=corpus, scores=scores, config=config, groups=groups)
    task = caption_group_gpu if chosen_captioner(config.captioner).needs == "gpu" else caption_group
    return map_task(partial(task, corpus=corpus, drafts=drafts, config=config, groups=groups), **_limits(config))(
        group=groups
    )


def _limits(config: CurationConfig) -> dict[str, Any]:
    return {"concurrency": config.concurrency or None, "min_success_ratio": config.min_success_ratio}


@workflow
def curate(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> CuratedDir:
    """Curates the source of a recipe, or your own images.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        overrides: a change such as curation.filters.min_side_px=128, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's: a folder (or s3:// URI) of images with captions, tars or
            Parquet files.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source=source, ends_in="curated")
    return curate_source(source=sections.source, path=sections.source_path, config=sections.curation)
