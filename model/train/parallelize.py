"""What torchtitan calls on the model (on the meta device) before weights exist: checkpointing, compile, sharding."""

from __future__ import annotations

from typing import Any

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division


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
    """Applies activation checkpointing, torch.compile and FSDP2, each where the configuration asks for it.

    One process and plain replicas need none: the model is returned as it is (the trainer adds replicas' gradients
    up). With dp_shard > 1 FSDP2 shards the weights; it sums gradients and does not average them, as the trainer
    divides the loss by the global batch.
    """
    if parallel_dims.ep > 1 or parallel_dims.tp > 1 or parallel_dims.cp > 1 or parallel_dims.pp > 1:
        raise ValueError(
            f"expert_parallel={parallel_dims.ep}, tensor, context and pipeline parallelism are not supported yet: "
            "train.expert_parallel must be 1"
        )
    blocks = model.transformer_blocks
    if ac_config is not None:
        for name, block in blocks.named_children():
            blocks.register_module(name, checkpoint_wrapper(block))
    if compile_config.enable:
        for block in blocks.children():
            block.compile(backend=compile_config.backend)
    mesh = parallel_dims.get_optional_mesh("fsdp")
    if parallel_dims.dp_shard > 1:
        dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in blocks.children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        disable_fsdp_gradient_division(model)
    return model
