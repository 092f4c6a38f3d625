"""What torchtitan calls on the model (on the meta device) before weights exist: checkpointing, compile."""

from __future__ import annotations

from typing import Any

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch
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
    """Applies activation checkpointing and torch.compile, each where the configuration asks for it.

    Several processes are plain replicas, whose gradients the trainer adds up; weights are not sharded yet.
    """
    dims = parallel_dims
    if dims.ep > 1 or dims.tp > 1 or dims.cp > 1 or dims.pp > 1 or dims.dp_shard > 1:
        raise ValueError(
            f"expert_parallel={dims.ep}, sharded data, tensor, context and pipeline parallelism are not supported "
            "yet: train.expert_parallel must be 1"
        )
    blocks = model.transformer_blocks
    if ac_config is not None:
        ac_config.build().apply(model)
    if compile_config.enable:
        for block in blocks.children():
            block.compile(backend=compile_config.backend)
    return model
