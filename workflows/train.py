"""Trains on a curated corpus: components, latents, training stages, merge.

    pyflyte run workflows/train.py train --recipe tiny --curated .nucleus/artifacts/curated/DIGEST
    pyflyte run workflows/train.py train_one_stage --recipe tiny --stage NAME --latents DIR --texts DIR --components DIR
    pyflyte run workflows/train.py merge --recipe tiny --checkpoints .nucleus/artifacts/checkpoints/DIGEST

    curated --> components --> texts
                               latents of stage 1 --> checkpoints 1 --+
                               latents of stage 2 --> checkpoints 2 <-+--> ... --> merged

The recipe sets the number of stages: `train_stages` is a dynamic workflow, which creates its nodes when it runs
(docs/decisions/workflows.md).
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

from flytekit import dynamic, workflow

from model.config import MergeConfig
from tasks import envs
from tasks.artifacts import CheckpointsDir, ComponentsDir, CuratedDir, LatentsDir, MergedDir, TextsDir
from tasks.encoding.config import EncodingConfig
from tasks.encoding.task import make_components
from tasks.merging.task import merge_checkpoints
from tasks.planning.sections import Stage
from tasks.planning.task import Sections, check_curated, choose_stage, resolve_recipe
from tasks.training.task import train_stage
from workflows.encode import encode_latents, encode_texts


class Stages(NamedTuple):
    """The result of all stages: the merged transformer, checkpoints and latents of each stage, and texts.

    latents: those of the last stage, also in `stage_latents`.
    """

    merged: MergedDir
    checkpoints: list[CheckpointsDir]
    latents: LatentsDir
    stage_latents: list[LatentsDir]
    texts: TextsDir


class Trained(NamedTuple):
    """`Stages`, and the frozen components that the transformer was trained with."""

    merged: MergedDir
    components: ComponentsDir
    checkpoints: list[CheckpointsDir]
    latents: LatentsDir
    stage_latents: list[LatentsDir]
    texts: TextsDir


@dynamic(**envs.dynamic())
def train_stages(
    curated: CuratedDir,
    components: ComponentsDir,
    stages: list[Stage],
    encoding: EncodingConfig,
    merge: MergeConfig,
) -> Stages:
    """Each stage starts from the previous one. Encoding comes first: it needs no trained weights, and may run in
    parallel."""
    texts = encode_texts(curated=curated, components=components, config=encoding)
    latents = [
        encode_latents(curated=curated, components=components, stage=stage.train.stage, config=encoding)
        for stage in stages
    ]
    checkpoints: list[CheckpointsDir] = []
    for stage, encoded in zip(stages, latents):
        checkpoints.append(
            train_stage(
                latents=encoded,
                texts=texts,
                components=components,
                stage=stage.train,
                init=checkpoints[-1] if checkpoints else None,
            )
        )
    merged = merge_checkpoints(checkpoints=checkpoints[-1], model=stages[-1].train.model, config=merge)
    return Stages(merged=merged, checkpoints=checkpoints, latents=latents[-1], stage_latents=latents, texts=texts)


def train_curated(curated: CuratedDir, sections: Sections) -> Trained:
    """Adds the nodes from a curated corpus to merged weights to the workflow that is being composed."""
    checked = check_curated(curated=curated, stages=sections.stages)
    components = make_components(curated=curated, config=sections.components)
    checked >> components
    trained = train_stages(
        curated=curated,
        components=components,
        stages=sections.stages,
        encoding=sections.encoding,
        merge=sections.merge,
    )
    return Trained(
        merged=trained.merged,
        components=components,
        checkpoints=trained.checkpoints,
        latents=trained.latents,
        stage_latents=trained.stage_latents,
        texts=trained.texts,
    )


@workflow
def train(recipe: str, curated: CuratedDir, overrides: Union[list[str], str] = []) -> Trained:
    """Trains the stages of a recipe on a corpus that is curated already.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        curated: a sealed directory of kind curated.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source="", starts_from="curated", ends_in="merged")
    trained = train_curated(curated, sections)
    return Trained(
        merged=trained.merged,
        components=trained.components,
        checkpoints=trained.checkpoints,
        latents=trained.latents,
        stage_latents=trained.stage_latents,
        texts=trained.texts,
    )


@workflow
def train_one_stage(
    recipe: str,
    stage: str,
    latents: LatentsDir,
    texts: TextsDir,
    components: ComponentsDir,
    init: Optional[CheckpointsDir] = None,
    overrides: Union[list[str], str] = [],
) -> CheckpointsDir:
    """Trains one stage of a recipe.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        stage: the name of one of its train.stages.
        latents: a sealed directory of kind latents, encoded for this stage.
        texts: a sealed directory of kind texts.
        components: a sealed directory of kind components: those that encoded both.
        init: a sealed directory of kind checkpoints: those of the previous stage; default: start from train.init_from
            or from scratch.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(
        recipe=recipe, overrides=overrides, source="", starts_from="encoded", ends_in="checkpoints"
    )
    chosen = choose_stage(stages=sections.stages, name=stage)
    return train_stage(latents=latents, texts=texts, components=components, stage=chosen.stage, init=init)


@workflow
def merge(recipe: str, checkpoints: CheckpointsDir, overrides: Union[list[str], str] = []) -> MergedDir:
    """Merges the last checkpoints of a recipe's last stage, as its merge section says.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        checkpoints: a sealed directory of kind checkpoints: those of the last stage.
        overrides: a change such as merge.last_n=4, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(
        recipe=recipe, overrides=overrides, source="", starts_from="checkpoints", ends_in="merged"
    )
    last = choose_stage(stages=sections.stages, name="")
    return merge_checkpoints(checkpoints=checkpoints, model=last.model, config=sections.merge)
