"""Which steps are skipped, and when there were too many of them."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import torch

from model.config import SkipConfig

_EMPTY = math.inf  # of a window that is not full yet; a skipped step is nan, an accepted loss is finite


class Diverged(RuntimeError):
    """The numbers are bad, not the machine: from the last checkpoint, the same steps would end the same."""


class LossGuard:
    """Judges every step by its global loss and gradient norm, which are the same on every rank, so that all agree.

    Only losses of accepted steps enter the median: a level that has risen for good ends the run with a message,
    rather than becoming the new normal unseen. The spike rule waits until half of the window is accepted losses.
    """

    def __init__(self, config: SkipConfig):
        self.config = config
        self.recent: deque[float] = deque(maxlen=config.window_steps)
        self.skipped = 0  # since the stage began

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Notes one step. Returns why it must be skipped, or None."""
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
