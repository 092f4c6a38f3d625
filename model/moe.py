"""Expert-choice mixture of experts with a shared expert.

    unmodulated tokens + timestep --> router --> scores --> each expert takes its top C tokens of each sample
    modulated tokens --+--> gather [E, B C, D] --> experts (batched products) --> weighted scatter --+--> out
                       +--> shared expert ----------------------------------------------------------+

Every expert takes the same number of tokens, so that dense batched products need neither sorting nor padding.

Shape suffixes: B batch, S tokens, D width, E experts, C capacity, F expert hidden, R = E B C routed rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.cpu_ops import swiglu


class Routing(NamedTuple):
    """What one MoE layer decided. `gates` are normalised over the experts that took the token, and scaled."""

    logits_BSE: torch.Tensor
    scores_BSE: torch.Tensor
    indices_BEC: torch.Tensor
    gates_BEC: torch.Tensor


class SwiGLU(nn.Module):
    """diffusers' "swiglu" FeedForward without bias: `net.0.proj` is [up ; gate], `net.2` goes down."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 2 * hidden, bias=False)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](swiglu(self.net[0].proj(x), gate_first=False))


class Experts(nn.Module):
    """All experts of a layer: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D]."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_END: torch.Tensor) -> torch.Tensor:
        """Rows of expert e at index e: [E, rows, D] -> [E, rows, D]."""
        return torch.bmm(swiglu(torch.bmm(x_END, self.gate_up_proj), gate_first=True), self.down_proj)


class MoE(nn.Module):
    """diffusers' `NucleusMoELayer`, dense."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        capacity_factor: float,
        use_sigmoid: bool = False,
        route_scale: float = 2.5,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.use_sigmoid = use_sigmoid
        self.route_scale = route_scale
        self.gate = nn.Linear(2 * width, num_experts, bias=False)
        self.experts = Experts(num_experts, width, hidden)
        self.shared_expert = SwiGLU(width, hidden)

    def capacity(self, num_tokens: int) -> int:
        """Tokens that each expert takes of each sample."""
        return max(1, math.ceil(self.capacity_factor * num_tokens / self.num_experts))

    def route(self, unmodulated_BSD: torch.Tensor, timestep_BD: torch.Tensor) -> Routing:
        """The router sees [timestep ; tokens]; its product is split in two, so that no [B, S, 2D] is made."""
        B, S, D = unmodulated_BSD.shape
        weight_time, weight_token = self.gate.weight.split(D, dim=1)
        logits_BSE = F.linear(unmodulated_BSD, weight_token) + F.linear(timestep_BD, weight_time).unsqueeze(1)
        scores = torch.sigmoid(logits_BSE.float()) if self.use_sigmoid else logits_BSE.float().softmax(dim=-1)
        scores_BSE = scores.to(logits_BSE.dtype)
        chosen_BEC, indices_BEC = scores_BSE.transpose(1, 2).topk(self.capacity(S), dim=-1)
        flat = indices_BEC.flatten(1)
        sums_BS = torch.zeros(B, S, dtype=chosen_BEC.dtype, device=chosen_BEC.device)
        sums_BS = sums_BS.scatter_add(1, flat, chosen_BEC.flatten(1))
        gates_BEC = chosen_BEC / (sums_BS.gather(1, flat).view_as(chosen_BEC) + 1e-12) * self.route_scale
        return Routing(logits_BSE, scores_BSE, indices_BEC, gates_BEC)

    def forward(
        self, x_BSD: torch.Tensor, unmodulated_BSD: torch.Tensor, timestep_BD: torch.Tensor
    ) -> tuple[torch.Tensor, Routing]:
        B, S, D = x_BSD.shape
        routing = self.route(unmodulated_BSD, timestep_BD)
        offsets = torch.arange(0, B * S, S, device=x_BSD.device).view(B, 1, 1)
        rows_R = (routing.indices_BEC + offsets).transpose(0, 1).reshape(-1)
        gates_R1 = routing.gates_BEC.transpose(0, 1).reshape(-1, 1)
        routed_RD = x_BSD.reshape(B * S, D).index_select(0, rows_R)
        routed_RD = self.experts(routed_RD.view(self.num_experts, -1, D)).reshape(-1, D)
        routed_RD = (routed_RD.float() * gates_R1).to(x_BSD.dtype)
        out = self.shared_expert(x_BSD).reshape(B * S, D).index_add(0, rows_R, routed_RD)
        return out.view(B, S, D), routing
