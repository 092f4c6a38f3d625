"""What each task needs of the recipe, and no more: a task reruns when its own section changes."""

from __future__ import annotations

from model.config import Positive, Section, StageConfig, TrainConfig, TransformerConfig
from tasks.curation.config import CurationConfig, DedupConfig, FilterConfig
from tasks.recipe import Recipe


class EncodeStage(Section):
    """What decides a stage's latents. Steps and batch size are not in here: changing them encodes nothing again."""

    image_size_px: Positive
    aspect_ratios: tuple[str, ...]


class TrainStage(Section):
    """One training stage. `train.stages` holds only this stage, so that another stage's numbers do not matter."""

    model: TransformerConfig
    train: TrainConfig

    @property
    def stage(self) -> StageConfig:
        return self.train.stages[0]


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
    """The stage's section; its seed differs from stage to stage, so that noise and order do too."""
    train = recipe.train.model_copy(
        update={"stages": (recipe.train.stages[index],), "seed": recipe.train.seed + 1000 * index}
    )
    model = recipe.model.model_copy(update={"capacity_factors": recipe.train.stages[index].capacity_factors})
    return TrainStage(model=model, train=train)
