"""Skips steps with bad losses or gradients, and detects divergence.

The reasons are in docs/decisions/optimiser.md.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import torch

from model.config import SkipConfig

_EMPTY = math.inf  # an unused slot of the saved window; a skipped step is nan, an accepted loss is finite


class Diverged(RuntimeError):
    """Training diverged. A retry from the last checkpoint would repeat the same steps and fail again."""


class LossGuard:
    """Checks the global loss and gradient norm of every step. They are equal on all ranks, so all ranks decide alike.

    Only losses of accepted steps enter the median. If the loss rises permanently, the run ends with an error; the median
    does not adapt to the new level. The spike rule starts once half of the window holds accepted losses.
    """

    def __init__(self, config: SkipConfig):
        self.config = config
        self.recent: deque[float] = deque(maxlen=config.window_steps)
        self.skipped = 0  # since the stage began

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Records one step. Returns the reason to skip it, or None."""
        reason = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = f"loss {loss} or gradient norm {grad_norm} is not finite"
        elif self.config.spike_mads is not None:
            limit = self._limit(self.config.spike_mads)
            if loss > limit:
                reason = f"loss {loss:.6g} is above {limit:.6g} (median + {self.config.spike_mads:g} deviations)"
        self.recent.append(loss if reason is None else math.nan)
        self.skipped += reason is not None
        return reason

    def _limit(self, mads: float) -> float:
        accepted = np.array([loss for loss in self.recent if math.isfinite(loss)])
        if len(accepted) < self.config.window_steps / 2:
            return math.inf
        median = np.median(accepted)
        return float(median + mads * np.median(np.abs(accepted - median)))

    @property
    def recently_skipped(self) -> int:
        return sum(math.isnan(loss) for loss in self.recent)

    @property
    def exhausted(self) -> bool:
        return self.recently_skipped >= self.config.max_skipped

    def state_dict(self) -> dict[str, Any]:
        window = [*self.recent] + [_EMPTY] * (self.config.window_steps - len(self.recent))
        return {"recent": torch.tensor(window, dtype=torch.float64), "skipped": torch.tensor(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent.clear()
        self.recent.extend(loss for loss in state_dict["recent"].tolist() if loss != _EMPTY)
        self.skipped = int(state_dict["skipped"])
