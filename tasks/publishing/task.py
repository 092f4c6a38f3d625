"""The pipeline directory that diffusers loads, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

from flytekit import Deck, task

from tasks import envs
from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir, PipelineDir, ScorecardDir, fetch, produce
from tasks.publishing.config import PublishConfig


@task(cache=envs.cache("publishing"), enable_deck=True, **envs.gather("publisher"))
def publish_pipeline(
    merged: MergedDir,
    components: ComponentsDir,
    scorecard: ScorecardDir,
    curated: CuratedDir,
    config: PublishConfig,
    recipe_json: str,
) -> PipelineDir:
    """Assembles, checks in a fresh process, and uploads where the recipe says so."""
    from tasks.publishing import publish, summary

    merged_path, components_path, scorecard_path, curated_path = map(fetch, (merged, components, scorecard, curated))
    artifact, final, _ = produce(
        "pipeline",
        lambda out: publish.publish(merged_path, components_path, scorecard_path, json.loads(recipe_json), out),
        parents=[merged_path, components_path, scorecard_path, curated_path],
        config={"publish": config.model_dump(mode="json"), "recipe": json.loads(recipe_json)},
    )
    publish.check_pipeline(final)
    publish.upload(final, config)
    Deck("Published", summary.published_html(Path(final)))
    return artifact
