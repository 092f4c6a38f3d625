"""Inputs of one block, for benchmarks/gpu_blocks.py."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import torch

from model.layers.attention import prepare_mask
from model.layers.rope import rope_angles, rope_tables


class Case(NamedTuple):
    batch: int
    tokens: int
    capacity: float

    @classmethod
    def parse(cls, text: str) -> Case:
        batch, tokens, capacity = text.split("x")
        return cls(int(batch), int(tokens), float(capacity))

    def __str__(self) -> str:
        return f"{self.batch} samples of {self.tokens} tokens, capacity factor {self.capacity:g}"


def axes_of(args: argparse.Namespace) -> tuple[int, int, int]:
    """The released dims of the rotary axes, (16, 56, 56) of 128, scaled to the head dim."""
    head_dim = args.width // args.heads
    axis = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * axis, axis, axis


class Inputs(NamedTuple):
    mask: Any  # the result of `prepare_mask`
    x: torch.Tensor
    time: torch.Tensor
    text: torch.Tensor
    text_weight: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    rotations: tuple[torch.Tensor, torch.Tensor]  # the same as complex numbers, as diffusers takes them
    grad: torch.Tensor


def make_inputs(args: argparse.Namespace, case: Case) -> Inputs:
    axes = axes_of(args)
    rows = max(d for d in range(1, math.isqrt(case.tokens) + 1) if case.tokens % d == 0)
    shape = (1, rows, case.tokens // rows)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(args.dtype)

    angles = rope_angles(axes, shape, args.text, args.device)
    x = randn(case.batch, case.tokens, args.width).requires_grad_()
    keys = torch.ones(case.batch, case.tokens + args.text, dtype=torch.bool, device=args.device)
    return Inputs(
        prepare_mask(keys, x, args.width // args.heads),
        x,
        randn(case.batch, args.width).requires_grad_(),
        randn(case.batch, args.text, args.text_dim),
        torch.ones(args.text_dim, device=args.device, dtype=args.dtype),
        rope_tables(axes, shape, args.text, torch.device(args.device)),
        tuple(torch.polar(torch.ones_like(a), a) for a in angles),
        randn(case.batch, case.tokens, args.width),
    )
