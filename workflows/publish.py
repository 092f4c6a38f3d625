"""Publishes a merged transformer, its components and its scorecard as a pipeline directory, and uploads it as the
recipe says.

pyflyte run workflows/publish.py publish --recipe tiny --merged DIR --components DIR --scorecard DIR --curated DIR
"""

from __future__ import annotations

from typing import Union

from flytekit import workflow

from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir, PipelineDir, ScorecardDir
from tasks.planning.task import resolve_recipe
from tasks.publishing.task import publish_pipeline, show_results


@workflow
def publish(
    recipe: str,
    merged: MergedDir,
    components: ComponentsDir,
    scorecard: ScorecardDir,
    curated: CuratedDir,
    further: list[ScorecardDir] = [],
    overrides: Union[list[str], str] = [],
) -> PipelineDir:
    """Publishes a transformer that is trained and scored already.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        merged: a sealed directory of kind merged.
        components: a sealed directory of kind components.
        scorecard: a sealed directory of kind scorecard.
        curated: a sealed directory of kind curated, for the lineage of the card.
        further: scorecards of the recipe's further benchmarks.
        overrides: a change such as publish.hub_repo_id=ORG/NAME, or a JSON list of them. May be given several times.
    """
    sections = resolve_recipe(
        recipe=recipe, overrides=overrides, source="", starts_from="scorecard", ends_in="pipeline"
    )
    pipeline = publish_pipeline(
        merged=merged,
        components=components,
        scorecard=scorecard,
        further=further,
        curated=curated,
        config=sections.publish,
        recipe_json=sections.recipe_json,
    )
    show_results(pipeline=pipeline, scorecard=scorecard, further=further, curated=curated, latents=[])
    return pipeline
