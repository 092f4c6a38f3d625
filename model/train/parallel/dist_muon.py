"""torchtitan's DistMuon, for those matrices of an FSDP model that it supports.

    matrices [out, in], sharded by rows          one owner rank each, as in `ShardedMuon`
    gate and up [2 out, in], stacked by rows     two matrices, split into blocks of rows
    experts [E, in, out], sharded by expert      each rank computes its own experts

`ShardedMuon` keeps the rest: `gate_up_proj` of the experts, whose two matrices are stacked by columns; experts whose rows
are sharded; and, with the scale "spectral", `down_proj`, for which DistMuon would compute the factor from
rows / columns = in / out. Both optimisers use the same state names, so a checkpoint of one resumes with the other. DistMuon
overlaps communication and computation, one block at a time. Its Newton-Schulz iteration runs in bf16, with a looser
initial scaling than `model.optim.newton_schulz`.

See docs/decisions/optimiser.md.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from model.config import OptimConfig
from model.optim import NS_COEFFICIENTS, NamedParameters, split_matrices, update_scale

from torchtitan.distributed.flex_shard import BlockShard, BucketConfig, ComputeLayout, Owned, build_dist_muon


def compute_layout(name: str, parameter: torch.Tensor, scale: str) -> ComputeLayout | None:
    """The layout in which DistMuon computes a parameter's updates; None if it does not support the parameter."""
    if not isinstance(parameter, DTensor):
        return None
    packed, stacked = split_matrices(name, parameter)
    axes = {
        axis: placement.dim
        for axis, placement in zip(parameter.device_mesh.mesh_dim_names, parameter.placements, strict=True)
        if placement.is_shard()
    }
    if not axes or any(axes.values()):  # dims other than the first
        return None
    if not stacked:
        sharding = Owned() if packed == 1 else BlockShard(dim=0, block_size=parameter.shape[0] // packed)
        return ComputeLayout(dict.fromkeys(axes, sharding))
    rows, columns = parameter.shape[-2:]
    if packed > 1 or update_scale(columns, rows, scale) != update_scale(rows, columns, scale):
        return None
    return ComputeLayout({axis: Shard(0) for axis in axes})


def split(named: NamedParameters, scale: str) -> tuple[NamedParameters, NamedParameters]:
    """(Muon's parameters that DistMuon supports, the others)."""
    supported: NamedParameters = []
    others: NamedParameters = []
    for name, parameter in named:
        (others if compute_layout(name, parameter, scale) is None else supported).append((name, parameter))
    return supported, others


def dist_muon(group: dict[str, Any], optim: OptimConfig) -> torch.optim.Optimizer:
    """DistMuon for one group {"params", "param_names"}, all of which it supports (see `split`).

    Raises:
        ValueError: a parameter is not on a CUDA device.
    """
    named = list(zip(group["param_names"], group["params"], strict=True))
    blocks: dict[str, list[str]] = {}
    for name, _ in named:
        blocks.setdefault(re.search(r"transformer_blocks\.\d+", name)[0], []).append(name)
    return build_dist_muon(
        [group],
        compute_sharding_by_fqn={name: compute_layout(name, parameter, optim.muon_scale) for name, parameter in named},
        bucket_configs=[BucketConfig(tuple(names), block) for block, names in blocks.items()],
        lr=optim.muon_lr,
        momentum=optim.muon_momentum,
        weight_decay=optim.muon_weight_decay,
        ns_coefficients=NS_COEFFICIENTS,
        ns_steps=optim.muon_ns_steps,
        adjust_lr_fn={"spectral": "original", "rms": "match_rms_adamw"}[optim.muon_scale],
    )
