"""Generated images and their scores."""

from __future__ import annotations

import shutil
from pathlib import Path

from flytekit import Deck, task

from eval.config import EvalConfig
from tasks import envs
from tasks.artifacts import ComponentsDir, ImagesDir, MergedDir, ScorecardDir, exclusive, fetch, produce, work_path


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_images(merged: MergedDir, components: ComponentsDir, config: EvalConfig, seed: int) -> ImagesDir:
    """One seed's images for every prompt of the benchmark, sampled through diffusers' pipeline."""
    from tasks.evaluation import evaluate

    merged_path, components_path = fetch(merged, "merged"), fetch(components, "components")
    parents = [merged_path, components_path]
    section = {"eval": config.model_dump(mode="json"), "seed": seed}
    work_dir = work_path("images", "evaluation", section, parents)
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "images",
            lambda out: evaluate.generate_seed(merged_path, components_path, config, seed, work_dir, out),
            parents=parents,
            config=section,
            counts=lambda report: {"images": int(report["images"])},
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("evaluation"), enable_deck=True, **envs.gather("evaluator"))
def score_images(images: list[ImagesDir], config: EvalConfig) -> ScorecardDir:
    """Scores of all seeds: means, deviations, intervals, a grid to look at."""
    from tasks.evaluation import evaluate

    paths = [fetch(part, "images") for part in images]
    artifact, final, _ = produce(
        "scorecard", lambda out: evaluate.score(paths, config, out), parents=paths, config=config
    )
    Deck("Scorecard", (Path(final) / "scorecard.html").read_text())
    return artifact
