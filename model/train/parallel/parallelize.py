"""The layout of the model over the ranks. torchtitan calls `parallelize` on the meta device, before weights exist.

    experts over `ep`  ->  activation checkpointing  ->  torch.compile per block  ->  FSDP2 units

FSDP's units are the blocks, and the parameters outside of blocks. Experts are sharded over `efsdp` (shard ranks / ep), all
other weights over all shard ranks; both are replicated over `dp_replicate` (HSDP). Routers are not sharded: they are
small, stay in fp32, and every rank has a full copy. There are no units within a block: their hooks would run during the
recomputation of activation checkpointing, and selective checkpointing depends on the order of operations.

See docs/decisions/distributed.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from model.layers.moe import local_part
from model.train.activation import flash_operations
from model.train.compiled import compile_blocks
from model.train.parallel.expert_parallel import shard_experts
from model.train.torch_private import DataParallelMeshInfo, ShardPlacementResult, mesh_info
from model.transformer import Fill
from model.weights.load import own_part

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims


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
    """Shards, checkpoints and compiles the model. With one shard rank the weights stay plain tensors: one process, or
    replicas whose gradients the trainer sums.

    Raises:
        ValueError: the release of flash-attn cannot be compiled or checkpointed as configured.
    """
    if parallel_dims.ep_enabled:
        for block in model.transformer_blocks.children():
            if block.moe_enabled:
                shard_experts(block.img_mlp, parallel_dims.get_mesh("ep"))
    if ac_config is not None:
        ac_config.build().apply(model)
    if compile_config.enable:
        flash_operations("train.compile")
        compile_blocks(model, compile_config.backend)
    if parallel_dims.dp_shard_enabled:
        _shard(model, parallel_dims, TORCH_DTYPE_MAP[training.mixed_precision_param])
    return model


def fsdp_meshes(dims: ParallelDims) -> tuple[DeviceMesh, DeviceMesh]:
    """The meshes over which FSDP shards the dense weights, and the experts."""
    replicas = ["dp_replicate"] if dims.dp_replicate_enabled else []
    dense = dims.get_mesh([*replicas, "fsdp"])
    return dense, dims.get_mesh([*replicas, "efsdp"]) if dims.ep_enabled else dense


def _shard(model: torch.nn.Module, dims: ParallelDims, dtype: torch.dtype) -> None:
    mesh, of_experts = fsdp_meshes(dims)
    dense = mesh_info(mesh, None)
    sparse = dense if of_experts is mesh else mesh_info(of_experts, None)  # one object for each mesh
    routers = [block.img_mlp.gate for block in model.transformer_blocks.children() if block.moe_enabled]
    for router in routers:
        whole = [Replicate()] * mesh.ndim
        router.weight = torch.nn.Parameter(distribute_tensor(router.weight, mesh, whole, src_data_rank=None))
    # Inputs are cast once, at the root, so that RoPE tables stay in fp32.
    inside = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    left_out = {router.weight for router in routers}
    for block in model.transformer_blocks.children():
        placement = _expert_placement(block.img_mlp.experts, dense, sparse) if block.moe_enabled else None
        fully_shard(block, mesh=mesh, mp_policy=inside, shard_placement_fn=placement, ignored_params=left_out)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=left_out)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Ranks divide their losses by the global batch, so gradients are summed. gloo has no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _expert_placement(
    experts: torch.nn.Module, dense: DataParallelMeshInfo, sparse: DataParallelMeshInfo
) -> Callable[[torch.nn.Parameter], ShardPlacementResult]:
    """FSDP's sharding of each parameter of a block. Experts are sharded into whole experts where their number is divisible:
    Muon then needs no communication for them."""
    own = set(experts.parameters())
    weight = experts.gate_up_proj
    by_expert = local_part(weight).shape[0] % sparse.mesh.size(-1) == 0
    cut = ShardPlacementResult(Shard(0 if by_expert else 1), sparse)
    other = ShardPlacementResult(Shard(0), dense)
    return lambda parameter: cut if parameter in own else other


def is_replicated(parameter: torch.Tensor) -> bool:
    """Whether every rank has the whole parameter. The trainer sums the gradients of these."""
    return not isinstance(parameter, DTensor) or all(place.is_replicate() for place in parameter.placements)


@contextlib.contextmanager
def gathered(unit: torch.nn.Module) -> Iterator[None]:
    """Gathers the weights of one FSDP unit for calls other than `forward`. Without FSDP it does nothing."""
    sharded = isinstance(unit, FSDPModule)
    if sharded:
        unit.unshard()
    try:
        yield
    finally:
        if sharded:
            unit.reshard()


@torch.no_grad()
def fill_from_whole(parameter: torch.Tensor, fill: Fill) -> None:
    """Calls `fill` with a whole tensor, and copies this rank's part of it into the parameter."""
    if not isinstance(parameter, DTensor):
        fill(parameter)
        return
    local, region = own_part(parameter)
    whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
    fill(whole)
    local.copy_(whole if region is None else whole[region])
