"""RMS norm over the head dim, then RoPE, of queries and keys: equals `model.kernels.elementwise.plain_norm_rope`.

One program processes all heads of one token: one read and one write. Backward recomputes the norm from the input; the
weight's gradient is first summed per program, in a fixed order, so that it is deterministic.

Shape suffixes: B batch, S tokens, N heads, H head dim, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels import launch

PROGRAMS = 512  # programs of a backward pass: enough for every multiprocessor, few enough partial sums
MAX_TILE = 16384  # elements of one token's heads


@triton.jit
def _norm_rope_forward(
    x, weight, table, out, S, N, H, x_batch, x_token, x_head, weight_head, eps,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    n, h = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)[None, :]
    inside = (n < N) & (h < H)
    value = tl.load(x + b * x_batch + s * x_token + n * x_head + h, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value, axis=1) / H + eps)
    # Rounded where the plain formula rounds: the norm, and its product with the weight.
    normed = (value * inverse_rms[:, None]).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + n * weight_head + h, mask=inside, other=0.0)
    weighted = (normed * w.to(tl.float32)).to(w.dtype).to(tl.float32)
    angles = tl.load(table + s * H + h, mask=h < H, other=0.0)
    cos, sin = tl.split(tl.reshape(angles, (1, BLOCK_H // 2, 2)))
    real, imag = tl.split(tl.reshape(weighted, (BLOCK_N, BLOCK_H // 2, 2)))
    turned = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (BLOCK_N, BLOCK_H))
    tl.store(out + row * N * H + n * H + h, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope_backward(
    x, weight, table, grad, d_x, d_weight, rows, S, N, H, x_batch, x_token, x_head, weight_head, eps,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, h = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)[None, :]
    inside = (n < N) & (h < H)
    w = tl.load(weight + n * weight_head + h, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        b, s = row // S, row % S
        value = tl.load(x + b * x_batch + s * x_token + n * x_head + h, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(value * value, axis=1) / H + eps)[:, None]
        normed = value * inverse_rms
        g = tl.load(grad + row * N * H + n * H + h, mask=inside, other=0.0).to(tl.float32)
        angles = tl.load(table + s * H + h, mask=h < H, other=0.0)
        cos, sin = tl.split(tl.reshape(angles, (1, BLOCK_H // 2, 2)))
        real, imag = tl.split(tl.reshape(g, (BLOCK_N, BLOCK_H // 2, 2)))
        # The transpose of a rotation is its inverse.
        g = tl.reshape(tl.join(real * cos + imag * sin, imag * cos - real * sin), (BLOCK_N, BLOCK_H))
        sums += g * normed
        g = g * w
        mean = tl.sum(g * normed, axis=1)[:, None] / H
        result = (g - normed * mean) * inverse_rms
        tl.store(d_x + row * N * H + n * H + h, result.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weight + program * N * H + n * H + h, sums, mask=inside)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels support these shapes and dtypes."""
    N, H = x.shape[-2:]
    return x.stride(-1) == 1 and weight.dtype in (x.dtype, torch.float32) and _tile(N, H) <= MAX_TILE


def _tile(N: int, H: int) -> int:
    return triton.next_power_of_2(N) * triton.next_power_of_2(H)


class NormRope(torch.autograd.Function):
    """x [B, S, N, H], weight [N, H] or [H], table [S, 1, H/2, 2] -> [B, S, N, H], of the type of `x`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float) -> torch.Tensor:
        weight, table = weight.contiguous(), table.contiguous()
        ctx.save_for_backward(x, weight, table)
        ctx.eps = eps
        B, S, N, H = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch(_norm_rope_forward, (B * S,), x, weight, table, out, *_sizes(x, weight), eps, **_blocks(N, H))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight, table = ctx.saved_tensors
        B, S, N, H = x.shape
        programs = max(1, min(PROGRAMS, B * S))
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight_PNH = torch.empty(programs, N, H, dtype=torch.float32, device=x.device)
        launch(
            _norm_rope_backward, (programs,), x, weight, table, grad.contiguous(), d_x, d_weight_PNH, B * S,
            *_sizes(x, weight), ctx.eps, **_blocks(N, H),
        )  # fmt: skip
        d_weight = d_weight_PNH.sum(dim=0 if weight.dim() == 2 else (0, 1))
        return d_x, d_weight.to(weight.dtype), None, None


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    _, S, N, H = x.shape
    return S, N, H, x.stride(0), x.stride(1), x.stride(2), weight.stride(0) if weight.dim() == 2 else 0


def _blocks(N: int, H: int) -> dict[str, int]:
    return {
        "BLOCK_N": triton.next_power_of_2(N),
        "BLOCK_H": triton.next_power_of_2(H),
        "num_warps": 8 if _tile(N, H) >= 4096 else 4,
    }
