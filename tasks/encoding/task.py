"""Tasks that make the frozen components, the texts that all stages share, and each stage's latents.

    plan_encoding -> encode_texts_group   -> gather_texts
                     encode_latents_group -> gather_latents     per stage
                     map tasks over groups of shards

The map tasks do not use Flyte's cache. `store.make_part` reuses parts by their inputs instead, so that a new shard costs
one new part of texts, and one new part of latents per stage. See docs/decisions/encoding.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple, Optional

from flytekit import Deck, task

from model.config import StageConfig
from model.logs import get_logger
from tasks import envs
from tasks.artifacts import (
    ComponentsDir,
    CuratedDir,
    LatentsDir,
    TextsDir,
    exclusive,
    fetch,
    plain_errors,
    produce,
    work_path,
)
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.store import LOCATIONS

logger = get_logger(__name__)


def _fetch_curated(curated: CuratedDir) -> Path:
    """The curated corpus without the files that have a row for each record of the source."""
    from tasks.curation.curated import LARGE_FILES

    return fetch(curated, "curated", LARGE_FILES)


class EncodingPlan(NamedTuple):
    """Groups of shards for the map tasks, and the fraction of each tier's images that a stage encodes."""

    groups: list[int]
    fractions: dict[str, float]


@task(cache=envs.cache("components"), enable_deck=True, **envs.gpu_single("encoder", reads_hub=True))
def make_components(curated: CuratedDir, config: ComponentsConfig) -> ComponentsDir:
    """Makes VAE, text encoder and processor: pinned ones from the Hub, or small ones trained on a sample of the corpus."""
    from tasks.encoding import components

    path = _fetch_curated(curated)
    work_dir = work_path("components", "components", config.model_dump(mode="json"), [path])
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "components",
            lambda out: components.make_components(path, config, out, work_dir),
            parents=[path],
            config=config,
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(**envs.light("encoder"))
def plan_encoding(curated: CuratedDir, config: EncodingConfig, stage: Optional[StageConfig] = None) -> EncodingPlan:
    """Groups the corpus's shards. With a stage, also computes the fraction of each tier that it draws."""
    from tasks.encoding import flow

    path = _fetch_curated(curated)
    fractions = flow.fractions_of(path, stage) if stage is not None else {}
    return EncodingPlan(groups=flow.list_groups(path, config.max_groups), fractions=fractions)


@task(**envs.gpu_single("encoder"))
def encode_texts_group(
    curated: CuratedDir, components: ComponentsDir, config: EncodingConfig, groups: list[int], group: int
) -> TextsDir:
    """Encodes the captions of one group of shards."""
    from tasks.encoding import flow

    curated_path, components_path = _fetch_curated(curated), fetch(components, "components")
    artifact, _, _ = produce(
        "texts",
        lambda out: flow.encode_texts_group(curated_path, components_path, config, group, len(groups), out),
        logs=(LOCATIONS,),
    )
    return artifact


@task(**envs.gpu_single("encoder"))
def encode_latents_group(
    curated: CuratedDir,
    components: ComponentsDir,
    stage: StageConfig,
    fractions: dict[str, float],
    config: EncodingConfig,
    groups: list[int],
    group: int,
) -> LatentsDir:
    """Encodes the images of one group of shards for one stage."""
    from tasks.encoding import flow

    curated_path, components_path = _fetch_curated(curated), fetch(components, "components")
    artifact, _, _ = produce(
        "latents",
        lambda out: flow.encode_latents_group(
            curated_path, components_path, stage, fractions, config, group, len(groups), out
        ),
        logs=(LOCATIONS,),
    )
    return artifact


@task(enable_deck=True, **envs.gather("encoder"))
def gather_texts(
    curated: CuratedDir, components: ComponentsDir, config: EncodingConfig, groups: list[Optional[TextsDir]]
) -> TextsDir:
    """Writes the index of all texts parts, and the ledger of records that are not encoded."""
    from tasks.encoding import flow, ledger

    paths = [fetch(group, "texts") if group is not None else None for group in groups]
    parents = [_fetch_curated(curated), fetch(components, "components", without=flow.TENSORS)]
    with plain_errors():
        artifact, directory, report = produce(
            "texts",
            lambda out: flow.gather(parents[0], paths, "texts", out),
            parents=parents,
            config={name: getattr(config, name) for name in flow.TEXT_KEYS},
            counts=lambda report: {"records": int(report["encoded"]), "texts": int(report["texts"])},
            logs=flow.LOGS,
        )
    logger.info(ledger.summary(report, "texts"))
    Deck("Encoding: texts", (directory / flow.PAGE).read_text())
    return artifact


@task(enable_deck=True, **envs.gather("encoder"))
def gather_latents(
    curated: CuratedDir,
    components: ComponentsDir,
    stage: StageConfig,
    fractions: dict[str, float],
    config: EncodingConfig,
    groups: list[Optional[LatentsDir]],
) -> LatentsDir:
    """Writes the index of one stage's latents parts, and the ledger of records that are not encoded."""
    from tasks.encoding import flow, ledger

    paths = [fetch(group, "latents") if group is not None else None for group in groups]
    parents = [_fetch_curated(curated), fetch(components, "components", without=flow.TENSORS)]
    shape = {"image_size_px": stage.image_size_px, "aspect_ratios": list(stage.aspect_ratios)}
    with plain_errors():
        artifact, directory, report = produce(
            "latents",
            lambda out: flow.gather(parents[0], paths, "latents", out, fractions=fractions, **shape),
            parents=parents,
            config={
                "stage": shape | {"fractions": fractions},
                "encoding": {name: getattr(config, name) for name in flow.LATENT_KEYS},
            },
            counts=lambda report: {"images": int(report["encoded"])},
            logs=flow.LOGS,
        )
    logger.info(ledger.summary(report, f"latents of {stage.name}"))
    Deck(f"Encoding: latents of {stage.name}", (directory / flow.PAGE).read_text())
    return artifact
