"""Layer norm without weights, then the timestep's scale: equals `model.kernels.elementwise.plain_norm_modulate`.

One read and one write (two, where the router sees the unmodulated tokens); backward recomputes the norm, and sums the
scale's gradient over a chunk of tokens in each program, in a fixed order.

Shape suffixes: B batch, S tokens, D width, P chunks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels import launch

MAX_WIDTH = 8192
CHUNK = 16  # tokens of a program of the backward pass


@triton.jit
def _norm_modulate_forward(
    x, scale, normed, modulated, S, D, scale_batch, eps, NORMED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    n, _ = _normalise_row(x + row * D, d, inside, D, eps)
    # Rounded where the plain formula rounds: the norm, 1 + scale, and their product.
    n = n.to(modulated.dtype.element_ty)
    if NORMED:
        tl.store(normed + row * D + d, n, mask=inside)
    factor = _one_plus(scale + (row // S) * scale_batch + d, inside)
    tl.store(modulated + row * D + d, (n.to(tl.float32) * factor).to(modulated.dtype.element_ty), mask=inside)


@triton.jit
def _normalise_row(row, d, inside, D, eps):
    value = tl.load(row + d, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * inverse_deviation, inverse_deviation


@triton.jit
def _one_plus(scale, inside):
    value = tl.load(scale, mask=inside, other=0.0)
    return (1.0 + value.to(tl.float32)).to(value.dtype).to(tl.float32)


@triton.jit
def _norm_modulate_backward(
    x, scale, d_normed, d_modulated, d_x, d_scale, S, D, scale_batch, eps, CHUNK: tl.constexpr, NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    factor = _one_plus(scale + b * scale_batch + d, inside)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, S)):
        row = b * S + s
        n, inverse_deviation = _normalise_row(x + row * D, d, inside, D, eps)
        g = tl.load(d_modulated + row * D + d, mask=inside, other=0.0).to(tl.float32)
        sums += g * n
        g *= factor
        if NORMED:
            g += tl.load(d_normed + row * D + d, mask=inside, other=0.0).to(tl.float32)
        result = (g - tl.sum(g, axis=0) / D - n * (tl.sum(g * n, axis=0) / D)) * inverse_deviation
        tl.store(d_x + row * D + d, result.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_scale + (b * tl.num_programs(1) + chunk) * D + d, sums, mask=inside)


def fits(x_BSD: torch.Tensor, scale_B1D: torch.Tensor) -> bool:
    """Whether the kernels support these shapes and dtypes."""
    return scale_B1D.dtype == x_BSD.dtype and scale_B1D.stride(-1) == 1 and x_BSD.shape[-1] <= MAX_WIDTH


class NormModulate(torch.autograd.Function):
    """x [B, S, D], scale [B, 1, D] -> normed x (None unless requested), and normed x times 1 + scale."""

    @staticmethod
    def forward(ctx, x_BSD: torch.Tensor, scale_B1D: torch.Tensor, eps: float, want_normed: bool):
        x_BSD = x_BSD.contiguous()
        B, S, D = x_BSD.shape
        modulated = torch.empty_like(x_BSD)
        normed = torch.empty_like(x_BSD) if want_normed else None
        launch(
            _norm_modulate_forward, (B * S,), x_BSD, scale_B1D, modulated if normed is None else normed, modulated,
            S, D, scale_B1D.stride(0), eps, NORMED=want_normed, **_block(D),
        )  # fmt: skip
        ctx.save_for_backward(x_BSD, scale_B1D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed, modulated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_normed, d_modulated):
        x_BSD, scale_B1D = ctx.saved_tensors
        B, S, D = x_BSD.shape
        d_modulated = torch.zeros_like(x_BSD) if d_modulated is None else d_modulated.contiguous()
        d_x_BSD, chunks = torch.empty_like(x_BSD), triton.cdiv(S, CHUNK)
        d_scale_BPD = torch.empty(B, chunks, D, dtype=torch.float32, device=x_BSD.device)
        launch(
            _norm_modulate_backward, (B, chunks), x_BSD, scale_B1D,
            d_modulated if d_normed is None else d_normed.contiguous(), d_modulated, d_x_BSD, d_scale_BPD,
            S, D, scale_B1D.stride(0), ctx.eps, CHUNK=CHUNK, NORMED=d_normed is not None, **_block(D),
        )  # fmt: skip
        return d_x_BSD, d_scale_BPD.sum(dim=1, keepdim=True).to(scale_B1D.dtype), None, None


def _block(D: int) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}
