"""torchtitan's DistMuon, for the matrices that it can take of a model that FSDP shards.

    matrices [out, in], cut by rows        one owner each, as in `ShardedMuon`
    gate and up [2 out, in], one on top    by blocks of rows: two matrices
    experts [E, in, out], cut by expert    where they lie

Not taken: `gate_up_proj` of the experts, whose two matrices lie side by side; experts whose own rows are cut; and, at
the scale "spectral", `down_proj`, whose factor DistMuon would take from rows / columns = in / out. `ShardedMuon` keeps
these. State and its names are the same, so a checkpoint of one goes on with the other. Between two matrices DistMuon
overlaps exchange and computation, a block at a time; its iteration is Muon's own in bf16, and starts less tightly
scaled than `model.optim.newton_schulz`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from model.config import OptimConfig
from model.optim import NS_COEFFICIENTS, NamedParameters, split_matrices, update_scale
from model.train.device import allow_dist_muon

from torchtitan.distributed.flex_shard import BlockShard, BucketConfig, ComputeLayout, Owned, build_dist_muon


def compute_layout(name: str, parameter: torch.Tensor, scale: str) -> ComputeLayout | None:
    """Where DistMuon computes the updates of a parameter's matrices; None where it cannot take them."""
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
        how = Owned() if packed == 1 else BlockShard(dim=0, block_size=parameter.shape[0] // packed)
        return ComputeLayout(dict.fromkeys(axes, how))
    rows, columns = parameter.shape[-2:]
    if packed > 1 or update_scale(columns, rows, scale) != update_scale(rows, columns, scale):
        return None
    return ComputeLayout({axis: Shard(0) for axis in axes})


def split(named: NamedParameters, scale: str) -> tuple[NamedParameters, NamedParameters]:
    """(what DistMuon takes of Muon's parameters, what it leaves)."""
    taken: NamedParameters = []
    left: NamedParameters = []
    for name, parameter in named:
        (left if compute_layout(name, parameter, scale) is None else taken).append((name, parameter))
    return taken, left


def dist_muon(group: dict[str, Any], optim: OptimConfig) -> torch.optim.Optimizer:
    """DistMuon of one group {"params", "param_names"}, of parameters that `split` says it takes."""
    allow_dist_muon()
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
