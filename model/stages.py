"""Training stages as objects with all settings of one stage.

    recipe: model, train ---> TrainingStage, TrainingStage, ...   seeds derived and capacity factors applied, once, here

Needs neither torch nor Flyte: the planner, workflows and the trainer use it.
The reasons are in docs/decisions/workflows.md.
"""

from __future__ import annotations

from model.config import GuidanceConfig, LossConfig, Section, StageConfig, TrainConfig, TrainSettings, TransformerConfig
from model.data.hashing import hash_words


class TrainingStage(Section):
    """One stage of a training. It contains no field of another stage: a stage is trained again only when it changes.

    model: with the capacity factors of the stage.
    train: the settings that stages share, as they apply to this one.
    seed: 63 bits, of weights, sample order, noise, timesteps and caption dropout.
    hand_on_optimizer: whether the next stage continues with this one's optimiser state.
    """

    model: TransformerConfig
    stage: StageConfig
    train: TrainSettings
    seed: int
    hand_on_optimizer: bool = False

    @property
    def losses(self) -> LossConfig:
        """The weights of the losses that are on in this stage."""
        return self.stage.active_losses(self.train.losses)

    def guidance_at(self, step: int) -> GuidanceConfig | None:
        """The guidance that `step` (from 1) trains in; None: none."""
        guidance = self.stage.guidance
        return guidance if guidance is not None and step > self.stage.steps - guidance.steps else None


def training_stages(model: TransformerConfig, train: TrainConfig) -> list[TrainingStage]:
    """The stages of a recipe's `model` and `train` sections, in order.

    Only the last stage is merged: the others keep one checkpoint, from which the next starts. Only the first starts from
    `train.init_from`.
    """
    settings = {name: getattr(train, name) for name in TrainSettings.model_fields}
    last = len(train.stages) - 1
    return [
        TrainingStage(
            model=model.with_capacity_factors(stage.capacity_factors),
            stage=stage,
            train=TrainSettings(
                **settings
                | {
                    "init_from": train.init_from if i == 0 else None,
                    "keep_checkpoints": train.keep_checkpoints if i == last else 1,
                }
            ),
            seed=_stage_seed(train.seed, i, stage.name),
            hand_on_optimizer=train.carry_optimizer and i < last,
        )
        for i, stage in enumerate(train.stages)
    ]


def _stage_seed(seed: int, index: int, name: str) -> int:
    # A function of position and name: an inserted or renamed stage gets different random numbers.
    return int(hash_words(seed + 1000 * index, *name.encode())[0] >> 1)
