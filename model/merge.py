"""WSM: merges checkpoints trained at a constant learning rate, instead of decaying it (arXiv 2507.17634)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model.config import TransformerConfig
from model.weights.export import check_state, export_transformer, read_config
from model.weights.load import Weights, open_weights, shapes_of

Checkpoint = str | Path | Mapping[str, torch.Tensor]


def wsm_weights(n: int) -> list[float]:
    """Merge weights c_1..c_n, oldest first, with sum 1, that emulate an inverse-square-root decay w_j = 1 / sqrt(j).

    Merging with weights c scales the update between checkpoints j-1 and j by w_j = c_j + ... + c_n. Therefore
    c_j = w_j - w_(j+1), c_n = w_n, and w_1 = 1.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"wsm_weights(n={n}): n must be at least 1")
    decay = [j**-0.5 for j in range(1, n + 1)]
    return [a - b for a, b in zip(decay, decay[1:])] + [decay[-1]]


def merge(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    out: str | Path,
    config: TransformerConfig | None = None,
) -> dict:
    """Writes the weighted sum of `checkpoints` as a diffusers transformer directory `out`.

    Memory holds one tensor of each checkpoint at a time, and one file of the result. Sums are computed in fp64 and rounded
    once to the tensor's type. A single checkpoint with weight 1 is copied bit for bit.

    Args:
        checkpoints: oldest first; each a state dict, or a path that `open_weights` accepts: a safetensors file, a
            transformer directory, or a DCP checkpoint.
        weights: one per checkpoint, with sum 1 (`wsm_weights`).
        config: the model's configuration; None reads config.json next to the newest checkpoint.

    Returns:
        {"checkpoints": n, "weights": [...], "tensors": n, "parameters": n}.

    Raises:
        ValueError: different numbers of checkpoints and weights, a sum other than 1, or checkpoints with different
            tensors.
    """
    if not checkpoints or len(checkpoints) != len(weights):
        raise ValueError(f"merge needs one weight for each checkpoint, got {len(checkpoints)} and {len(weights)}")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"merge weights must sum to 1, got {sum(weights):.8g}")
    if config is None:
        config = _config_beside(checkpoints[-1])
    opened = [_open(checkpoint) for checkpoint in checkpoints]
    shapes = shapes_of(opened[0].described)
    for i, other in enumerate((shapes_of(weights.described) for weights in opened[1:]), start=2):
        differing = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"checkpoint {i} of {len(opened)} does not match the first: {len(differing)} tensors differ, first "
                f"{name} ({shapes.get(name, 'absent')} against {other.get(name, 'absent')})"
            )
    check_state(config, shapes)

    def merged(name: str) -> torch.Tensor:
        if len(opened) == 1:
            return opened[0].read(name)
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for checkpoint, weight in zip(opened, weights):
            total.add_(checkpoint.read(name).to(torch.float64), alpha=weight)
        return total.to(opened[0].described[name].dtype)

    export_transformer(Weights(opened[0].described, merged), out, config)
    parameters = sum(map(math.prod, shapes.values()))
    return {"checkpoints": len(opened), "weights": list(weights), "tensors": len(shapes), "parameters": parameters}


def _open(checkpoint: Checkpoint) -> Weights:
    if not isinstance(checkpoint, Mapping):
        return open_weights(checkpoint)
    described = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in checkpoint.items()}
    return Weights(described, lambda name: checkpoint[name].detach().cpu())


def _config_beside(checkpoint: Checkpoint) -> TransformerConfig:
    if isinstance(checkpoint, Mapping):
        raise ValueError("merge of state dicts needs config")
    path = Path(checkpoint)
    return read_config(path.parent if path.is_file() else path)
