"""Curated shards to one merged transformer: components, latents, three stages, merge."""

from __future__ import annotations

from typing import NamedTuple

from flytekit import workflow

from model.config import MergeConfig
from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.encoding.task import encode_stage, make_components
from tasks.merging.task import merge_checkpoints
from tasks.planning.sections import EncodeStage, TrainStage
from tasks.training.task import train_stage


class Trained(NamedTuple):
    """A transformer and the frozen components that it was trained with."""

    merged: MergedDir
    components: ComponentsDir


@workflow
def train(
    curated: CuratedDir,
    components_config: ComponentsConfig,
    encoding: EncodingConfig,
    encode1: EncodeStage,
    encode2: EncodeStage,
    encode3: EncodeStage,
    train1: TrainStage,
    train2: TrainStage,
    train3: TrainStage,
    merge: MergeConfig,
) -> Trained:
    """Each stage starts from the last; resolution rises and the capacity factor falls."""
    components = make_components(curated=curated, config=components_config)
    latents1 = encode_stage(curated=curated, components=components, stage=encode1, config=encoding)
    latents2 = encode_stage(curated=curated, components=components, stage=encode2, config=encoding, text_from=latents1)
    latents3 = encode_stage(curated=curated, components=components, stage=encode3, config=encoding, text_from=latents1)
    stage1 = train_stage(latents=latents1, components=components, stage=train1)
    stage2 = train_stage(latents=latents2, components=components, stage=train2, init=stage1)
    stage3 = train_stage(latents=latents3, components=components, stage=train3, init=stage2)
    merged = merge_checkpoints(checkpoints=stage3, stage=train3, config=merge)
    return Trained(merged=merged, components=components)
