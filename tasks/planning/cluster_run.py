"""Checks, before the costly steps, that pods can keep checkpoints and read latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model import storage
from model.constants import VAE_SCALE
from model.stages import TrainingStage
from tasks.encoding.fractions import drawn_fractions
from tasks.planning.sections import Stage
from tasks.recipe import Recipe

RUNS = "runs"  # folder of the store, for checkpoints of stages
STORED_BYTES = 2  # of a latent's value, in bfloat16
GIB = 2**30


def with_shared_checkpoints(recipe: Recipe, store: str) -> Recipe:
    """The recipe with `train.checkpoint_uri`; if it has none, NUCLEUS_STORE/runs. The disk of a pod ends with the pod: the next
    attempt would start at step 0, and each node would have only its part of a checkpoint.

    Args:
        store: the directory or URI of parts (`store.store`).

    Raises:
        ValueError: several nodes train, and neither is set.
    """
    train = recipe.train
    if train.checkpoint_uri is not None:
        return recipe
    if storage.is_remote(store):
        uri = storage.join(store, RUNS)
        return recipe.model_copy(update={"train": train.model_copy(update={"checkpoint_uri": uri})})
    if train.nnodes > 1:
        raise ValueError(
            f"train.checkpoint_uri is not set and NUCLEUS_STORE is not an object store, but train.nnodes={train.nnodes} nodes "
            "write one checkpoint: set train.checkpoint_uri, such as s3://YOUR-BUCKET/nucleus/runs, or nucleus.store of the "
            "site's configuration"
        )
    return recipe


def check_engine(engine: str, registered: str | None) -> None:
    """
    Args:
        engine: `curation.engine`.
        registered: NUCLEUS_SPARK at registration; None if it was not set.

    Raises:
        ValueError: Spark, where tasks that decide are registered as plain pods, whose image has none: they would fail
            after all images are scored.
    """
    if engine == "spark" and not registered:
        raise ValueError(
            "curation.engine='spark', but draft_corpus and decide_corpus are not registered as Spark applications: register "
            "with NUCLEUS_SPARK (docs/scale.md), or use duckdb"
        )


def check_download(images_by_tier: Mapping[str, int], stages: Sequence[Stage], scratch_gib: int) -> None:
    """Refuses, right after curation, latents that each node would copy and that its scratch cannot contain.

    Args:
        images_by_tier: images of the curated corpus.
        scratch_gib: ephemeral storage of a training pod.

    Raises:
        ValueError: names the stage, its bytes and the setting that copies nothing.
    """
    for stage in stages:
        if stage.train.train.latents == "download":
            size = latent_bytes(images_by_tier, stage.train)
            if size > scratch_gib * GIB:
                raise ValueError(
                    f"train.latents=download would copy the latents of {stage.train.stage.name}, about {size / 1e9:,.0f} GB "
                    f"at square shapes, to each node, whose pod may write {scratch_gib * GIB / 1e9:,.0f} GB: set "
                    "train.latents=stream"
                )


def latent_bytes(images_by_tier: Mapping[str, int], stage: TrainingStage) -> float:
    """Bytes of the latents that a stage draws, as if all images were square."""
    fractions = drawn_fractions(stage.stage, images_by_tier)
    if stage.stage.bucket_weights:  # whole tiers are encoded
        fractions = {tier: float(fraction > 0) for tier, fraction in fractions.items()}
    images = sum(count * fractions[tier] for tier, count in images_by_tier.items())
    side = stage.stage.image_size_px / VAE_SCALE
    channels = stage.model.in_channels / stage.model.patch_size**2
    return images * channels * side**2 * STORED_BYTES
