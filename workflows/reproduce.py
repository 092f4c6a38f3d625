"""The complete recipe: raw records to a published pipeline.

pyflyte run workflows/reproduce.py reproduce --recipe tiny
pyflyte run workflows/reproduce.py reproduce --recipe tiny --source my_images/
pyflyte run --remote workflows/reproduce.py reproduce --recipe my_recipe.yaml --source s3://BUCKET/images/

records -> curated -> components, latents and checkpoints of each stage -> merged -> scorecard -> pipeline
"""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import workflow

from tasks.artifacts import CuratedDir, MergedDir, PipelineDir, ScorecardDir
from tasks.planning.task import resolve_recipe
from tasks.publishing.task import publish_pipeline, show_results
from workflows.evaluate import score_further, score_merged
from workflows.pretrain import up_to_merged


class Reproduction(NamedTuple):
    """The published pipeline, and the artifacts that it was made from."""

    pipeline: PipelineDir
    scorecard: ScorecardDir
    merged: MergedDir
    curated: CuratedDir


@workflow
def reproduce(recipe: str = "tiny", overrides: Union[list[str], str] = [], source: str = "") -> Reproduction:
    """Curates, encodes, trains all stages, merges, evaluates and publishes one recipe.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        overrides: a change such as train.stages[0].steps=200, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's: a folder (or s3:// URI) of images with captions, tars or
            Parquet files.
    """
    sections = resolve_recipe(
        recipe=recipe, overrides=overrides, source=source, starts_from="source", ends_in="pipeline"
    )
    curated, trained = up_to_merged(sections)
    scorecard = score_merged(
        merged=trained.merged, components=trained.components, curated=curated, config=sections.eval
    )
    further = score_further(
        merged=trained.merged, components=trained.components, configs=sections.further_evals, curated=curated
    )
    pipeline = publish_pipeline(
        merged=trained.merged,
        components=trained.components,
        scorecard=scorecard,
        further=further,
        curated=curated,
        config=sections.publish,
        recipe_json=sections.recipe_json,
    )
    show_results(
        pipeline=pipeline,
        scorecard=scorecard,
        further=further,
        curated=curated,
        texts=trained.texts,
        latents=trained.stage_latents,
    )
    return Reproduction(pipeline=pipeline, scorecard=scorecard, merged=trained.merged, curated=curated)
