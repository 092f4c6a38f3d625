"""Tasks that publish the pipeline directory and print the results."""

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

SHOWN = (".png", ".parquet")  # left out of further scorecards: only their numbers and pages are read


@task(cache=envs.cache("publishing"), enable_deck=True, **envs.publisher())
def publish_pipeline(
    merged: MergedDir,
    components: ComponentsDir,
    scorecard: ScorecardDir,
    further: list[ScorecardDir],
    curated: CuratedDir,
    config: PublishConfig,
    recipe_json: str,
) -> PipelineDir:
    """Checks the lineage, assembles the pipeline, checks it in a fresh process, and uploads it as the recipe says.

    `further`: scorecards of the recipe's further benchmarks.
    """
    from tasks.curation.curated import LARGE_FILES
    from tasks.lineage.ancestors import check_ancestors
    from tasks.publishing import publish, redact, summary

    merged_path, components_path = fetch(merged, "merged"), fetch(components, "components")
    scorecard_path, curated_path = fetch(scorecard, "scorecard"), fetch(curated, "curated", LARGE_FILES)
    further_paths = [fetch(card, "scorecard", SHOWN) for card in further]
    with plain_errors():
        check_ancestors(merged_path, curated_path, [components_path, scorecard_path, *further_paths])
    recipe = redact.recipe(json.loads(recipe_json))
    side = recipe["eval"]["image_size_px"]

    def make(out: Path) -> dict:
        report = publish.publish(merged_path, components_path, scorecard_path, recipe, out, further_paths)
        publish.check_pipeline(out, side, side)  # a pipeline that does not load is not published
        return report

    artifact, final, _ = produce(
        "pipeline",
        make,
        parents=[merged_path, components_path, scorecard_path, *further_paths, curated_path],
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
    further: list[ScorecardDir],
    curated: CuratedDir,
    latents: list[LatentsDir],
    texts: Optional[TextsDir] = None,
) -> str:
    """Prints the scores and the paths of the results. Not cached, so that a fully cached run prints them too."""
    from tasks.curation.curated import LARGE_FILES
    from tasks.publishing import summary

    paths = fetch(pipeline, "pipeline"), fetch(scorecard, "scorecard"), fetch(curated, "curated", LARGE_FILES)
    encoded = [fetch(texts, "texts")] if texts is not None else []
    encoded += [fetch(stage, "latents") for stage in latents]
    others = [fetch(card, "scorecard", SHOWN) for card in further]
    text = "\n".join(summary.lines(*paths, encoded, others))
    print(text, flush=True)
    return text
