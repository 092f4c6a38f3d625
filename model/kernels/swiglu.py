"""SwiGLU between the two products of an expert: equals `model.kernels.elementwise.plain_swiglu`.

One pass over memory each way; backward recomputes the sigmoid, so that only the first product's output is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels import launch

BLOCK = 512


@triton.jit
def _swiglu_forward(packed, out, F, gate_at, up_at, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(packed + row * 2 * F + gate_at + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed + row * 2 * F + up_at + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded where the plain formula rounds: after silu, and after the product.
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * F + column, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(packed, grad, d_packed, F, gate_at, up_at, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(packed + row * 2 * F + gate_at + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed + row * 2 * F + up_at + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_up = g * gate * sigmoid
    d_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_packed + row * 2 * F + gate_at + column, d_gate.to(d_packed.dtype.element_ty), mask=inside)
    tl.store(d_packed + row * 2 * F + up_at + column, d_up.to(d_packed.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """packed [..., 2F] -> silu(gate) * up [..., F]."""

    @staticmethod
    def forward(ctx, packed: torch.Tensor, gate_first: bool) -> torch.Tensor:
        packed = packed.contiguous()
        F = packed.shape[-1] // 2
        out = packed.new_empty(*packed.shape[:-1], F)
        ctx.at = (0, F) if gate_first else (F, 0)
        ctx.save_for_backward(packed)
        launch(_swiglu_forward, _grid(out), packed, out, F, *ctx.at, BLOCK=BLOCK)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (packed,) = ctx.saved_tensors
        d_packed, grad = torch.empty_like(packed), grad.contiguous()
        launch(_swiglu_backward, _grid(grad), packed, grad, d_packed, grad.shape[-1], *ctx.at, BLOCK=BLOCK)
        return d_packed, None


def _grid(out: torch.Tensor) -> tuple[int, int]:
    F = out.shape[-1]
    return out.numel() // F, triton.cdiv(F, BLOCK)
