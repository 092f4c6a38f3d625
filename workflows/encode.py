"""Curated selections to texts, and to one stage's latents: map tasks over groups of shards, then an index."""

from __future__ import annotations

from functools import partial

from flytekit import dynamic, map_task

from model.config import StageConfig
from tasks import envs
from tasks.artifacts import ComponentsDir, CuratedDir, LatentsDir, TextsDir
from tasks.encoding.config import EncodingConfig
from tasks.encoding.task import encode_latents_group, encode_texts_group, gather_latents, gather_texts, plan_encoding


@dynamic(**envs.dynamic())
def encode_texts(curated: CuratedDir, components: ComponentsDir, config: EncodingConfig) -> TextsDir:
    """Encodes the captions of a corpus, once for all stages.

    Dynamic, since the recipe says how many sub-tasks run at a time, and how many may fail.
    """
    options = {"concurrency": config.concurrency or None, "min_success_ratio": config.min_success_ratio}
    plan = plan_encoding(curated=curated, config=config)
    encode = partial(encode_texts_group, curated=curated, components=components, config=config, groups=plan.groups)
    parts = map_task(encode, **options)(group=plan.groups)
    return gather_texts(curated=curated, components=components, config=config, groups=parts)


@dynamic(**envs.dynamic())
def encode_latents(
    curated: CuratedDir, components: ComponentsDir, stage: StageConfig, config: EncodingConfig
) -> LatentsDir:
    """Encodes the images that one stage draws."""
    options = {"concurrency": config.concurrency or None, "min_success_ratio": config.min_success_ratio}
    plan = plan_encoding(curated=curated, config=config, stage=stage)
    inputs = {"curated": curated, "components": components, "stage": stage, "config": config}
    encode = partial(encode_latents_group, **inputs, fractions=plan.fractions, groups=plan.groups)
    parts = map_task(encode, **options)(group=plan.groups)
    return gather_latents(**inputs, fractions=plan.fractions, groups=parts)
