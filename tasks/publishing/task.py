"""The pipeline directory that diffusers loads, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

from flytekit import Deck, task

from tasks import envs
from tasks.artifacts import (
    ComponentsDir,
    CuratedDir,
    LatentsDir,
    MergedDir,
    PipelineDir,
    ScorecardDir,
    TextsDir,
    fetch,
    plain_errors,
    produce,
)
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
    from tasks.curation.curated import LARGE_FILES
    from tasks.publishing import publish, summary

    merged_path, components_path = fetch(merged, "merged"), fetch(components, "components")
    scorecard_path, curated_path = fetch(scorecard, "scorecard"), fetch(curated, "curated", LARGE_FILES)
    recipe = publish.public_recipe(json.loads(recipe_json))
    side = recipe["eval"]["image_size_px"]

    def make(out: Path) -> dict:
        report = publish.publish(merged_path, components_path, scorecard_path, recipe, out)
        publish.check_pipeline(out, side, side)  # what does not load is not published
        return report

    artifact, final, _ = produce(
        "pipeline",
        make,
        parents=[merged_path, components_path, scorecard_path, curated_path],
        config={"recipe": recipe},
    )
    with plain_errors():
        publish.upload(final, config)
    Deck("Published", summary.page(final))
    return artifact


@task(**envs.light("publisher"))
def show_results(
    pipeline: PipelineDir,
    scorecard: ScorecardDir,
    curated: CuratedDir,
    latents: list[LatentsDir],
    texts: Optional[TextsDir] = None,
) -> str:
    """Where everything is and how good it is. Not cached, so that a run that finds everything in the cache prints it too."""
    from tasks.curation.curated import LARGE_FILES
    from tasks.publishing import summary

    paths = fetch(pipeline, "pipeline"), fetch(scorecard, "scorecard"), fetch(curated, "curated", LARGE_FILES)
    encoded = [fetch(texts, "texts")] if texts is not None else []
    encoded += [fetch(stage, "latents") for stage in latents]
    text = "\n".join(summary.lines(*paths, encoded))
    print(text, flush=True)
    return text
