"""Router scores, each expert's choice of tokens, and gates: equals the plain `model.layers.moe.MoE.route`.

    logits [B,S,E] --> scores --> an expert and a sample: its C largest --> a token: its takers, its gates
                       (_scores)  (_select)                                 (_normalise)

`torch.topk` also sorts, which is not needed, and eight small operations follow it. Here the threshold is found bit by
bit (scores are not negative, so their bits compare like integers); tokens above it are taken in order, and of equal
scores the first tokens. The kernel also writes each token's list of rows, with which combine.py sums without atomic
operations.

Shape suffixes: B batch, S tokens of a sample, T = B S tokens, E experts, C capacity, R = E B C routed rows.
The reasons are in docs/decisions/kernels.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels import Takers, launch

TILE = 2048  # elements of tokens x experts in one program
MAX_TOKENS = 16384  # tokens of a sample: one program holds their scores


@triton.jit
def _scores(
    logits, scores, affinity, tokens, S, E, SIGMOID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < tokens) & (e < E)
    score = _score(logits, t, e, inside, E, SIGMOID).to(scores.dtype.element_ty)
    tl.store(scores + t * E + e, score, mask=inside)
    b, s = t // S, t % S
    tl.store(affinity + (b * E + e) * S + s, score, mask=inside)


@triton.jit
def _score(logits, t, e, inside, E, SIGMOID: tl.constexpr):
    value = tl.load(logits + t * E + e, mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        return tl.sigmoid(value)
    value = tl.where(inside | (e >= E), value, 0.0)  # rows beyond the last token: avoids -inf minus -inf
    exponent = tl.exp(value - tl.max(value, axis=1)[:, None])
    return exponent / tl.sum(exponent, axis=1)[:, None]


@triton.jit
def _select(affinity, indices, tokens, slots, B, S, E, C, HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK_S: tl.constexpr):
    b, e = tl.program_id(0) // E, tl.program_id(0) % E
    s = tl.arange(0, BLOCK_S)
    inside = s < S
    score = tl.load(affinity + tl.program_id(0) * S + s, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(inside, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)  # a NaN's sign may be set
    # The largest number that at least C scores reach is the C-th largest score.
    threshold = tl.full((), 0, dtype=tl.int32)
    for i in range(HIGH - LOW):
        candidate = threshold | (1 << (HIGH - 1 - i))
        reached = tl.sum((bits >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(reached >= C, candidate, threshold)
    above = (bits > threshold).to(tl.int32)
    equal = (bits == threshold).to(tl.int32)
    taken = above | (equal & (tl.cumsum(equal, axis=0) <= C - tl.sum(above, axis=0)).to(tl.int32))
    position = tl.cumsum(taken, axis=0) - 1
    row = (e * B + b) * C + position
    tl.store(indices + tl.program_id(0) * C + position, s.to(tl.int64), mask=taken > 0)
    tl.store(tokens + row, (b * S + s).to(tl.int64), mask=taken > 0)
    tl.store(slots + e * B * S + b * S + s, tl.where(taken > 0, row, -1), mask=inside)


@triton.jit
def _normalise(scores, slots, gates, takers, counts, tokens, E, scale, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < tokens) & (e < E)
    slot = tl.load(slots + e * tokens + t, mask=inside, other=-1)
    taken = slot >= 0
    score = tl.load(scores + t * E + e, mask=taken, other=0.0).to(tl.float32)
    gate = score / (tl.sum(score, axis=1)[:, None] + 1e-12) * scale
    tl.store(gates + slot, gate.to(gates.dtype.element_ty), mask=taken)
    count = tl.sum(taken.to(tl.int32), axis=1)[:, None]
    reached = tl.cumsum(taken.to(tl.int32), axis=1)
    # The slots in order, and after them the -1 of experts that did not take the token.
    position = tl.where(taken, reached - 1, count + e - reached)
    tl.store(takers + t * E + position, slot, mask=inside)
    tl.store(counts + t, count, mask=t < tokens)


@triton.jit
def _route_backward(
    logits, slots, d_gates, d_scores, d_logits, tokens, E, scale,
    SIGMOID: tl.constexpr, SCORES_USED: tl.constexpr, GATES_USED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < tokens) & (e < E)
    score = _score(logits, t, e, inside, E, SIGMOID)
    d_score = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    if GATES_USED:
        slot = tl.load(slots + e * tokens + t, mask=inside, other=-1)
        taken = slot >= 0
        chosen = tl.where(taken, score, 0.0)
        total = tl.sum(chosen, axis=1)[:, None] + 1e-12
        d_gate = tl.load(d_gates + slot, mask=taken, other=0.0).to(tl.float32)
        mean = tl.sum(d_gate * chosen, axis=1)[:, None] / total
        d_score = tl.where(taken, (d_gate - mean) / total * scale, 0.0)
    if SCORES_USED:
        d_score += tl.load(d_scores + t * E + e, mask=inside, other=0.0).to(tl.float32)
    if SIGMOID:
        d_logit = d_score * score * (1.0 - score)
    else:
        d_logit = score * (d_score - tl.sum(d_score * score, axis=1)[:, None])
    tl.store(d_logits + t * E + e, d_logit.to(d_logits.dtype.element_ty), mask=inside)


Choice = tuple[(torch.Tensor,) * 7]


def route(
    logits_BSE: torch.Tensor, capacity: int, use_sigmoid: bool, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Takers]:
    """Scores [B, S, E], token indices [B, E, C] in rising order, gates [B, E, C], and each token's takers."""
    scores, indices, gates, tokens_R, rows, counts, _ = choose(logits_BSE, capacity, use_sigmoid, route_scale)
    return scores, indices, gates, Takers(rows, counts, tokens_R)


def fits(logits_BSE: torch.Tensor) -> bool:
    """Whether the kernels support this shape."""
    return logits_BSE.shape[1] <= MAX_TOKENS and logits_BSE.shape[2] <= TILE


@torch.library.custom_op("nucleus::route", mutates_args=())
def choose(logits_BSE: torch.Tensor, capacity: int, use_sigmoid: bool, route_scale: float) -> Choice:
    """logits [B, S, E] -> scores [B, S, E], indices [B, E, C], gates [B, E, C] (in the rows' order in memory), tokens
    [R], takers [T, E], counts [T], and slots [E, T]: the row in which an expert computes a token, -1 if it does not."""
    chosen = _empty_choice(logits_BSE, capacity)
    scores_BSE, indices_BEC, gates_BEC, tokens_R, takers_TE, counts_T, slots_ET = chosen
    logits_BSE = logits_BSE.contiguous()
    B, S, E = logits_BSE.shape
    C, T = capacity, B * S
    affinity_BES = logits_BSE.new_empty(B, E, S)
    grid, blocks = _tiles(T, E)
    launch(_scores, grid, logits_BSE, scores_BSE, affinity_BES, T, S, E, SIGMOID=use_sigmoid, **blocks)
    # Every bit but the sign, so that exactly C are taken even with NaN; bfloat16 has 16 bits less than float32.
    low = 16 if logits_BSE.dtype == torch.bfloat16 else 0
    block_s = triton.next_power_of_2(S)
    launch(
        _select, (B * E,), affinity_BES, indices_BEC, tokens_R, slots_ET, B, S, E, C,
        HIGH=31, LOW=low, BLOCK_S=block_s, num_warps=min(16, max(4, block_s // 512)),
    )  # fmt: skip
    launch(_normalise, grid, scores_BSE, slots_ET, gates_BEC, takers_TE, counts_T, T, E, route_scale, **blocks)
    return chosen


@choose.register_fake
def _empty_choice(logits_BSE: torch.Tensor, capacity: int, *_: object) -> Choice:
    B, S, E = logits_BSE.shape
    T, C = B * S, capacity
    return (
        logits_BSE.new_empty(B, S, E),
        logits_BSE.new_empty(B, E, C, dtype=torch.long),
        logits_BSE.new_empty_strided((B, E, C), (C, B * C, 1)),
        logits_BSE.new_empty(E * B * C, dtype=torch.long),
        logits_BSE.new_empty(T, E, dtype=torch.int32),
        logits_BSE.new_empty(T, dtype=torch.int32),
        logits_BSE.new_empty(E, T, dtype=torch.int32),
    )


@torch.library.custom_op("nucleus::route_backward", mutates_args=())
def _choose_backward(
    logits_BSE: torch.Tensor,
    slots_ET: torch.Tensor,
    d_scores_BSE: torch.Tensor | None,
    d_gates_BEC: torch.Tensor | None,
    use_sigmoid: bool,
    route_scale: float,
) -> torch.Tensor:
    logits_BSE = logits_BSE.contiguous()
    B, S, E = logits_BSE.shape
    d_logits_BSE = logits_BSE.new_empty(B, S, E)
    grid, blocks = _tiles(B * S, E)
    d_scores = logits_BSE if d_scores_BSE is None else d_scores_BSE.contiguous()
    d_gates = logits_BSE if d_gates_BEC is None else d_gates_BEC.transpose(0, 1).contiguous()
    launch(
        _route_backward, grid, logits_BSE, slots_ET, d_gates, d_scores, d_logits_BSE, B * S, E, route_scale,
        SIGMOID=use_sigmoid, SCORES_USED=d_scores_BSE is not None, GATES_USED=d_gates_BEC is not None, **blocks,
    )  # fmt: skip
    return d_logits_BSE


@_choose_backward.register_fake
def _(logits_BSE, *_):
    return logits_BSE.new_empty(logits_BSE.shape)


def _save(ctx, inputs, output) -> None:
    logits_BSE, _, ctx.use_sigmoid, ctx.route_scale = inputs
    ctx.save_for_backward(logits_BSE, output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_scores_BSE, _indices, d_gates_BEC, *_rest):
    logits_BSE, slots_ET = ctx.saved_tensors
    arguments = slots_ET, d_scores_BSE, d_gates_BEC, ctx.use_sigmoid, ctx.route_scale
    return _choose_backward(logits_BSE, *arguments), None, None, None


choose.register_autograd(_backward, setup_context=_save)


def _tiles(tokens: int, experts: int) -> tuple[tuple[int], dict[str, int]]:
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, TILE // block_e)
    return (triton.cdiv(tokens, block_t),), {"BLOCK_T": block_t, "BLOCK_E": block_e}
