"""Error bars: the spread over seeds, and a bootstrap interval over prompts.

They answer different questions. The deviation over seeds is that of the sampler's noise on the same prompts; the
bootstrap interval is that of having asked these prompts and not others. Both belong beside a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and sample standard deviation (n - 1) of one score per seed.

    Returns:
        {"mean", "std": None for a single run, "runs": number of seeds, "seeds", "values": in the seeds' order}

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("there is no run to take a mean of")
    seeds = sorted(values)
    scores = np.array([values[s] for s in seeds], dtype=np.float64)
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "runs": len(scores),
        "seeds": seeds,
        "values": scores.tolist(),
    }


def bootstrap(
    tasks: Mapping[str, Sequence[tuple[float, int]]], samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Percentile intervals of each task's accuracy and of their plain mean, from resampled prompts.

    Prompts are drawn with replacement within their task (so that every draw has the benchmark's make-up), with all of
    their images. A task of few prompts, each with many images, gets the wide interval that it deserves.

    Args:
        tasks: for each task, (right images, images) of each prompt.
        samples: draws.
        seed: of the draws.
        level: share of the draws inside an interval.

    Returns:
        {"overall": [low, high], "tasks": {task: [low, high]}, "samples", "seed", "level"}

    Raises:
        ValueError: no tasks, a task without images, `samples` below 1 or `level` outside (0, 1).
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples={samples} must be at least 1 and level={level} between 0 and 1")
    if not tasks:
        raise ValueError("there are no tasks to resample")
    tails = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    draws = {}
    for index, (task, prompts) in enumerate(sorted(tasks.items())):
        counts = np.asarray(prompts, dtype=np.float64).reshape(-1, 2)
        if not len(counts) or (counts[:, 1] <= 0).any():
            raise ValueError(f"task {task!r} has no prompts, or one without images")
        rng = np.random.default_rng((seed, index))
        drawn = counts[rng.integers(len(counts), size=(samples, len(counts)))].sum(axis=1)  # [samples, 2]
        draws[task] = drawn[:, 0] / drawn[:, 1]
    overall = np.mean(list(draws.values()), axis=0)
    return {
        "overall": np.percentile(overall, tails).tolist(),
        "tasks": {task: np.percentile(values, tails).tolist() for task, values in draws.items()},
        "samples": samples,
        "seed": seed,
        "level": level,
    }
