"""Expert-choice mixture of experts with a shared expert; token choice and coupled routing as ablations.

    unmodulated tokens + timestep --> router --> scores --> each expert takes its top C tokens of each sample
    modulated tokens --+--> gather [E, B C, D] --> experts (batched products) --> combine, weighted -+--> out
                       +--> shared expert ----------------------------------------------------------+

Every expert takes the same number of tokens, so dense batched products need neither sorting nor padding. Where ranks
share the experts (model/train/parallel/expert_parallel.py), the shared expert runs during the exchange of rows.

Shape suffixes: B batch, S tokens, D width, E experts, C capacity, F expert hidden, R = E B C routed rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from model import kernels
from model.kernels.elementwise import swiglu

if TYPE_CHECKING:  # imports pydantic, which a layer does not need
    from model.config import RoutingConfig


class Routing(NamedTuple):
    """The routing of one MoE layer. `gates` are normalised over the experts that took the token, and scaled.

    With token choice an expert may take fewer than C tokens. It is then padded with tokens that it did not take, at
    gate 0, and `taken_BEC` is true for the real ones; None means that all are real, as with expert choice. `takers` is
    set by the Triton kernels, which then also gather and combine.
    """

    logits_BSE: torch.Tensor
    scores_BSE: torch.Tensor
    indices_BEC: torch.Tensor
    gates_BEC: torch.Tensor
    taken_BEC: torch.Tensor | None = None
    takers: kernels.Takers | None = None

    def rows_R(self) -> torch.Tensor:
        """Row index in [B S, D] of each routed row: ordered by expert, then by sample."""
        if self.takers is not None:
            return self.takers.tokens_R
        B, S, _ = self.logits_BSE.shape
        offsets = torch.arange(0, B * S, S, device=self.indices_BEC.device).view(B, 1, 1)
        return (self.indices_BEC + offsets).transpose(0, 1).reshape(-1)

    def weights_BSE(self) -> torch.Tensor:
        """The gate of every expert on every token, 0 where the expert did not take it."""
        weights = torch.zeros_like(self.scores_BSE, dtype=self.gates_BEC.dtype)
        return weights.scatter_(1, self.indices_BEC.mT, self.gates_BEC.mT)

    def taken_BSE(self) -> torch.Tensor:
        """Whether the expert took the token, boolean."""
        taken_BEC = torch.ones_like(self.indices_BEC, dtype=torch.bool) if self.taken_BEC is None else self.taken_BEC
        taken = torch.zeros(self.scores_BSE.shape, dtype=torch.bool, device=taken_BEC.device)
        return taken.scatter_(1, self.indices_BEC.mT, taken_BEC.mT)


class SwiGLU(nn.Module):
    """diffusers' "swiglu" FeedForward without bias: `net.0.proj` is [up ; gate], `net.2` the down projection."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 2 * hidden, bias=False)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))

    def up(self, x: torch.Tensor) -> torch.Tensor:
        """The gated hidden state [..., F]."""
        return swiglu(self.net[0].proj(x), gate_first=False)

    def down(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.net[2](hidden)


class Router(nn.Linear):
    """Logits [B, S, E] from [timestep ; tokens], computed in the weight's dtype: fp32 in mixed precision.

    The product is split in two, so that no [B, S, 2D] tensor is built.
    """

    def forward(self, seen_BSD: torch.Tensor, timestep_BD: torch.Tensor) -> torch.Tensor:
        weight_time, weight_token = local_part(self.weight).split(seen_BSD.shape[-1], dim=1)
        device = seen_BSD.device.type
        with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            from_time_B1E = F.linear(timestep_BD.to(self.weight.dtype), weight_time).unsqueeze(1)
            return F.linear(seen_BSD.to(self.weight.dtype), weight_token) + from_time_B1E


class Experts(nn.Module):
    """All experts of a layer: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D]."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_END: torch.Tensor) -> torch.Tensor:
        """Rows of expert e at index e: [E, rows, D] -> [E, rows, D]. E is this rank's number of experts."""
        gate_up, down = local_part(self.gate_up_proj), local_part(self.down_proj)
        return torch.bmm(swiglu(torch.bmm(x_END, gate_up), gate_first=True), down)


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; a plain tensor as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight  # a compiler cannot trace hasattr of a DTensor


class ExpertRanks(NamedTuple):
    """Ranks that share the experts of a layer, and the exchanges of rows with them.

    `send` starts an exchange and `receive` waits for it: in between, the device computes.
    """

    group: dist.ProcessGroup
    send: Callable[[torch.Tensor], torch.Tensor]
    receive: Callable[[torch.Tensor], torch.Tensor]
    send_back: Callable[[torch.Tensor], torch.Tensor]
    receive_back: Callable[[torch.Tensor], torch.Tensor]


class MoE(nn.Module):
    """diffusers' `NucleusMoELayer`, with dense products. `routing` other than None (expert choice) is an ablation: see
    RoutingConfig."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        capacity_factor: float,
        use_sigmoid: bool = False,
        route_scale: float = 2.5,
        routing: RoutingConfig | None = None,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.use_sigmoid = use_sigmoid
        self.route_scale = route_scale
        self.kind: Literal["expert_choice", "token_choice"] = routing.kind if routing else "expert_choice"
        self.coupled = bool(routing and routing.coupled)
        self.expert_limit = routing.expert_limit if routing else None
        self.expert_ranks: ExpertRanks | None = None  # set by model.train.parallel.expert_parallel
        self.gate = Router(2 * width, num_experts, bias=False)
        self.experts = Experts(num_experts, width, hidden)
        self.shared_expert = SwiGLU(width, hidden)

    def capacity(self, num_tokens: int) -> int:
        """Tokens that each expert takes of each sample."""
        return max(1, math.ceil(self.capacity_factor * num_tokens / self.num_experts))

    def route(self, seen_BSD: torch.Tensor, timestep_BD: torch.Tensor) -> Routing:
        """Each expert's tokens of each sample, and their gates, from the tokens that the router sees."""
        B, S, _ = seen_BSD.shape
        logits_BSE = self.gate(seen_BSD, timestep_BD)
        if self.kind == "expert_choice" and kernels.supports_routing(logits_BSE):
            from model.kernels import route as kernel

            if kernel.fits(logits_BSE):
                *chosen, takers = kernel.route(logits_BSE, self.capacity(S), self.use_sigmoid, self.route_scale)
                return Routing(logits_BSE, *chosen, takers=takers)
        scores = torch.sigmoid(logits_BSE.float()) if self.use_sigmoid else logits_BSE.float().softmax(dim=-1)
        scores_BSE = scores.to(logits_BSE.dtype)
        taken_BEC = None
        if self.kind == "token_choice":
            chosen_BEC, indices_BEC, taken_BEC = token_choice(
                scores_BSE, int(self.capacity_factor), self.expert_limit, self.expert_ranks and self.expert_ranks.group
            )
        else:
            chosen_BEC, indices_BEC = scores_BSE.transpose(1, 2).topk(self.capacity(S), dim=-1)
        flat = indices_BEC.flatten(1)
        sums_BS = torch.zeros(B, S, dtype=chosen_BEC.dtype, device=chosen_BEC.device)
        sums_BS = sums_BS.scatter_add(1, flat, chosen_BEC.flatten(1))
        gates_BEC = chosen_BEC / (sums_BS.gather(1, flat).view_as(chosen_BEC) + 1e-12) * self.route_scale
        return Routing(logits_BSE, scores_BSE, indices_BEC, gates_BEC, taken_BEC)

    def forward(
        self, x_BSD: torch.Tensor, unmodulated_BSD: torch.Tensor, timestep_BD: torch.Tensor
    ) -> tuple[torch.Tensor, Routing]:
        routing = self.route(x_BSD if self.coupled else unmodulated_BSD, timestep_BD)
        rows_R, ranks = routing.rows_R(), self.expert_ranks
        rows_END = gather(x_BSD, rows_R, self.num_experts, routing.takers)
        gates_EBC = routing.gates_BEC.transpose(0, 1)
        if ranks is None:
            routed_END = self.experts(rows_END)
            shared_BSD = self.shared_expert(x_BSD)
        else:
            # One half of the shared expert overlaps with the exchange to the experts, the other half with the exchange
            # back.
            sent = ranks.send(rows_END)
            hidden_BSF = self.shared_expert.up(x_BSD)
            sent_back = ranks.send_back(self.experts(ranks.receive(sent)))
            shared_BSD = self.shared_expert.down(hidden_BSF)
            routed_END = ranks.receive_back(sent_back)
        return combine(shared_BSD, routed_END, rows_R, gates_EBC, routing.takers), routing


def token_choice(
    scores_BSE: torch.Tensor,
    top_k: int,
    expert_limit: float | None = None,
    expert_ranks: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token takes its `top_k` experts, in the layout of expert choice.

    C is the largest number of tokens that an expert got from a sample (at most the limit, see RoutingConfig), over all
    `expert_ranks`, since they exchange rows. An expert's own tokens come first, in falling order of their scores; the
    padding up to C has score 0.

    Returns:
        scores, token indices, and whether the expert really took the token, each [B, E, C].
    """
    S, E = scores_BSE.shape[1:]
    own_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool)
    own_BSE.scatter_(2, scores_BSE.topk(top_k, dim=-1).indices, True)
    most = own_BSE.sum(dim=1).max()
    if expert_ranks is not None:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=expert_ranks)
    C = int(most)
    if expert_limit is not None:
        C = min(C, max(1, math.ceil(expert_limit * top_k * S / E)))
    own_first_BES = scores_BSE.detach().masked_fill(~own_BSE, -1.0).transpose(1, 2)  # scores are at least 0
    indices_BEC = own_first_BES.topk(C, dim=-1).indices
    taken_BEC = own_BSE.transpose(1, 2).gather(2, indices_BEC)
    chosen_BEC = scores_BSE.transpose(1, 2).gather(2, indices_BEC) * taken_BEC
    return chosen_BEC, indices_BEC, taken_BEC


def gather(
    x_BSD: torch.Tensor, rows_R: torch.Tensor, num_experts: int, takers: kernels.Takers | None = None
) -> torch.Tensor:
    """The experts' tokens [E, B C, D]. With `takers`, a Triton kernel computes it."""
    D = x_BSD.shape[-1]
    x_TD = x_BSD.reshape(-1, D)
    if takers is not None:
        from model.kernels.combine import gather_rows

        return gather_rows(x_TD, takers).view(num_experts, -1, D)
    if _compiled_for_cpu(x_BSD):
        return x_TD.gather(0, rows_R[:, None].expand(-1, D)).view(num_experts, -1, D)
    return x_TD.index_select(0, rows_R).view(num_experts, -1, D)


def _compiled_for_cpu(x: torch.Tensor) -> bool:
    """On a CPU the compiler turns `index_add`, and the gradient of `index_select`, into atomic additions in no fixed
    order. It leaves `scatter_add`, and the gradient of `gather`, to PyTorch, which adds in a fixed order."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def combine(
    shared_BSD: torch.Tensor,
    routed_END: torch.Tensor,
    rows_R: torch.Tensor,
    gates_EBC: torch.Tensor,
    takers: kernels.Takers | None = None,
) -> torch.Tensor:
    """The experts' outputs, weighted in fp32, added to the shared expert's output at their tokens: [B, S, D].

    With `takers`, a Triton kernel computes it.
    """
    D = shared_BSD.shape[-1]
    shared_TD = shared_BSD.reshape(-1, D)
    if takers is not None:
        from model.kernels.combine import combine_rows

        out_TD = combine_rows(shared_TD, routed_END.reshape(-1, D), gates_EBC.reshape(-1), takers)
        return out_TD.view_as(shared_BSD)
    routed_RD = (routed_END.reshape(-1, D).float() * gates_EBC.reshape(-1, 1)).to(shared_BSD.dtype)
    if _compiled_for_cpu(shared_BSD):
        out_TD = shared_TD.scatter_add(0, rows_R[:, None].expand(-1, D), routed_RD)
    else:
        out_TD = shared_TD.index_add(0, rows_R, routed_RD)
    return out_TD.view_as(shared_BSD)
