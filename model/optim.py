"""Parameter groups by name, the optimisers of the recipe, Muon, and the schedule of learning rates.

`train.optim.matrices` names the optimiser of attention and expert matrices, an entry of `OPTIMIZERS`; every other parameter
goes to AdamW. docs/extending.md shows how to add one.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): momentum, then the update matrix is replaced by
its nearest orthogonal one through a Newton-Schulz iteration. The reasons are in docs/decisions/optimiser.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:  # imports pydantic, which the optimisers do not need
    from model.config import DecayConfig, OptimConfig

NamedParameters = list[tuple[str, nn.Parameter]]

# Attention projections, routed experts, shared expert, dense feed-forward. The paper says "attention and expert
# matrices". The dense feed-forward of the first blocks is the same SwiGLU, also a hidden layer, and counts as an expert
# that takes every token. `encoder_proj` projects text into the backbone and counts as an embedding: AdamW.
MUON_PATTERN = re.compile(
    r"(^|\.)transformer_blocks\.\d+\.("
    r"attn\.(to_q|to_k|to_v|add_k_proj|add_v_proj|to_out\.0)\.weight"
    r"|img_mlp\.experts\.(gate_up_proj|down_proj)"
    r"|img_mlp\.shared_expert\.net\.(0\.proj|2)\.weight"
    r"|img_mlp\.net\.(0\.proj|2)\.weight"
    r")$"
)
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Maximum bytes of updates in one Newton-Schulz iteration: enough to fill a GPU (48 expert matrices of the 17B model).
# All experts of 8 ranks, 7.7 GB, would need several times that memory.
MAX_BATCH_BYTES = 1 << 29


def is_muon_parameter(name: str) -> bool:
    """Whether `name` (diffusers' parameter name, any prefix) is an attention or expert matrix."""
    return MUON_PATTERN.search(name) is not None


def parameter_groups(model: nn.Module, matrices: str = "muon") -> dict[str, NamedParameters]:
    """{name in OPTIMIZERS: [(name, p), ...]}: every trainable parameter exactly once, in model order.

    `matrices` is the optimiser of attention and expert matrices; AdamW takes everything else.
    """
    groups: dict[str, NamedParameters] = {name: [] for name in OPTIMIZERS}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")  # a prefix of activation checkpointing
        if parameter.requires_grad:
            groups[matrices if is_muon_parameter(name) else "adamw"].append((name, parameter))
    return groups


def describe_groups(groups: dict[str, NamedParameters]) -> str:
    """A table of `parameter_groups`: counts of tensors and parameters for each group, then for each name over all
    blocks."""
    lines = []
    for group, named in groups.items():
        if not named:
            continue
        lines.append(f"{group}: {len(named)} tensors, {sum(p.numel() for _, p in named):,} parameters")
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        for name, parameter in named:
            kind = re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.*.", name), tuple(parameter.shape)
            kinds[kind] = kinds.get(kind, 0) + 1
        lines += [f"  {count:4d} x {name} {list(shape)}" for (name, shape), count in kinds.items()]
    return "\n".join(lines)


def newton_schulz(matrices: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """For each matrix of `matrices` [..., m, n], an approximately orthogonal one with the same singular vectors.

    Singular values end between about 0.7 and 1.2. Computed in fp32 on a CPU, in bfloat16 elsewhere (as Muon does).

    X is first divided by |X X^T|^(1/2), where Muon divides by |X| (both Frobenius). This also bounds the largest singular
    value, up to 3 times more tightly at 128 rows, which saves about one step. The first step needs X X^T anyway.
    """
    a, b, c = NS_COEFFICIENTS
    x = matrices.to(compute_dtype(matrices))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    batched = x.reshape(-1, *x.shape[-2:]).contiguous()
    # First to unit size: fourth powers of a small gradient would vanish.
    batched = batched / (torch.linalg.matrix_norm(batched, keepdim=True) + eps)
    for i in range(steps):
        gram = torch.bmm(batched, batched.mT)
        if i == 0:
            bound = torch.linalg.matrix_norm(gram, keepdim=True) + eps
            batched, gram = batched / bound.sqrt(), gram / bound
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        batched = torch.baddbmm(batched, polynomial, batched, beta=a)
    x = batched.view(x.shape)
    return (x.mT if tall else x).to(matrices.dtype)


def compute_dtype(matrices: torch.Tensor) -> torch.dtype:
    """The dtype in which `newton_schulz` computes: bfloat16, or on a CPU the matrices' own."""
    return matrices.dtype if matrices.device.type == "cpu" else torch.bfloat16


def split_matrices(name: str, parameter: torch.Tensor) -> tuple[int, bool]:
    """(how many matrices are concatenated in the parameter, whether it is a stack [E, in, out]); see `Muon`."""
    packed = 2 if name.endswith(("gate_up_proj", "net.0.proj.weight")) else 1
    return packed, parameter.dim() == 3


class Matrices(NamedTuple):
    """Matrices [n, rows, columns]: a view of the tensor to update, a view of its update, and the update's factor."""

    goal: torch.Tensor
    update: torch.Tensor
    rate: float


class Muon(torch.optim.Optimizer):
    """Muon for matrices [m, n] and stacks of expert matrices [E, m, n].

    Each expert's matrix is orthogonalised separately. So are the two that one parameter contains (gate and up, of
    `gate_up_proj` and `net.0.proj`), if parameters are given with names: as (name, parameter), or in a group with
    `param_names`. Matrices of one shape go through Newton-Schulz in batches: a few large products are faster than many
    small ones.

    The update is scaled by max(1, out / in) ** 0.5, for a matrix that maps `in` to `out` features. The effect of an update
    on activations then does not depend on the width (K. Jordan's Muon); learning rates are 1e-3 to 1e-2. `scale="rms"`
    uses 0.2 max(in, out) ** 0.5 (Moonlight, arXiv 2502.16982): the updates then have the RMS of AdamW's, so that both can
    share one learning rate.

    State: one tensor per parameter, `momentum_buffer`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        scale: str = "spectral",
    ):
        if scale not in ("spectral", "rms"):
            raise ValueError(f"scale={scale!r} must be 'spectral' or 'rms'")
        defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, weight_decay=weight_decay, scale=scale
        )
        params = list(params)
        # Not in `param_groups`: a checkpoint repeats every value there for each parameter.
        self._names = dict(pair for entry in params for pair in _names(entry))
        super().__init__([_without_names(entry) for entry in params], defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of them, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        updates = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            weight, gradient, buffer = map(self._local_part, (parameter, parameter.grad, state["momentum_buffer"]))
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            if group["weight_decay"]:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            updates.append((parameter, weight, update))
        self._apply(updates, group)

    def _local_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, a gradient or a buffer; without sharding the whole tensor."""
        return tensor

    def _apply(self, updates: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]], group: dict) -> None:
        """Adds the orthogonalised updates to the weights, from (parameter, its local part, that of its update)."""
        matrices = []
        for parameter, weight, update in updates:
            matrices += self._matrices(parameter, weight, update, self._rate(parameter, group))
        add_orthogonal(matrices, group["ns_steps"])

    def _rate(self, parameter: nn.Parameter, group: dict) -> float:
        """The factor on an orthogonal update of the parameter's matrices."""
        packed, stacked = split_matrices(self._names.get(parameter, ""), parameter)
        rows, columns = parameter.shape[-2:]
        out_features, in_features = (columns // packed, rows) if stacked else (rows // packed, columns)
        return -group["lr"] * update_scale(out_features, in_features, group["scale"])

    def _matrices(
        self, parameter: nn.Parameter, goal: torch.Tensor, update: torch.Tensor, rate: float
    ) -> list[Matrices]:
        """The matrices of `parameter`, or of some of its experts: views of `goal` and of `update`."""
        packed, stacked = split_matrices(self._names.get(parameter, ""), parameter)
        if not stacked:
            goal, update = goal.unsqueeze(0), update.unsqueeze(0)
        dim = 2 if stacked else 1  # gate and up are concatenated along the output
        return [Matrices(*pair, rate) for pair in zip(goal.chunk(packed, dim), update.chunk(packed, dim))]


def add_orthogonal(matrices: list[Matrices], steps: int) -> None:
    """Adds each update, orthogonalised and times its rate, to its goal. Matrices of one shape are iterated in batches
    of up to MAX_BATCH_BYTES."""
    buckets: dict[tuple, list[Matrices]] = {}
    for entry in matrices:
        shape = entry.update.shape
        key = (min(shape[1:]), max(shape[1:]), entry.update.dtype, entry.update.device)
        buckets.setdefault(key, []).append(entry)
    for bucket in buckets.values():
        for batch in _batches(bucket):
            tall = [entry.update.shape[1] > entry.update.shape[2] for entry in batch]
            wide = [entry.update.mT if turn else entry.update for entry, turn in zip(batch, tall)]
            orthogonal = newton_schulz(torch.cat(wide), steps).split([part.shape[0] for part in wide])
            for entry, turn, update in zip(batch, tall, orthogonal):
                entry.goal.add_(update.mT if turn else update, alpha=entry.rate)


def _batches(bucket: list[Matrices]) -> Iterator[list[Matrices]]:
    """Matrices of one size, in order, in batches of at most MAX_BATCH_BYTES (or one matrix)."""
    limit = max(1, MAX_BATCH_BYTES // bucket[0].update[0].nbytes)
    batch, free = [], limit
    for entry in bucket:
        start = 0
        while start < len(entry.update):
            stop = min(len(entry.update), start + free)
            batch.append(Matrices(entry.goal[start:stop], entry.update[start:stop], entry.rate))
            free, start = free - (stop - start), stop
            if not free:
                yield batch
                batch, free = [], limit
    if batch:
        yield batch


def _names(entry) -> list[tuple[torch.Tensor, str]]:
    """(parameter, name) of an entry of an optimiser's `params`: a group, a (name, parameter) or a parameter."""
    if isinstance(entry, dict):
        if "param_names" in entry:
            return list(zip(entry["params"], entry["param_names"], strict=True))
        return [pair for item in entry["params"] for pair in _names(item)]
    return [(entry[1], entry[0])] if isinstance(entry, tuple) else []


def _without_names(entry):
    if isinstance(entry, dict):
        return {**entry, "params": [_without_names(item) for item in entry["params"]]}
    return entry[1] if isinstance(entry, tuple) else entry


def update_scale(out_features: int, in_features: int, scale: str) -> float:
    """The factor on an orthogonal update: see `Muon`."""
    if scale == "rms":
        return 0.2 * max(out_features, in_features) ** 0.5
    return max(1.0, out_features / in_features) ** 0.5


def learning_rate_factor(step: int, warmup: int, left: int = 0, decay: DecayConfig | None = None) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then constant, then with `decay` a linear fall.

    Warmup-Stable-Merge (arXiv 2507.17634) has no decay: merging the last checkpoints replaces it. Warmup-Stable-Decay
    (arXiv 2404.06395) has one.

    Args:
        step: may count the steps of earlier stages too.
        left: steps of the stage after this one. The last step, of which 0 are left, has the factor `decay.to`.
    """
    factor = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if decay is not None and left < decay.steps:
        factor *= decay.to + (1.0 - decay.to) * max(left, 0) / decay.steps
    return factor


class OptimizerEntry(NamedTuple):
    """An optimiser of the recipe: `build(group, config)` takes {"params", "param_names"}."""

    build: Callable[[dict[str, Any], OptimConfig], torch.optim.Optimizer]
    state_tensors: int  # fp32 tensors of a parameter's size, which the planner counts and checkpoints store


def muon_options(optim: OptimConfig) -> dict[str, Any]:
    """Arguments of `Muon` except its parameters."""
    return {
        "lr": optim.muon_lr,
        "momentum": optim.muon_momentum,
        "ns_steps": optim.muon_ns_steps,
        "scale": optim.muon_scale,
        "weight_decay": optim.muon_weight_decay,
    }


def _adamw(group: dict[str, Any], optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [group],
        lr=optim.adamw_lr,
        betas=optim.adamw_betas,
        eps=optim.adamw_eps,
        weight_decay=optim.adamw_weight_decay,
        fused=True,
    )


# Valid names of `OptimConfig.matrices`. For sharded models, model/train/optimizer.py builds distributed versions of
# Muon.
OPTIMIZERS = {
    "muon": OptimizerEntry(lambda group, optim: Muon([group], **muon_options(optim)), state_tensors=1),
    "adamw": OptimizerEntry(_adamw, state_tensors=2),
}
