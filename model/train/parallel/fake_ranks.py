"""The sharded model of one rank, built in a single process for the planner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist

from model.config import TransformerConfig
from model.train.parallel.parallelize import parallelize
from model.train.torch_private import clear_sharding_caches
from model.transformer import NucleusTransformer

from torchtitan.distributed import ParallelDims


@contextlib.contextmanager
def first_rank_of(ranks: int, expert_parallel: int, config: TransformerConfig) -> Iterator[NucleusTransformer]:
    """Yields the model on the meta device, sharded over `ranks` ranks, of which this process acts as rank 0. Collectives
    return at once without communication (torch's fake backend)."""
    assert not dist.is_initialized(), "the planner must run outside of a process group"
    degrees = dict(dp_replicate=1, dp_shard=ranks, cp=1, tp=1, pp=1, ep=expert_parallel, world_size=ranks)
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        with torch.device("meta"):
            model = NucleusTransformer(config)
        yield parallelize(
            model,
            parallel_dims=ParallelDims(**degrees, spmd_backend="partial_dtensor"),
            training=SimpleNamespace(mixed_precision_param="bfloat16"),
            parallelism=None,
            compile_config=SimpleNamespace(enable=False),
            ac_config=None,
            dump_folder="",
        )
    finally:
        dist.destroy_process_group()
        clear_sharding_caches()
