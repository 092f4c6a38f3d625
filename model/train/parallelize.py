"""What torchtitan calls on the model (on the meta device) before weights exist.

    experts over `ep`  ->  activation checkpointing  ->  torch.compile per block  ->  FSDP2 units

Units of FSDP: the experts of each block, the rest of each block, and what lies outside of the blocks. Experts are
sharded over `efsdp`, which is what `ep` leaves of the shard ranks, everything else over all of them; both are
replicated over `dp_replicate` (HSDP). In mixed precision the router is a unit of its own, which stays in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims

from model.load import own_part
from model.train.expert_parallel import shard_experts
from model.transformer import Fill


def parallelize(
    model: torch.nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> torch.nn.Module:
    """Lays the model out over the ranks. With one shard rank weights stay whole, plain tensors: one process, or
    replicas whose gradients the trainer adds up."""
    blocks = model.transformer_blocks
    if parallel_dims.ep_enabled:
        for block in blocks.children():
            if block.moe_enabled:
                shard_experts(block.img_mlp.experts, parallel_dims.get_mesh("ep"))
    if ac_config is not None:
        ac_config.build().apply(model)
    if compile_config.enable:
        for block in blocks.children():
            block.compile(backend=compile_config.backend)
    if parallel_dims.dp_shard_enabled:
        _shard(model, parallel_dims, TORCH_DTYPE_MAP[training.mixed_precision_param])
    return model


def _shard(model: torch.nn.Module, dims: ParallelDims, dtype: torch.dtype) -> None:
    replicas = ["dp_replicate"] if dims.dp_replicate_enabled else []
    mesh = dims.get_mesh([*replicas, "fsdp"])
    expert_mesh = dims.get_mesh([*replicas, "efsdp"]) if dims.ep_enabled else mesh
    # Inputs are cast once, at the root: RoPE tables stay in fp32 inside.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer_blocks.children():
        if block.moe_enabled:
            _shard_expert_weights(block.img_mlp.experts, expert_mesh, policy)
            if dtype != torch.float32:
                full = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
                fully_shard(block.img_mlp.gate, mesh=mesh, mp_policy=full)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Ranks divide their losses by the global batch, so gradients add up. Plain sums also on gloo, which
            # knows no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_expert_weights(experts: torch.nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Whole experts on each rank, where their number allows it: Muon then needs no communication for them."""
    ranks = mesh.size(-1)
    held = experts.gate_up_proj.shape[0]
    if isinstance(experts.gate_up_proj, DTensor):
        held = experts.gate_up_proj.to_local().shape[0]
    placement = Shard(0 if held % ranks == 0 else 1)
    fully_shard(experts, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda parameter: placement)


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Whole weights of everything but the experts, for what is called besides `forward`; nothing on a plain model."""
    units = [m for m in (model, *model.transformer_blocks.children()) if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


@torch.no_grad()
def fill_whole(parameter: torch.Tensor, fill: Fill) -> None:
    """Calls `fill` with a tensor of the whole parameter, and keeps this rank's part of it."""
    if not isinstance(parameter, DTensor):
        fill(parameter)
        return
    local, region = own_part(parameter)
    whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
    fill(whole)
    local.copy_(whole if region is None else whole[region])
