"""The training alone: raw records to merged weights, without images, scorecard or publishing.

    NUCLEUS_TRAIN_NNODES=8 NUCLEUS_TRAIN_NPROC=8 \\
        pyflyte run --remote workflows/pretrain.py pretrain --recipe nucleus_17b --source s3://BUCKET/images/
    pyflyte run workflows/pretrain.py pretrain --recipe tiny

    records -> curated -> components, latents x3 -> checkpoints x3 -> merged

What a team starts on 64 GPUs, as GenEval has no detector yet; and ablations too. Whatever `reproduce` or `ablate` made
of the same recipe comes from the cache, and the other way about.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import workflow

import workflows.command_line  # noqa: F401  (it makes --overrides repeatable)
from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir
from tasks.planning.task import Sections, resolve_recipe
from workflows.curate import curate_source
from workflows.train import Trained, train


class Pretrained(NamedTuple):
    """What a pretraining leaves behind: the transformer, what it was trained with, and what on."""

    merged: MergedDir
    components: ComponentsDir
    curated: CuratedDir


def up_to_merged(sections: Sections) -> tuple[CuratedDir, Trained]:
    """The road that every recipe takes, as part of a workflow: it is called while one is composed."""
    curated = curate_source(source=sections.source, path=sections.source_path, config=sections.curation)
    trained = train(
        curated=curated,
        components_config=sections.components,
        encoding=sections.encoding,
        encode1=sections.encode1,
        encode2=sections.encode2,
        encode3=sections.encode3,
        train1=sections.train1,
        train2=sections.train2,
        train3=sections.train3,
        merge=sections.merge,
    )
    return curated, trained


@workflow
def pretrain(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> Pretrained:
    """Curates, encodes, trains three stages and merges one recipe.

    Args:
        recipe: name of a recipe in recipes/, such as nucleus_17b, or the path of a YAML file.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's, as for `reproduce`.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source=source, ends_in="merged")
    curated, trained = up_to_merged(sections)
    return Pretrained(merged=trained.merged, components=trained.components, curated=curated)
