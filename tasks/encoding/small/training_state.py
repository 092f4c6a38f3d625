"""Checkpoints of a small training: after a kill it resumes, and its result has the same bits.

One file, replaced atomically: the step, trained tensors, optimisers, both random generators, and the training's notes. It is
written at time intervals, as the duration of a step varies from milliseconds to seconds. The result does not depend on when
it is written.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.logs import get_logger
from model.storage import replacing

logger = get_logger(__name__)

if TYPE_CHECKING:
    import torch

EVERY_S = 30.0
MAX_SHARE = 0.01  # maximum share of time for saving; large states are saved less often


class TrainingState:
    """The state of one training at `path`. With None, nothing is saved."""

    def __init__(
        self,
        path: Path | None,
        parameters: Sequence[torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        generator: torch.Generator,
        rng: np.random.Generator,
    ) -> None:
        self._path, self._parameters, self._optimizers = path, parameters, optimizers
        self._generator, self._rng = generator, rng
        self._due = time.monotonic() + EVERY_S

    def load(self) -> tuple[int, dict[str, float]]:
        """Restores the saved state.

        Returns:
            (number of finished steps, notes saved with them); (0, {}) if nothing was saved.

        Raises:
            ValueError: the file is not a state of this training. It is read without executing code.
        """
        import torch

        if self._path is None or not self._path.is_file():
            return 0, {}
        try:
            saved = torch.load(self._path, weights_only=True)
            with torch.no_grad():
                for parameter, value in zip(self._parameters, saved["parameters"], strict=True):
                    parameter.copy_(value)
            for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self._generator.set_state(saved["generator"])
            self._rng.bit_generator.state = json.loads(saved["rng"])
            step, notes = saved["step"], saved["notes"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            message = f"{self._path} is not a state of this training ({error}); remove it to start again"
            raise ValueError(message) from error
        logger.info(f"{self._path.stem}: resumes after step {step}")
        return step, notes

    def save(self, step: int, notes: dict[str, float], last: bool) -> None:
        """Saves the state after `step` steps if the interval has passed or this is the last step."""
        import torch

        began = time.monotonic()
        if self._path is None or (began < self._due and not last):
            return
        saved: dict[str, Any] = {
            "step": step,
            "notes": notes,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "generator": self._generator.get_state(),
            "rng": json.dumps(self._rng.bit_generator.state),  # its integers have 128 bits
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path, sync=True) as temporary:
            torch.save(saved, temporary)
        now = time.monotonic()
        self._due = now + max(EVERY_S, (now - began) / MAX_SHARE)
