"""The recipe's optimisers (`model.optim.OPTIMIZERS`) in torchtitan's container, and the schedule of a stage's learning rates."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model.config import DecayConfig, OptimConfig
from model.logs import get_logger
from model.optim import (
    OPTIMIZERS,
    NamedParameters,
    describe_groups,
    learning_rate_factor,
    muon_options,
    parameter_groups,
)
from model.train.parallel.sharded_muon import ShardedMuon

from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

logger = get_logger(__name__)


class NucleusOptimizers(OptimizersContainer):
    """One optimiser for attention and expert matrices, AdamW for the rest. Their state is saved by parameter name.

    The first rank prints the groups once.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        optim: OptimConfig
        dist_muon: bool = False  # torchtitan's, for the matrices that it supports

        def to_dict(self) -> dict[str, Any]:
            return {"optim": self.optim.model_dump(mode="json"), "dist_muon": self.dist_muon}

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]):
        optim = config.optim
        self.model_parts = model_parts
        self.optimizers = []
        for model in model_parts:
            groups = parameter_groups(model, optim.matrices)
            if dist.get_rank() == 0:
                logger.info(describe_groups(groups))
            for name, named in groups.items():
                if name == "muon":
                    self.optimizers += _muon(named, optim, config.dist_muon)
                elif named:
                    self.optimizers.append(OPTIMIZERS[name].build(_group(named), optim))
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        self._validate_params(parameters)
        self._post_init(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Tensors only. torchtitan saves every hyperparameter of every parameter too, over a thousand pickles in
        each checkpoint, which take longer to write than the tensors; the configuration and the scheduler have them.
        """
        return {key: value for key, value in super().state_dict().items() if key.startswith("state.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {key: value for key, value in super().state_dict().items() if key.startswith("param_groups.")}
        super().load_state_dict({**known, **state_dict})


def _group(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [canonical_fqn(name) for name, _ in named]}


def _muon(named: NamedParameters, optim: OptimConfig, with_dist_muon: bool) -> list[torch.optim.Optimizer]:
    optimizers: list[torch.optim.Optimizer] = []
    if with_dist_muon:
        from model.train.parallel.dist_muon import dist_muon, split

        taken, named = split(named, optim.muon_scale)
        if dist.get_rank() == 0:
            logger.info(f"of Muon's, torchtitan's DistMuon takes {len(taken)} tensors and leaves {len(named)}")
        if taken:
            optimizers.append(dist_muon(_group(taken), optim))
    if named:
        if isinstance(named[0][1], DTensor):
            optimizers.append(ShardedMuon([_group(named)], **muon_options(optim)))
        else:
            optimizers.append(OPTIMIZERS["muon"].build(_group(named), optim))
    return optimizers


class StageSchedule(LRSchedulersContainer):
    """Linear warm-up, then constant, and in a stage with a `decay` a final linear fall, for every optimiser.

    A stage that continues the schedule of earlier ones also continues their count of steps: `begin_stage` sets where
    its own steps begin.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        decay: DecayConfig | None = None

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> StageSchedule:
            return StageSchedule(optimizers, self.warmup_steps, training_steps, self.decay)

    def __init__(self, optimizers: OptimizersContainer, warmup: int, steps: int, decay: DecayConfig | None):
        self.end = steps  # first step of the stage, in the count of the schedulers
        self.steps = steps
        super().__init__(optimizers, lambda step: learning_rate_factor(step, warmup, self.end - 1 - step, decay))

    def begin_stage(self, done: int) -> None:
        """Call once after loading; `done` steps of this stage are finished."""
        self.end = int(self.schedulers[0].last_epoch) - done + self.steps
        self.load_state_dict(self.state_dict())

    def get_metrics(self) -> dict[str, float]:
        """Learning rates as `lr/Muon` and `lr/AdamW`, in every layout."""
        return {re.sub("Sharded|Dist", "", name): value for name, value in super().get_metrics().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Steps so far, including earlier stages that this one continues; a tensor, like everything that a stage
        saves."""
        return {key: torch.tensor(value) for key, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's warning about get_lr() outside of step()
            super().load_state_dict({key: int(value) for key, value in state_dict.items()})
        for scheduler in self.schedulers:  # the rates are not in a checkpoint: see `NucleusOptimizers.state_dict`
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
                group["lr"] = rate
