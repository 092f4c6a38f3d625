"""Reads the held-out flow loss of a run: the model's error in predicting the velocity of held-out real images.

    RUN/images/seed0/00000/flow_loss.json    {timestep: mean squared error} of one prompt's real image and one noise

Written during sampling, where the weights are; read here. The noise is a function of (prompt id, timestep, seed).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.scorecards.card import FlowLoss

FILE = "flow_loss.json"
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)  # 0 is the image, 1 is noise


def read(images_dir: str | Path, prompts: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[FlowLoss]:
    """The mean loss at each timestep with its standard error over prompts; [] if none was measured.

    Raises:
        ValueError: a file is damaged; names it.
    """
    values: dict[float, dict[int, list[float]]] = {}
    for seed in seeds:
        for index in range(len(prompts)):
            path = Path(images_dir) / f"seed{seed}" / f"{index:05d}" / FILE
            if not path.is_file():
                continue
            try:
                losses = {float(t): float(loss) for t, loss in json.loads(path.read_text(encoding="utf-8")).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{path} is not a file of losses: {error}") from error
            for timestep, loss in losses.items():
                values.setdefault(timestep, {}).setdefault(index, []).append(loss)
    rows = []
    for timestep, by_prompt in sorted(values.items()):
        means = [sum(losses) / len(losses) for losses in by_prompt.values()]
        n, mean = len(means), math.fsum(means) / len(means)
        error = math.sqrt(math.fsum((m - mean) ** 2 for m in means) / (n - 1) / n) if n > 1 else None
        rows.append(FlowLoss(timestep=timestep, loss=mean, standard_error=error, prompts=n))
    return rows
