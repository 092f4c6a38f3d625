"""What each task needs of the recipe, and no more: a task reruns when its own section changes."""

from __future__ import annotations

from typing import Literal, get_args

from model.config import Positive, Section, StageConfig, TrainConfig, TransformerConfig
from tasks.curation.config import CurationConfig, DedupConfig, FilterConfig
from tasks.recipe import Recipe

STAGES = 3  # that workflows/train.py lays out
PIPELINE_TEXT_STATE = -8  # NucleusMoEImagePipeline's default_return_index
Ending = Literal[
    "curated", "pipeline", "scorecard", "merged"
]  # the artifact that reproduce, ablate and pretrain end in


class EncodeStage(Section):
    """What decides a stage's latents. Steps and batch size are not in here: changing them encodes nothing again."""

    image_size_px: Positive
    aspect_ratios: tuple[str, ...]


class TrainStage(Section):
    """One training stage. `train.stages` holds only this stage, so that another stage's numbers do not matter."""

    model: TransformerConfig
    train: TrainConfig
    hand_on_optimizer: bool = False  # to the next stage

    @property
    def stage(self) -> StageConfig:
        return self.train.stages[0]


def check_workflow(recipe: Recipe, ends_in: Ending = "pipeline") -> None:
    """Refuses, before any work, a recipe that is valid in itself and that the workflow could not carry to its end.

    Raises:
        ValueError: naming the key, and what would be valid.
    """
    assert ends_in in get_args(Ending), ends_in
    if ends_in == "curated":
        return
    if len(recipe.train.stages) != STAGES:
        raise ValueError(f"train.stages has {len(recipe.train.stages)} entries; the workflow trains {STAGES}")
    if ends_in == "pipeline" and recipe.model.is_ablation:
        raise ValueError(
            f"model.routing={recipe.model.model_dump()['routing']} is an ablation, and diffusers has no class that "
            "computes it: it cannot be published; pyflyte run workflows/ablate.py ablate ends in its scorecard"
        )
    if recipe.encoding.hidden_state_index != PIPELINE_TEXT_STATE:
        raise ValueError(
            f"encoding.hidden_state_index={recipe.encoding.hidden_state_index} must be {PIPELINE_TEXT_STATE}: samples "
            "and scores come from the pipeline's default text state, and must be of the one that is trained"
        )
    if ends_in != "merged" and recipe.eval.benchmark != "shapes":
        raise ValueError(
            f"eval.benchmark={recipe.eval.benchmark!r} has no detector in the workflow yet; it must be 'shapes' to be "
            "scored. What runs today: pyflyte run workflows/pretrain.py pretrain, which ends in the merged weights"
        )


def check_ranks(train: TrainConfig, nnodes: int, nproc_per_node: int, local: bool) -> None:
    """Refuses, before any work, a training of other ranks than the training task's: those are fixed when workflows are
    registered, or when a local run starts (`envs.TRAIN_NNODES`, `envs.TRAIN_NPROC`).

    Raises:
        ValueError: with the arithmetic, and how to change which.
    """
    processes, given = train.nnodes * train.nproc_per_node, nnodes * nproc_per_node
    if processes != given:
        command = "pyflyte run" if local and train.nnodes == 1 else "pyflyte register or pyflyte run --remote"
        raise ValueError(
            f"train.nnodes={train.nnodes} x train.nproc_per_node={train.nproc_per_node} = {processes}, but the "
            f"training task has {nnodes} x {nproc_per_node} = {given} processes: set "
            f"NUCLEUS_TRAIN_NNODES={train.nnodes} NUCLEUS_TRAIN_NPROC={train.nproc_per_node} for {command}, or change "
            "the recipe"
        )
    if local and nnodes > 1:
        raise ValueError(
            f"NUCLEUS_TRAIN_NNODES={nnodes}: a local run trains on this machine alone; for several nodes use a cluster "
            "(pyflyte run --remote)"
        )


OWN_CAPTION_WORDS = 60  # with the chat format's tokens they fit in 64


def for_own_images(recipe: Recipe) -> Recipe:
    """The recipe, with two bars lifted that are set for rendered scenes: captions may have up to 60 words (or what
    fits in encoding.max_text_tokens), and a small VAE's PSNR on photographs is reported, not required."""
    words = max(recipe.curation.captions.max_words, min(OWN_CAPTION_WORDS, recipe.encoding.max_text_tokens - 4))
    captions = recipe.curation.captions.model_copy(update={"max_words": words})
    return recipe.model_copy(
        update={
            "curation": recipe.curation.model_copy(update={"captions": captions}),
            "components": recipe.components.model_copy(update={"min_psnr_db": 0.0}),
        }
    )


def scoring(recipe: Recipe) -> CurationConfig:
    """What scoring reads of the curation section; every threshold is left at its default, so that a new one scores
    nothing again."""
    config = recipe.curation
    return CurationConfig(
        scorers=config.scorers,
        filters=FilterConfig(max_pixels=config.filters.max_pixels),
        dedup=DedupConfig(hash_size=config.dedup.hash_size, thumbnail_px=config.dedup.thumbnail_px),
    )


def encode_stage(recipe: Recipe, index: int) -> EncodeStage:
    stage = recipe.train.stages[index]
    return EncodeStage(image_size_px=stage.image_size_px, aspect_ratios=stage.aspect_ratios)


def train_stage(recipe: Recipe, index: int) -> TrainStage:
    """The stage's section; its seed differs from stage to stage, so that noise and order do too. Only the last stage's
    checkpoints are merged: the others hand on the one that the next starts from."""
    train = recipe.train.model_copy(
        update={
            "stages": (recipe.train.stages[index],),
            "seed": recipe.train.seed + 1000 * index,
            "init_from": None if index else recipe.train.init_from,
            "keep_checkpoints": recipe.train.keep_checkpoints if index == STAGES - 1 else 1,
        }
    )
    model = recipe.model.with_capacity_factors(recipe.train.stages[index].capacity_factors)
    carried_on = recipe.train.carry_optimizer and index < STAGES - 1
    return TrainStage(model=model, train=train, hand_on_optimizer=carried_on)
