"""Reads the recipe and splits it into the inputs of tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Union

from flytekit import task
from flytekit.core.local_cache import CACHE_LOCATION

from eval import catalog
from eval.config import EvalConfig
from model.config import MergeConfig, TransformerConfig
from model.logs import get_logger
from model.stages import TrainingStage
from tasks import envs
from tasks.artifacts import CuratedDir, fetch, is_local, plain_errors
from tasks.curation.captioning import check_captioner
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.scorers import check_settings
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.evaluation.models import Model
from tasks.evaluation.plan import further_configs
from tasks.planning import word_limit
from tasks.planning.candidates import Candidate
from tasks.planning.cluster_run import check_download, check_engine, with_shared_checkpoints
from tasks.planning.local_cache import forget_lost_artifacts
from tasks.planning.local_run import check_directories
from tasks.planning.sections import (
    MILESTONES,
    Stage,
    check_ranks,
    check_scoring,
    check_tiers,
    check_workflow,
    for_own_images,
    stage_named,
    stages,
)
from tasks.planning.source import check_source, check_takedown
from tasks.publishing.config import PublishConfig
from tasks.recipe import load_recipe
from tasks.store import home, store

logger = get_logger(__name__)


class Sections(NamedTuple):
    """The recipe, split into the inputs of tasks."""

    name: str
    source: SourceConfig
    source_path: str
    curation: CurationConfig
    components: ComponentsConfig
    encoding: EncodingConfig
    stages: list[Stage]
    merge: MergeConfig
    eval: EvalConfig
    further_evals: list[EvalConfig]
    publish: PublishConfig
    recipe_json: str


@task(**envs.planner())
def resolve_recipe(
    recipe: str, overrides: Union[list[str], str], source: str, ends_in: str, starts_from: str = "source"
) -> Sections:
    """Checks the whole recipe before any work. Not cached: it also drops cache entries of lost artifacts.

    `starts_from`, `ends_in`: the artifacts that the workflow is given and makes (`sections.Milestone`).
    """
    changes = [overrides] if isinstance(overrides, str) else overrides
    with plain_errors():
        if is_local():
            check_directories(home(), Path(CACHE_LOCATION))
        loaded = load_recipe(recipe, changes)
        check_workflow(loaded, ends_in, starts_from)
        path = ""
        if starts_from == "source":
            check_takedown(loaded.curation.takedown, is_local())
            path = source or loaded.source.path or ""
            check_source(path, is_local())
            check_settings(loaded.curation.scorers)
            if not is_local():
                check_engine(loaded.curation.engine, os.environ.get("NUCLEUS_SPARK"))
        trains = MILESTONES.index(starts_from) < MILESTONES.index("checkpoints") <= MILESTONES.index(ends_in)
        if trains:
            check_ranks(loaded.train, envs.TRAIN_NNODES, envs.TRAIN_NPROC, is_local())
        if starts_from == "source" and loaded.curation.captioner is not None:
            check_captioner(loaded.curation.captioner)
    if path and loaded.source.is_made:  # a recipe for made images with the user's own
        chosen, given = word_limit.is_chosen(recipe, changes), loaded
        loaded = for_own_images(given, chosen)
        logger.info(
            f"{word_limit.line(given, loaded, chosen)}; the VAE's PSNR is reported, not required; scored by the benchmark "
            f"{loaded.eval.benchmark}"
        )
    further = _further_configs(loaded.eval) if ends_in == "pipeline" and loaded.eval.further_benchmarks else []
    if is_local() and MILESTONES.index(starts_from) < MILESTONES.index("scorecard") <= MILESTONES.index(ends_in):
        with plain_errors():
            for config in (loaded.eval, *further):
                catalog.check_installed(config)
    trained = loaded  # apart from the recipe to publish, which has no places of this cluster
    if trains and not is_local():
        trained = with_shared_checkpoints(loaded, store())
    forget_lost_artifacts(CACHE_LOCATION)
    return Sections(
        name=loaded.name,
        source=loaded.source.model_copy(update={"path": None}),
        source_path=path,
        curation=loaded.curation,
        components=loaded.components,
        encoding=loaded.encoding,
        stages=stages(trained),
        merge=loaded.merge,
        eval=loaded.eval.model_copy(update={"further_benchmarks": ()}),
        further_evals=further,
        publish=loaded.publish,
        recipe_json=loaded.model_dump_json(),
    )


def _further_configs(config: EvalConfig) -> list[EvalConfig]:
    with plain_errors():
        configs = further_configs(config, packaged=is_local() and not _has_gpu())
        for one in configs:
            check_scoring(one)
    return configs


@task(**envs.planner())
def check_curated(curated: CuratedDir, stages: list[Stage]) -> dict[str, int]:
    """Refuses a corpus without images for a stage, or with more latents than a training pod can copy, before it is encoded.
    Returns the number of images by tier."""
    from tasks.curation.curated import LARGE_FILES, images_by_tier

    path = fetch(curated, "curated", LARGE_FILES)
    with plain_errors():
        counts = images_by_tier(path)
        check_tiers(counts, stages)
        if not is_local():
            check_download(counts, stages, envs.training_scratch_gib())
    return counts


class ChosenStage(NamedTuple):
    """One stage of a recipe, and the model at its capacity factors."""

    stage: TrainingStage
    model: TransformerConfig


@task(**envs.light("curation"))
def choose_stage(stages: list[Stage], name: str) -> ChosenStage:
    """The stage of that name; the last one if `name` is empty."""
    with plain_errors():
        chosen = stage_named(stages, name).train
    return ChosenStage(stage=chosen, model=chosen.model)


@task(**envs.light("evaluator"))
def plan_benchmarks(
    model: Model, benchmarks: str, recipe: str, overrides: Union[list[str], str], judges: str
) -> list[EvalConfig]:
    """Checks the whole request before any work: one configuration for each benchmark. Also forgets artifacts that are gone.

    `recipe` has the settings; "": those of a published pipeline's scorecard. Benchmarks "" are those of these settings
    (`plan.default_benchmarks`).
    """
    from eval import catalog
    from tasks.evaluation import models, plan

    with plain_errors():
        if recipe:
            base = load_recipe(recipe, []).eval.model_dump(mode="json")
        else:
            base = models.published_settings(model) or {}
        changes = [overrides] if isinstance(overrides, str) else overrides
        configs = plan.plan_benchmarks(
            benchmarks or plan.default_benchmarks(base),
            base,
            [c for c in changes if c],
            judges,
            packaged=is_local() and not _has_gpu(),
        )
        for config in configs if is_local() else ():
            catalog.check_installed(config)
    forget_lost_artifacts(CACHE_LOCATION)
    return configs


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@task(**envs.light("evaluator"))
def plan_candidates(
    model: Model,
    benchmark: str,
    candidates: str,
    recipe: str,
    overrides: Union[list[str], str],
    judges: str,
    components: str,
) -> list[Candidate]:
    """Checks the request before any work: the incumbent and the candidates, with their settings on development
    prompts."""
    from tasks.planning import candidates as planner

    changes = [overrides] if isinstance(overrides, str) else overrides
    with plain_errors():
        planned = planner.plan_candidates(
            model, benchmark, candidates, recipe, [c for c in changes if c], judges, components, local=is_local()
        )
    forget_lost_artifacts(CACHE_LOCATION)
    return planned
