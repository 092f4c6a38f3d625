"""Expert parallelism: each of `ep` ranks owns E / ep of a layer's experts, and runs them on the rows of all ranks.

    [E, R, D] of this rank --all-to-all--> [E/ep, ep R, D] --experts--> [E/ep, ep R, D] --all-to-all--> [E, R, D]

Routing is local: an expert chooses among the tokens of one sample. With expert choice every expert takes the same number
of rows R on every rank, so the exchange needs no sizes, no padding, and no synchronisation of device and host. Token
choice, an ablation, pads every expert to the rows of the fullest one on any rank, found by one all-reduce of a number
in each layer. Gradients return by the same two exchanges; an expert's gradient is summed over the ranks of its group.

All-to-all instead of all-gather: a rank sends (ep - 1) / ep of its E R = cf S B rows of width D (cf is the capacity
factor), where gathering every token everywhere would receive (ep - 1) S B rows. That is less only for ep < cf.

Each exchange is two operations, one that starts it and one that waits, so that `model.layers.moe.MoE` computes its shared expert
in between. The gradient of one is the other: the backward pass starts an exchange where the forward waited, and waits
where it started. Autograd runs in the reverse order, so the shared expert's gradients are computed in between.

Shape suffixes: E experts, R rows of one expert on one rank, D width. The reasons are in docs/decisions/gpu.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from model.layers.moe import ExpertRanks, MoE

# Operations whose autograd kernels call c10d's: the graphs of the forward and the backward have `all_to_all_single` and
# `wait_tensor`, which Inductor knows. As torch.autograd.Function they do not compile for layers with several capacity
# factors (PyTorch 2.13).
_OPERATIONS = torch.library.Library("nucleus_exchange", "DEF")
_OPERATIONS.define("start_exchange(Tensor x, int[] parts, str group) -> Tensor")
_OPERATIONS.define("end_exchange(Tensor x, int[] parts, str group) -> Tensor")


def _start(x: torch.Tensor, parts: list[int], group: str) -> torch.Tensor:
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), parts, parts, group)


def _end(x: torch.Tensor, parts: list[int], group: str) -> torch.Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: list[int], group: str) -> torch.Tensor:
        return _start(x, parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _end(gradient, [], ""), None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: list[int], group: str) -> torch.Tensor:
        ctx.parts, ctx.group = parts, group
        return _end(x, parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _start(gradient, ctx.parts, ctx.group), None, None


_OPERATIONS.impl("start_exchange", _Start.apply, "Autograd")
_OPERATIONS.impl("end_exchange", _End.apply, "Autograd")
_OPERATIONS.impl("start_exchange", _start, "CompositeExplicitAutograd")  # in inference mode
_OPERATIONS.impl("end_exchange", _end, "CompositeExplicitAutograd")


def exchange(x: torch.Tensor, group_name: str, parts: list[int]) -> torch.Tensor:
    """Starts an all-to-all of equal parts along the first dim. The result may not be read before `wait`."""
    return torch.ops.nucleus_exchange.start_exchange(x, parts, group_name)


def wait(x: torch.Tensor, group_name: str, parts: list[int]) -> torch.Tensor:
    """On CUDA the stream waits, not the host. The gradient is exchanged with the same parts."""
    return torch.ops.nucleus_exchange.end_exchange(x, parts, group_name)


def expert_ranks(group: dist.ProcessGroup, num_experts: int) -> ExpertRanks:
    """The exchanges of a layer: rows to the ranks that own their experts, and back."""
    name, ranks = group.group_name, group.size()
    parts = [num_experts // ranks] * ranks

    def receive(sent: torch.Tensor) -> torch.Tensor:
        """Waits for an exchange of [E, R, D] -> [E / ep, ep R, D], the ranks' rows in order."""
        x_ERD = wait(sent, name, parts)
        return x_ERD.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)

    def send_back(y: torch.Tensor) -> torch.Tensor:
        """Starts the inverse exchange: [E / ep, ep R, D] -> [E, R, D]."""
        by_rank = y.unflatten(1, (ranks, -1)).transpose(0, 1)
        return exchange(by_rank.flatten(0, 1), name, parts)

    return ExpertRanks(
        group=group,
        send=lambda x_ERD: exchange(x_ERD, name, parts),
        receive=receive,
        send_back=send_back,
        receive_back=lambda sent: wait(sent, name, parts),
    )


def shard_experts(moe: MoE, mesh: DeviceMesh) -> None:
    """Keeps on each rank of `mesh` its share of the experts; the layer exchanges rows with the other ranks."""
    moe.expert_ranks, experts = expert_ranks(mesh.get_group(), moe.num_experts), moe.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
