"""Checks that replicated weights are the same on all ranks.

Each rank updates its own copy of replicated weights: all weights of plain replicas, FSDP's shards over `dp_replicate`, and
the routers. Copies that have diverged (by a defective device, or an update that depended on the rank) stay different, and a
checkpoint saves only one of them. The reasons are in docs/decisions/distributed.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model.layers.moe import local_part

CHUNK = 1 << 22  # elements hashed at a time: 32 MB for each of a few temporary tensors
# The multipliers of SplitMix64's finaliser (model.data.hashing), as the signed numbers that PyTorch has.
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@torch.no_grad()
def checksum(weight: torch.Tensor) -> torch.Tensor:
    """A checksum, an int64 on the weight's device, of the bits of fp32 numbers and their positions: the sum of a hash of
    each, which does not depend on the order. It detects every single change, and several changes with a probability of
    about 1 - 2^-64."""
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    begin = 0
    for bits in weight.detach().reshape(-1).view(torch.int32).split(CHUNK):
        place = torch.arange(begin, begin + len(bits), device=weight.device)
        words = (place << 32) + bits
        words = (words ^ _high(words)) * FIRST
        words = (words ^ _high(words)) * SECOND
        total += (words ^ _high(words)).sum()
        begin += len(bits)
    return total


def _high(words: torch.Tensor) -> torch.Tensor:
    """The upper half of each, without its sign."""
    return (words >> 32) & (2**32 - 1)


def differing(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of fp32 weights that differ between ranks that should have equal values; the same list on every rank. All
    ranks must call it, with the same names in the same order."""
    names = list(weights)
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, name in enumerate(names):
        for group in _replicas(weights[name]):
            groups.setdefault(group, []).append(i)
    checksums = torch.stack([checksum(local_part(weight)) for weight in weights.values()])
    apart = torch.zeros_like(checksums)
    for group, members in groups.items():
        own = checksums[members]
        extremes = torch.cat([own, ~own])  # the largest, and the complement of the smallest
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes.chunk(2)
        apart[members] |= (largest != ~smallest).long()
    dist.all_reduce(apart, dist.ReduceOp.MAX)  # ranks of other shards get the result too
    return [name for name, differs in zip(names, apart.tolist()) if differs]


def _replicas(weight: torch.Tensor) -> Iterator[dist.ProcessGroup]:
    """The groups of this rank whose members should hold equal values of a weight."""
    if not isinstance(weight, DTensor):
        yield dist.group.WORLD
        return
    for dim, placement in enumerate(weight.placements):
        if placement.is_replicate() and weight.device_mesh.size(dim) > 1:
            yield weight.device_mesh.get_group(dim)
