"""How much of a corpus a stage encodes. Without torch: the planner asks before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from model.config import StageConfig

STEPS_PER_OCTAVE = 8  # fractions are rounded up to a power of 2 ** (1/8), so that a new shard rarely changes them


def drawn_fractions(stage: StageConfig, images: Mapping[str, int]) -> dict[str, float]:
    """The fraction of each tier's images that a stage encodes: 1 if it draws each image at least once on average.

    A stage draws steps x batch_size samples, from each tier in proportion to weight x images. A fraction below 1 is
    rounded up by at most 9%.

    Args:
        images: number of images of the train split, by tier.
    """
    weight = {tier: stage.tier_weights.get(tier, 0.0) * count for tier, count in images.items()}
    total = sum(weight.values())
    fractions = {}
    for tier, count in images.items():
        share = stage.steps * stage.batch_size * weight[tier] / total / count if total and count else 0.0
        step = math.floor(-math.log2(share) * STEPS_PER_OCTAVE + 1e-9) if 0 < share < 1 else 0
        fractions[tier] = 2.0 ** (-step / STEPS_PER_OCTAVE) if share > 0 else 0.0
    return fractions
