"""WSM merge of a stage's last checkpoints."""

from __future__ import annotations

from flytekit import task

from model.config import MergeConfig
from tasks import envs
from tasks.artifacts import CheckpointsDir, MergedDir, fetch, produce
from tasks.planning.sections import TrainStage


@task(cache=envs.cache("merging"), **envs.gather("trainer"))
def merge_checkpoints(checkpoints: CheckpointsDir, stage: TrainStage, config: MergeConfig) -> MergedDir:
    """One transformer in diffusers' layout, at the capacity factors of the stage."""
    from tasks.merging import merge_stage

    path = fetch(checkpoints, "checkpoints")
    artifact, _, _ = produce(
        "merged",
        lambda out: merge_stage.merge_stage(path, stage.model, config, out),
        parents=[path],
        config={"merge": config.model_dump(mode="json"), "model": stage.model.model_dump(mode="json")},
    )
    return artifact
