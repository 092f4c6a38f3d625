"""Fused element-wise functions, with up to three implementations each, which must agree.

    eager CPU    a hand-written backward: small operations are bound by memory traffic and allocation
    eager CUDA   a Triton kernel (model/kernels)
    otherwise    the plain formula (`plain_*`), which torch.compile fuses

See docs/decisions/kernels.md.
"""

from __future__ import annotations

import ctypes
import sys

import torch
import torch.nn.functional as F

from model import kernels
from model.layers.rope import apply_rope


def _eager_cpu(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in the process instead of returning it to the kernel. Returns whether that worked.

    Every training step frees and allocates the same memory. Zeroed pages from the kernel cost more time than the
    arithmetic on them. Call it once, before the first step of a training on the CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class _SwiGLU(torch.autograd.Function):
    """Saves the sigmoid: one exponential per step instead of three for silu and its derivative."""

    @staticmethod
    def forward(ctx, packed: torch.Tensor, gate_first: bool) -> torch.Tensor:
        first, second = packed.chunk(2, dim=-1)
        gate, up = (first, second) if gate_first else (second, first)
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(packed, sigmoid)
        ctx.gate_first = gate_first
        return (gate * sigmoid).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        packed, sigmoid = ctx.saved_tensors
        out = torch.empty_like(packed)
        first, second = packed.chunk(2, dim=-1)
        d_first, d_second = out.chunk(2, dim=-1)
        gate, up = (first, second) if ctx.gate_first else (second, first)
        d_gate, d_up = (d_first, d_second) if ctx.gate_first else (d_second, d_first)
        silu = gate * sigmoid
        torch.mul(silu, grad, out=d_up)
        derivative = torch.addcmul(silu, silu, sigmoid, value=-1.0).add_(sigmoid)
        torch.mul(derivative.mul_(up), grad, out=d_gate)
        return out, None


def swiglu(packed: torch.Tensor, gate_first: bool) -> torch.Tensor:
    """silu(gate) * up of `packed` [..., 2F] -> [..., F]. `gate_first`: the first half is the gate."""
    if kernels.supports(packed):
        from model.kernels.swiglu import SwiGLU

        return SwiGLU.apply(packed, gate_first)
    if _eager_cpu(packed):
        return _SwiGLU.apply(packed, gate_first)
    return plain_swiglu(packed, gate_first)


def plain_swiglu(packed: torch.Tensor, gate_first: bool) -> torch.Tensor:
    first, second = packed.chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return F.silu(gate) * up


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, table, eps):
        inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse_rms = inverse_rms.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse_rms
        ctx.save_for_backward(normed, inverse_rms, weight, table)
        rotated = torch.view_as_complex((normed * weight).unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
        return torch.view_as_real(rotated).flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        normed, inverse_rms, weight, table = ctx.saved_tensors
        grad = torch.view_as_complex(grad.contiguous().unflatten(-1, (-1, 2)))
        # The transpose of a rotation is its inverse.
        grad = torch.view_as_real(grad * torch.view_as_complex(table).conj()).flatten(-2)
        product = grad * normed
        d_weight = product.sum(dim=tuple(range(product.dim() - weight.dim())))
        grad = grad.mul_(weight)
        mean = product.mul_(weight).mean(dim=-1, keepdim=True)
        d_x = grad.addcmul_(normed, mean, value=-1.0).mul_(inverse_rms)
        return d_x, d_weight, None, None


def norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the head dim times `weight` [N, H] or [H], then RoPE, of `x` [B, S, N, H]. Returns the type of `x`."""
    if kernels.supports(x):
        from model.kernels import norm_rope as kernel

        if kernel.fits(x, weight):
            return kernel.NormRope.apply(x, weight, table, eps)
    if _eager_cpu(x):
        return _NormRope.apply(x, weight, table, eps)
    return plain_norm_rope(x, weight, table, eps)


def plain_norm_rope(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, eps: float) -> torch.Tensor:
    # As diffusers' RMSNorm: fp32 statistics, rounded to the weight's dtype before the product with it.
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return apply_rope(normed, table).to(x.dtype)


def norm_modulate(
    x: torch.Tensor, scale: torch.Tensor, eps: float, want_normed: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(layer norm of `x` [B, S, D], this norm times 1 + `scale` [B, 1, D]). The first may be None without
    `want_normed`."""
    if kernels.supports(x):
        from model.kernels import norm_modulate as kernel

        if kernel.fits(x, scale):
            return kernel.NormModulate.apply(x, scale, eps, want_normed)
    return plain_norm_modulate(x, scale, eps)


def plain_norm_modulate(x: torch.Tensor, scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed, normed * (1 + scale)
