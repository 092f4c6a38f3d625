"""Makes components, texts, and latents of each stage from curated selections: map tasks over groups of shards, then an
index.

    pyflyte run workflows/encode.py encode --recipe tiny --curated .nucleus/artifacts/curated/DIGEST

`train` encodes as well, and reuses cached parts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Union

from flytekit import dynamic, map_task, workflow

from model.config import StageConfig
from tasks import envs
from tasks.artifacts import ComponentsDir, CuratedDir, LatentsDir, TextsDir
from tasks.encoding.config import EncodingConfig
from tasks.encoding.task import (
    encode_latents_group,
    encode_texts_group,
    gather_latents,
    gather_texts,
    make_components,
    plan_encoding,
)
from tasks.planning.sections import Stage
from tasks.planning.task import check_curated, resolve_recipe


@dynamic(**envs.dynamic())
def encode_texts(curated: CuratedDir, components: ComponentsDir, config: EncodingConfig) -> TextsDir:
    """Encodes the captions of a corpus, once for all stages.

    Dynamic, since the recipe sets how many sub-tasks run at a time, and how many may fail.
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


class EncodedStages(NamedTuple):
    """Texts, and the latents of each stage in the recipe's order."""

    texts: TextsDir
    latents: list[LatentsDir]


class Encoded(NamedTuple):
    """`EncodedStages`, and the components that encoded them."""

    components: ComponentsDir
    texts: TextsDir
    latents: list[LatentsDir]


@dynamic(**envs.dynamic())
def encode_stages(
    curated: CuratedDir, components: ComponentsDir, stages: list[Stage], config: EncodingConfig
) -> EncodedStages:
    """Encodes texts once, and images for each stage."""
    texts = encode_texts(curated=curated, components=components, config=config)
    latents = [
        encode_latents(curated=curated, components=components, stage=stage.train.stage, config=config)
        for stage in stages
    ]
    return EncodedStages(texts=texts, latents=latents)


@workflow
def encode(recipe: str, curated: CuratedDir, overrides: Union[list[str], str] = []) -> Encoded:
    """Makes the frozen components of a recipe, and encodes a curated corpus for all its stages.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        curated: a sealed directory of kind curated.
        overrides: a change such as encoding.max_text_tokens=64, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source="", starts_from="curated", ends_in="encoded")
    checked = check_curated(curated=curated, stages=sections.stages)
    components = make_components(curated=curated, config=sections.components)
    checked >> components
    encoded = encode_stages(curated=curated, components=components, stages=sections.stages, config=sections.encoding)
    return Encoded(components=components, texts=encoded.texts, latents=encoded.latents)
