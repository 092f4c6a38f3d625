"""Selects the sections of a recipe that each task needs: a task runs again only when they change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

from eval import catalog
from eval.config import FILES, EvalConfig
from model import storage
from model.config import Section, TrainSettings
from model.constants import PIPELINE_TEXT_STATE
from model.stages import TrainingStage, training_stages
from tasks.recipe import Recipe

# Artifacts that workflows start from or make. "encoded": components, texts and latents.
Milestone = Literal["source", "curated", "encoded", "checkpoints", "merged", "scorecard", "pipeline"]
MILESTONES: tuple[Milestone, ...] = get_args(Milestone)
PHONE_FORMATS = ("AVIF", "HEIF")
ANY_ASPECT_RATIO = 1e6
OWN_CAPTION_WORDS = 60  # with the tokens of the chat format they fit in 64


class Stage(Section):
    """The input of one stage's tasks."""

    train: TrainingStage


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in order."""
    return [Stage(train=stage) for stage in training_stages(recipe.model, recipe.train)]


def stage_named(stages: list[Stage], name: str) -> Stage:
    """The stage of that name; the last one if `name` is empty.

    Raises:
        ValueError: there is no stage of that name.
    """
    if not name:
        return stages[-1]
    for stage in stages:
        if stage.train.stage.name == name:
            return stage
    names = ", ".join(stage.train.stage.name for stage in stages)
    raise ValueError(f"stage={name!r} is not a stage of the recipe: use one of {names}")


def check_workflow(recipe: Recipe, ends_in: Milestone = "pipeline", starts_from: Milestone = "source") -> None:
    """Refuses, before any work, a valid recipe that a workflow could not finish.

    Args:
        ends_in: the artifact that the workflow makes.
        starts_from: the artifact that the workflow is given.

    Raises:
        ValueError: names the key, and what would be valid.
    """
    reached = MILESTONES[MILESTONES.index(starts_from) + 1 : MILESTONES.index(ends_in) + 1]
    assert reached, (starts_from, ends_in)
    if "pipeline" in reached and recipe.model.is_ablation:
        raise ValueError(
            f"model.routing={recipe.model.model_dump()['routing']} is an ablation, and diffusers has no class that "
            "computes it: it cannot be published; pyflyte run workflows/ablate.py ablate ends in its scorecard"
        )
    if recipe.encoding.hidden_state_index != PIPELINE_TEXT_STATE:
        raise ValueError(
            f"encoding.hidden_state_index={recipe.encoding.hidden_state_index} must be {PIPELINE_TEXT_STATE}: samples "
            "and scores use the default text state of the pipeline, so training must use it too"
        )
    if "scorecard" in reached:
        check_scoring(recipe.eval)


def check_scoring(config: EvalConfig) -> None:
    """Refuses, before any work, images without a judge.

    Raises:
        ValueError: no judge for a skill, no development prompts, or a prompt file that does not exist.
    """
    try:
        catalog.judges_of(config)
    except ValueError as error:
        raise ValueError(
            f"eval.{error}. Or train without scores: pyflyte run workflows/pretrain.py pretrain, which ends in the merged "
            "weights"
        ) from error
    path = config.prompts_file
    if path is None and config.prompt_set not in catalog.benchmark(config.benchmark).prompt_sets:
        raise ValueError(
            f"eval.prompt_set: {config.benchmark} has no development prompts; set eval.prompts_file to others"
        )
    for key in FILES:
        path = getattr(config, key)
        if path is not None and not storage.is_remote(storage.check_path(path)) and not Path(path).exists():
            raise ValueError(f"eval.{key}={path!r} does not exist")


def check_ranks(train: TrainSettings, nnodes: int, nproc_per_node: int, local: bool) -> None:
    """Refuses, before any work, a recipe whose nodes, or processes on a node, differ from the training task's. These are fixed
    when workflows are registered, or when a local run starts (`envs.TRAIN_NNODES`, `envs.TRAIN_NPROC`). As many processes on
    other machines are refused too: expert parallelism is chosen for the GPUs of a node.

    Raises:
        ValueError: shows the arithmetic, and how to change it.
    """
    asked, given = (train.nnodes, train.nproc_per_node), (nnodes, nproc_per_node)
    if asked != given:
        command = "pyflyte run" if local and train.nnodes == 1 else "pyflyte register or pyflyte run --remote"
        raise ValueError(
            f"train.nnodes={train.nnodes} x train.nproc_per_node={train.nproc_per_node} = {math.prod(asked)}, but the "
            f"training task has {nnodes} x {nproc_per_node} = {math.prod(given)} processes: set "
            f"NUCLEUS_TRAIN_NNODES={train.nnodes} NUCLEUS_TRAIN_NPROC={train.nproc_per_node} for {command}, or change "
            "the recipe"
        )
    if local and nnodes > 1:
        raise ValueError(
            f"NUCLEUS_TRAIN_NNODES={nnodes}: a local run trains on this machine alone; for several nodes use a cluster "
            "(pyflyte run --remote)"
        )


def check_tiers(images_by_tier: dict[str, int], stages: list[Stage]) -> None:
    """Refuses, right after curation, a corpus without images for one of the stages.

    Args:
        images_by_tier: images of the curated corpus.

    Raises:
        ValueError: names the stage, its weights and the tiers of the corpus.
    """
    present = {tier for tier, images in images_by_tier.items() if images}
    for i, stage in enumerate(stages):
        weights = {tier: weight for tier, weight in stage.train.stage.tier_weights.items() if weight > 0}
        if not present & weights.keys():
            counts = ", ".join(f"{tier}: {images_by_tier[tier]}" for tier in sorted(present)) or "none"
            raise ValueError(
                f"train.stages[{i}].tier_weights draws from {', '.join(weights)} alone, and the curated corpus has no "
                f"image of these (images by tier: {counts}). Change the weights, or curation.tiers.thresholds and "
                "synthetic_tier"
            )


def for_own_images(recipe: Recipe, keep_max_words: bool = False) -> Recipe:
    """The recipe without limits that are set for rendered scenes: captions may have up to 60 words (or as many as fit
    in encoding.max_text_tokens), unless `keep_max_words` (see `word_limit.is_chosen`); the PSNR of a small VAE on photographs is reported, not required; images of every
    shape are encoded, and kept if the recipe sets no max_aspect_ratio; AVIF and HEIC are kept if it names no formats.
    The benchmark captions replaces shapes."""
    words = recipe.curation.captions.max_words
    if not keep_max_words:
        words = max(words, min(OWN_CAPTION_WORDS, recipe.encoding.max_text_tokens - 4))
    captions = recipe.curation.captions.model_copy(update={"max_words": words})
    filters = recipe.curation.filters
    if "formats" not in filters.model_fields_set:
        filters = filters.model_copy(update={"formats": (*filters.formats, *PHONE_FORMATS)})
    if "max_aspect_ratio" not in filters.model_fields_set:
        filters = filters.model_copy(update={"max_aspect_ratio": ANY_ASPECT_RATIO})
    return recipe.model_copy(
        update={
            "source": recipe.source.model_copy(update={"scenes": 0, "digits": 0, "made": {}}),
            "curation": recipe.curation.model_copy(update={"captions": captions, "filters": filters}),
            "components": recipe.components.model_copy(update={"min_psnr_db": 0.0}),
            "encoding": recipe.encoding.model_copy(update={"shapes": "data"}),
            "eval": own_captions(recipe.eval),
        }
    )


def own_captions(config: EvalConfig) -> EvalConfig:
    """The eval section with the captions benchmark instead of shapes."""
    if config.benchmark != "shapes":
        return config
    per_prompt = catalog.benchmark("captions").images_per_prompt
    update = {
        "benchmark": "captions",
        "further_benchmarks": tuple(name for name in config.further_benchmarks if name != "captions"),
        "judges": {},
        "prompts_per_task": None,
        "images_per_prompt": per_prompt,
    }
    return config.model_copy(update=update)
