"""The operations of a transformer block between its matrix products, for gpu_blocks.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from model.kernels.elementwise import norm_modulate, norm_rope, swiglu
from model.layers.attention import EPS
from model.layers.moe import Routing, combine, gather


class Step(NamedTuple):
    """An operation between products: its function, and the count of numbers that it must read and write once."""

    name: str
    run: Callable[..., Any]  # of `inputs`; what it returns takes a gradient
    inputs: tuple[torch.Tensor, ...]
    forward_numbers: int
    backward_numbers: int


def steps_between(args: argparse.Namespace, x: torch.Tensor, tables: tuple, routing: Routing) -> list[Step]:
    """The operations of a block with image tokens x [B, S, D] and the tables of rotary positions.

    Forward counts inputs read and outputs written; backward counts saved inputs and the output's gradient read, and the
    inputs' gradients written. Rows of experts are R = E B C.
    """
    (B, S, D), E, H = x.shape, args.experts, args.width // args.heads
    rows_R, hidden, N = routing.rows_R(), args.hidden, args.heads + args.kv_heads
    R, tokens = len(rows_R), B * S

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(args.dtype).requires_grad_()

    x, scale, qk, weight = leaf(B, S, D), leaf(B, 1, D), leaf(B, S, N, H), leaf(N, H)
    packed, shared, routed = leaf(E, R // E, 2 * hidden), leaf(B, S, D), leaf(E, R // E, D)
    gates = routing.gates_BEC.transpose(0, 1).detach().contiguous().requires_grad_()
    takers = routing.takers
    return [
        Step(
            "norm, modulation", lambda x, s: norm_modulate(x, s, EPS, True), (x, scale),
            3 * tokens * D, 4 * tokens * D,
        ),
        Step(
            "QK norm, RoPE", lambda x, w: norm_rope(x, w, tables[0], EPS), (qk, weight),
            2 * tokens * N * H, 3 * tokens * N * H,
        ),
        Step("gather", lambda x: gather(x, rows_R, E, takers), (x,), tokens * D + R * D, R * D + tokens * D),
        Step("SwiGLU", lambda p: swiglu(p, True), (packed,), 3 * R * hidden, 5 * R * hidden),
        Step(
            "combine", lambda s, r, g: combine(s, r, rows_R, g, takers), (shared, routed, gates),
            2 * tokens * D + R * D, 2 * tokens * D + 2 * R * D,
        ),
    ]  # fmt: skip
