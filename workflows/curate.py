"""A source to curated selections.

pyflyte run workflows/curate.py curate --recipe tiny
pyflyte run workflows/curate.py curate --recipe smoke --source my_images/

source -> corpus -> scores -> decisions -> selections -> curated
          shards    per shard  one task     per shard    index, ledger, report

Scores are made on CPUs; where a scorer asks for a GPU, by a second map task on GPUs.
"""

from __future__ import annotations

from functools import partial
from typing import Union

from flytekit import dynamic, map_task, workflow

from tasks import envs
from tasks.artifacts import CuratedDir
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.scorers import needs_gpu
from tasks.curation.task import (
    decide_corpus,
    gather_curated,
    list_corpus,
    make_group,
    score_group,
    score_group_on_gpu,
    select_group,
)
from tasks.planning.task import resolve_recipe
from tasks.store import num_groups


@dynamic(**envs.dynamic("curation"))
def curate_source(source: SourceConfig, path: str, config: CurationConfig) -> CuratedDir:
    """Curates the images at `path`, or those that are made of `source` where it is empty.

    Dynamic, since the recipe says how many sub-tasks run at a time, and how many may fail.
    """
    options = {"concurrency": config.concurrency or None, "min_success_ratio": config.min_success_ratio}
    groups = 0 if path else num_groups(source.shards, config.max_groups)
    make = partial(make_group, config=source, groups=groups)
    made = map_task(make, concurrency=options["concurrency"])(group=list(range(groups))) if groups else []
    listed = list_corpus(source=source, path=path, made=made, config=config)
    score = partial(score_group, corpus=listed.corpus, config=config, groups=listed.groups)
    scores = map_task(score, **options)(group=listed.groups)
    if needs_gpu(config):
        score = partial(score_group_on_gpu, corpus=listed.corpus, config=config, groups=listed.groups)
        scores = map_task(score, **options)(group=listed.groups, scored=scores)
    decisions = decide_corpus(corpus=listed.corpus, scores=scores, config=config, groups=listed.groups)
    select = partial(select_group, decisions=decisions, config=config, groups=listed.groups)
    selections = map_task(select, concurrency=options["concurrency"])(group=listed.groups)
    return gather_curated(corpus=listed.corpus, decisions=decisions, selections=selections, config=config)


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
