"""Scores any diffusers pipeline on any benchmarks, or merged weights as part of other workflows.

    pyflyte run workflows/evaluate.py evaluate --model .nucleus/artifacts/pipeline/DIGEST --benchmarks shapes
    pyflyte run workflows/evaluate.py evaluate --model OWNER/NAME --revision COMMIT --benchmarks geneval,geneval2,dpg,oneig
    pyflyte run workflows/evaluate.py evaluate --model .nucleus/artifacts/merged/DIGEST \\
        --components .nucleus/artifacts/components/DIGEST --recipe tiny --benchmarks shapes

    prompts -> images (mapped over parts of each seed) -> answers -> scorecard
"""

from __future__ import annotations

from functools import partial
from typing import Optional, Union

from flytekit import dynamic, map_task, workflow

from eval.config import EvalConfig
from tasks import envs
from tasks.artifacts import ComponentsDir, CuratedDir, MergedDir, ScorecardDir
from tasks.evaluation.models import Model
from tasks.evaluation.task import (
    generate_from_model,
    generate_part,
    judge_images,
    make_prompts,
    plan_generation,
    resolve_model,
    score_answers,
)
from tasks.planning.task import plan_benchmarks


def _scored(sample: partial, config: EvalConfig, parts_per_seed: int, curated: Optional[CuratedDir]) -> ScorecardDir:
    """The nodes from prompts to a scorecard; `sample` makes a part of the images."""
    generation = plan_generation(config=config, parts_per_seed=parts_per_seed)
    prompts = make_prompts(config=generation.config, curated=curated)
    generate = partial(sample, prompts=prompts, config=generation.config)
    images = map_task(generate)(part=generation.parts)
    answers = judge_images(images=images, prompts=prompts, config=config)
    return score_answers(images=images, prompts=prompts, answers=answers, config=config)


@workflow
def score_merged(
    merged: MergedDir,
    components: ComponentsDir,
    config: EvalConfig,
    curated: Optional[CuratedDir] = None,
    parts_per_seed: int = 1,
) -> ScorecardDir:
    """Scores merged weights with the recipe's eval section, as part of other workflows."""
    return _scored(partial(generate_part, merged=merged, components=components), config, parts_per_seed, curated)


@workflow
def score_model(
    model: Model, digest: str, config: EvalConfig, parts_per_seed: int, curated: Optional[CuratedDir] = None
) -> ScorecardDir:
    """Scores any pipeline. `digest` identifies the model in the cache."""
    return _scored(partial(generate_from_model, model=model, digest=digest), config, parts_per_seed, curated)


@dynamic(**envs.dynamic("evaluator"))
def score_further(
    merged: MergedDir, components: ComponentsDir, configs: list[EvalConfig], curated: Optional[CuratedDir] = None
) -> list[ScorecardDir]:
    """One scorecard of merged weights for each of a recipe's further benchmarks."""
    return [score_merged(merged=merged, components=components, config=config, curated=curated) for config in configs]


@dynamic(**envs.dynamic("evaluator"))
def score_benchmarks(
    model: Model, configs: list[EvalConfig], parts_per_seed: int, curated: Optional[CuratedDir] = None
) -> list[ScorecardDir]:
    """One scorecard for each benchmark."""
    return [
        score_model(model=model, digest=model.digest, config=config, parts_per_seed=parts_per_seed, curated=curated)
        for config in configs
    ]


@workflow
def evaluate(
    model: str,
    benchmarks: str,
    revision: str = "",
    components: str = "",
    recipe: str = "",
    overrides: Union[list[str], str] = [],
    judges: str = "",
    parts_per_seed: int = 1,
    curated: Optional[CuratedDir] = None,
) -> list[ScorecardDir]:
    """Scores a model on benchmarks, with one scorecard each.

    Args:
        model: a directory that diffusers loads, merged weights (with `components`), a Hub id, an s3:// URI of a
            published pipeline, or newest: the pipeline published last on this machine.
        benchmarks: names, separated by commas, such as geneval,geneval2,dpg. `python -m eval.cli ls` lists them. "": those
            of the recipe, or of a published pipeline; else geneval,geneval2.
        revision: the commit of a Hub id; default: the newest.
        components: a sealed directory of kind components, for merged weights.
        recipe: its eval section has the settings; default: those of a published pipeline's scorecard, else the
            defaults.
        overrides: a setting such as guidance_scale=3 or geneval.seeds=[0], or a JSON list of them. May be given several
            times.
        judges: such as ssd-mobilenet-v2 or dpg.vqa=blip-vqa, separated by commas; default: see docs/evaluation.md,
            which are not the official ones for every benchmark.
        parts_per_seed: number of map tasks that sample the images of one seed. The images are the same for any number.
        curated: a sealed directory of kind curated, for the captions benchmark.
    """
    resolved = resolve_model(model=model, revision=revision, components=components)
    configs = plan_benchmarks(model=resolved, benchmarks=benchmarks, recipe=recipe, overrides=overrides, judges=judges)
    return score_benchmarks(model=resolved, configs=configs, parts_per_seed=parts_per_seed, curated=curated)
