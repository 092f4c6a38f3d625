"""Muon on sharded weights (DTensors): in every layout, one rank orthogonalises each matrix whole.

    whole experts here         no communication
    matrices cut by FSDP       rows of the update --all-to-all--> one owner each, Newton-Schulz --all-to-all--> rows

The work is divided among owners by cost. Each rank sends and receives its shard of the updates twice; gathering every
matrix on every rank would multiply bytes and iterations by the number of ranks. Rows are sent in the dtype of
Newton-Schulz, which loses nothing. The reasons are in docs/decisions/optimiser.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from model.optim import Matrices, Muon, add_orthogonal, compute_dtype


class _Cut(NamedTuple):
    """One matrix (of an expert, or a whole 2D parameter) whose rows are on several ranks."""

    parameter: nn.Parameter
    weight: torch.Tensor  # this rank's rows, a view
    update: torch.Tensor
    rows: int  # of the whole matrix

    @property
    def columns(self) -> int:
        return self.weight.shape[-1]

    @property
    def cost(self) -> int:
        return self.rows * self.columns * min(self.rows, self.columns)


class ShardedMuon(Muon):
    """`Muon` for DTensors. State, names and result are the same in every layout, up to rounding."""

    def _local_part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local()

    def _apply(self, updates: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]], group: dict) -> None:
        matrices: list[Matrices] = []
        cuts: dict[dist.ProcessGroup, list[_Cut]] = {}
        for parameter, weight, update in updates:
            ranks = cutting_group(parameter)
            if ranks is None:
                matrices += self._matrices(parameter, weight, update, self._rate(parameter, group))
                continue
            rows_here = zip(weight, update) if weight.dim() == 3 else [(weight, update)]
            cuts.setdefault(ranks, []).extend(_Cut(parameter, *rows, parameter.shape[-2]) for rows in rows_here)
        exchanges = [_Exchange(ranks, pieces) for ranks, pieces in cuts.items()]
        for exchange in exchanges:
            for cut, whole in exchange.gather():
                goal = torch.zeros_like(whole)
                exchange.orthogonal.append(goal)
                shape = (1, *whole.shape) if cut.parameter.dim() == 3 else whole.shape
                matrices += self._matrices(cut.parameter, goal.view(shape), whole.view(shape), 1.0)
        add_orthogonal(matrices, group["ns_steps"])
        for exchange in exchanges:
            for cut, rows in exchange.scatter():
                cut.weight.add_(rows, alpha=self._rate(cut.parameter, group))


def cutting_group(parameter: DTensor) -> dist.ProcessGroup | None:
    """The ranks that have the rows of each matrix of `parameter`; None if matrices are whole."""
    first = parameter.dim() - 2
    mesh = parameter.device_mesh
    axes = [
        axis
        for axis, placement in enumerate(parameter.placements)
        if mesh.size(axis) > 1 and getattr(placement, "dim", -1) >= first
    ]
    if not axes:
        return None
    (axis,) = axes
    assert parameter.placements[axis].dim == first, parameter.placements
    return mesh.get_group(axis)


class _Exchange:
    """Sends rows of matrices to their owners and back. Every rank of the group has the same matrices in the same
    order."""

    def __init__(self, group: dist.ProcessGroup, cuts: list[_Cut]):
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.owned = assign_owners(cuts, self.ranks)
        self.mine = self.owned[self.rank]
        self.orthogonal: list[torch.Tensor] = []  # one for each of `mine`
        self.dtype = compute_dtype(cuts[0].update)
        self.device = cuts[0].update.device

    def gather(self) -> list[tuple[_Cut, torch.Tensor]]:
        """This rank's matrices and their whole updates [rows, columns]."""
        sent = [[cut.update for cut in owned] for owned in self.owned]
        received = self._all_to_all(sent, [self._rows_of(rank) for rank in range(self.ranks)])
        return [(cut, torch.cat(parts)) for cut, *parts in zip(self.mine, *received)]

    def scatter(self) -> list[tuple[_Cut, torch.Tensor]]:
        """All matrices, and this rank's rows of the results of their owners."""
        cut_up = [
            orthogonal.split(split_rows(cut.rows, self.ranks)) for cut, orthogonal in zip(self.mine, self.orthogonal)
        ]
        sent = [[parts[rank] for parts in cut_up] for rank in range(self.ranks)]
        received = self._all_to_all(sent, [[cut.weight.shape for cut in owned] for owned in self.owned])
        return [pair for owned, parts in zip(self.owned, received) for pair in zip(owned, parts)]

    def _rows_of(self, rank: int) -> list[tuple[int, int]]:
        return [(split_rows(cut.rows, self.ranks)[rank], cut.columns) for cut in self.mine]

    def _all_to_all(
        self, sent: list[list[torch.Tensor]], shapes: list[list[tuple[int, int]]]
    ) -> list[list[torch.Tensor]]:
        """Sends tensors to each rank and receives tensors of the given shapes; returns them by rank."""
        sizes = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        flat = [tensor.reshape(-1).to(self.dtype) for of_rank in sent for tensor in of_rank]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        incoming = torch.empty(sum(map(sum, sizes)), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(
            incoming,
            outgoing,
            [sum(of_rank) for of_rank in sizes],
            [sum(tensor.numel() for tensor in of_rank) for of_rank in sent],
            group=self.group,
        )
        parts = iter(incoming.split([size for of_rank in sizes for size in of_rank]))
        return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


def assign_owners(cuts: list[_Cut], ranks: int) -> list[list[_Cut]]:
    """The matrices of each rank: the most expensive first, each to the rank with the least work."""
    owned: list[list[_Cut]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for cut in sorted(cuts, key=lambda cut: -cut.cost):
        rank = load.index(min(load))
        owned[rank].append(cut)
        load[rank] += cut.cost
    return owned


def split_rows(rows: int, ranks: int) -> list[int]:
    """Number of rows that FSDP gives each rank: as torch.chunk, the last ranks fewer or none."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]
