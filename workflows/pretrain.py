"""Training without evaluation: raw records to merged weights.

    NUCLEUS_TRAIN_NNODES=8 NUCLEUS_TRAIN_NPROC=8 \\
        pyflyte run --remote workflows/pretrain.py pretrain --recipe nucleus_17b --source s3://BUCKET/images/
    pyflyte run workflows/pretrain.py pretrain --recipe tiny

    records -> curated -> components, latents and checkpoints of each stage -> merged

workflows/evaluate.py can score the result. Artifacts that `reproduce` or `ablate` made from the same recipe come from
the cache, and vice versa.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import workflow

from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir
from tasks.planning.task import Sections, resolve_recipe
from workflows.curate import curate_source
from workflows.train import Trained, train_curated


class Pretrained(NamedTuple):
    """The transformer, the components that it was trained with, and the corpus."""

    merged: MergedDir
    components: ComponentsDir
    curated: CuratedDir


def up_to_merged(sections: Sections) -> tuple[CuratedDir, Trained]:
    """Adds the nodes from raw records to merged weights to the workflow that is being composed."""
    curated = curate_source(source=sections.source, path=sections.source_path, config=sections.curation)
    return curated, train_curated(curated, sections)


@workflow
def pretrain(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> Pretrained:
    """Curates, encodes, trains all stages and merges one recipe.

    Args:
        recipe: name of a recipe in recipes/, such as nucleus_17b, or the path of a YAML file.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's, as for `reproduce`.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source=source, starts_from="source", ends_in="merged")
    curated, trained = up_to_merged(sections)
    return Pretrained(merged=trained.merged, components=trained.components, curated=curated)
