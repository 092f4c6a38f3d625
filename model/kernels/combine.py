"""Tokens to experts and back: `gather_rows` equals index_select, `combine_rows` a gated index_add.

PyTorch adds rows of the same token with atomic operations, in no fixed order. Here each token sums its rows in the order
of the experts, in fp32: the same bits each time, and one write for each token.

Shape suffixes: T tokens, D width, E experts, R routed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels import Takers, launch

BLOCK = 1024


@triton.jit
def _sum_takers(
    routed, takers, counts, base, gates, out, D, E,
    BASE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if BASE:
        total += tl.load(base + t * D + d, mask=inside, other=0.0).to(tl.float32)
    for j in range(tl.load(counts + t)):
        row = tl.load(takers + t * E + j).to(tl.int64)
        value = tl.load(routed + row * D + d, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            value *= tl.load(gates + row).to(tl.float32)
        total += value
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward(grad, routed, gates, tokens, d_routed, d_gates, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    t = tl.load(tokens + row)
    g = tl.load(grad + t * D + d, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(routed + row * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gates + row, tl.sum(g * value, axis=0).to(d_gates.dtype.element_ty))
    gate = tl.load(gates + row).to(tl.float32)
    tl.store(d_routed + row * D + d, (g * gate).to(d_routed.dtype.element_ty), mask=inside)


def _token_grid(tokens: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(BLOCK, triton.next_power_of_2(width))
    return (tokens, triton.cdiv(width, block)), block


@torch.library.custom_op("nucleus::gather_rows", mutates_args=())
def _gather(
    x_TD: torch.Tensor, tokens_R: torch.Tensor, takers_TE: torch.Tensor, counts_T: torch.Tensor
) -> torch.Tensor:
    """PyTorch's own gather, which runs at memory speed. The other arguments are for the backward."""
    return x_TD.index_select(0, tokens_R)


@_gather.register_fake
def _(x_TD, tokens_R, *_):
    return x_TD.new_empty(tokens_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("nucleus::gather_rows_backward", mutates_args=())
def _gather_backward(grad_RD: torch.Tensor, takers_TE: torch.Tensor, counts_T: torch.Tensor) -> torch.Tensor:
    grad_RD = grad_RD.contiguous()
    (T, E), D = takers_TE.shape, grad_RD.shape[1]
    d_x_TD = grad_RD.new_empty(T, D)
    grid, block = _token_grid(T, D)
    launch(
        _sum_takers, grid, grad_RD, takers_TE, counts_T, grad_RD, grad_RD, d_x_TD, D, E,
        BASE=False, GATED=False, BLOCK=block,
    )  # fmt: skip
    return d_x_TD


@_gather_backward.register_fake
def _(grad_RD, takers_TE, counts_T):
    return grad_RD.new_empty(takers_TE.shape[0], grad_RD.shape[1])


@torch.library.custom_op("nucleus::combine_rows", mutates_args=())
def _combine(
    base_TD: torch.Tensor,
    routed_RD: torch.Tensor,
    gates_R: torch.Tensor,
    tokens_R: torch.Tensor,
    takers_TE: torch.Tensor,
    counts_T: torch.Tensor,
) -> torch.Tensor:
    """`tokens_R` is only for the backward."""
    base_TD, routed_RD, gates_R = base_TD.contiguous(), routed_RD.contiguous(), gates_R.contiguous()
    (T, E), D = takers_TE.shape, base_TD.shape[1]
    out_TD = base_TD.new_empty(T, D)
    grid, block = _token_grid(T, D)
    launch(
        _sum_takers, grid, routed_RD, takers_TE, counts_T, base_TD, gates_R, out_TD, D, E,
        BASE=True, GATED=True, BLOCK=block,
    )  # fmt: skip
    return out_TD


@_combine.register_fake
def _(base_TD, *_):
    return base_TD.new_empty(base_TD.shape)


@torch.library.custom_op("nucleus::combine_rows_backward", mutates_args=())
def _combine_rows_backward(
    grad_TD: torch.Tensor, routed_RD: torch.Tensor, gates_R: torch.Tensor, tokens_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_TD, routed_RD, gates_R = grad_TD.contiguous(), routed_RD.contiguous(), gates_R.contiguous()
    R, D = routed_RD.shape
    d_routed_RD, d_gates_R = routed_RD.new_empty(R, D), gates_R.new_empty(R)
    block = triton.next_power_of_2(D)
    launch(
        _combine_backward, (R,), grad_TD, routed_RD, gates_R, tokens_R, d_routed_RD, d_gates_R, D,
        BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return d_routed_RD, d_gates_R


@_combine_rows_backward.register_fake
def _(grad_TD, routed_RD, gates_R, tokens_R):
    return routed_RD.new_empty(routed_RD.shape), gates_R.new_empty(gates_R.shape)


def _save_for_gather(ctx, inputs, output) -> None:
    _, _, *takers = inputs
    ctx.save_for_backward(*takers)


def _save_for_combine(ctx, inputs, output) -> None:
    _, routed_RD, gates_R, tokens_R, *_ = inputs
    ctx.save_for_backward(routed_RD, gates_R, tokens_R)


_gather.register_autograd(
    lambda ctx, grad_RD: (_gather_backward(grad_RD, *ctx.saved_tensors), None, None, None),
    setup_context=_save_for_gather,
)
_combine.register_autograd(
    lambda ctx, grad_TD: (grad_TD, *_combine_rows_backward(grad_TD, *ctx.saved_tensors), None, None, None),
    setup_context=_save_for_combine,
)


def gather_rows(x_TD: torch.Tensor, takers: Takers) -> torch.Tensor:
    """x [T, D] -> the routed rows [R, D]."""
    return _gather(x_TD, takers.tokens_R, takers.rows_TE, takers.counts_T)


def combine_rows(base_TD: torch.Tensor, routed_RD: torch.Tensor, gates_R: torch.Tensor, takers: Takers) -> torch.Tensor:
    """`base_TD` plus, at each token, its rows of `routed_RD` times their gates [R] -> [T, D]."""
    return _combine(base_TD, routed_RD, gates_R, takers.tokens_R, takers.rows_TE, takers.counts_T)
