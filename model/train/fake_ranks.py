"""The model as one of many ranks holds it, without the others: for planning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist

from model.config import TransformerConfig
from model.train.parallelize import parallelize
from model.train.torch_private import clear_sharding_caches
from model.transformer import NucleusTransformer

from torchtitan.distributed import ParallelDims


@contextlib.contextmanager
def first_rank_of(ranks: int, expert_parallel: int, config: TransformerConfig) -> Iterator[NucleusTransformer]:
    """The model on the meta device, laid out over `ranks` shard ranks, of which this process is the first for as long
    as the context lasts. Collectives return at once and move nothing: torch's fake backend."""
    assert not dist.is_initialized(), "a process that plans is in no process group"
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
