"""Expert parallelism: each of `ep` ranks holds E / ep of a layer's experts, and runs them on the rows of all of them.

    [E, R, D] of this rank --all-to-all--> [E/ep, ep R, D] --experts--> [E/ep, ep R, D] --all-to-all--> [E, R, D]

Routing stays where the samples are: an expert chooses among the tokens of one sample. With expert choice every
expert takes the same number of rows R on every rank, so that the exchange needs no sizes, no padding and no word
from the device to the host. Token choice, an ablation, fills every expert up to the fullest one's rows, on whatever
rank that is: one number more to agree on in each layer. Gradients come back by the same two exchanges, and an expert's gradient is the sum over
the ranks of its group.

All-to-all, not all-gather: a rank sends (ep - 1) / ep of its E R = cf S B rows of width D (cf is the capacity factor),
where gathering every token everywhere would receive (ep - 1) S B. That is less only for ep < cf.

Shape suffixes: E experts, R rows of one expert on one rank, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from model.moe import MoE
from model.train.torch_private import all_to_all_single_autograd


def to_owners(x_ERD: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Every expert's rows to the rank that holds it: [E, R, D] -> [E / ep, ep R, D], the ranks' rows in order."""
    received = all_to_all_single_autograd(x_ERD.contiguous(), None, None, mesh)
    by_rank = received.view(mesh.size(), -1, *x_ERD.shape[1:])
    return by_rank.transpose(0, 1).flatten(1, 2)


def from_owners(y: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The inverse of `to_owners`: [E / ep, ep R, D] -> [E, R, D]."""
    by_rank = y.unflatten(1, (mesh.size(), -1)).transpose(0, 1).contiguous()
    return all_to_all_single_autograd(by_rank.flatten(0, 1), None, None, mesh)


def shard_experts(moe: MoE, mesh: DeviceMesh) -> None:
    """Makes each rank of `mesh` hold its share of the experts, which still take and give rows of all."""
    moe.expert_ranks, experts = mesh.get_group(), moe.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
    experts.register_forward_pre_hook(lambda module, inputs: to_owners(inputs[0], mesh))
    experts.register_forward_hook(lambda module, inputs, output: from_owners(output, mesh))
