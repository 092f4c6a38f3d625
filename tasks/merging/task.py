"""The task that merges the last checkpoints of a stage (WSM)."""

from __future__ import annotations

from flytekit import task

from model.config import MergeConfig, TransformerConfig
from tasks import envs
from tasks.artifacts import CheckpointsDir, MergedDir, fetch, produce


@task(cache=envs.cache("merging"), enable_deck=True, **envs.merger())
def merge_checkpoints(checkpoints: CheckpointsDir, model: TransformerConfig, config: MergeConfig) -> MergedDir:
    """Merges into one transformer in diffusers' layout. `model` has the capacity factors of the last stage."""
    from tasks.merging import merge_stage

    path = fetch(checkpoints, "checkpoints")
    artifact, _, _ = produce(
        "merged",
        lambda out: merge_stage.merge_stage(path, model, config, out),
        parents=[path],
        config={"merge": config.model_dump(mode="json"), "model": model.model_dump(mode="json")},
    )
    return artifact
