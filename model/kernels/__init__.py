"""The choice between Triton kernels and plain PyTorch, for the whole process.

Every kernel has a plain PyTorch function that it must equal, and runs on CUDA:

    route, combine                        eager and compiled code
    swiglu, norm_rope, norm_modulate      eager code; a compiler fuses the plain functions with the operations around
                                          them, which it could not do with a kernel

Plain routing on CUDA adds rows with atomic operations in no fixed order, compiled or not; the kernels give the same bits
each time. They are PyTorch operations (`torch.ops.nucleus`): a compiler sees one node without a graph break, activation
checkpointing can name it, and the kernel waits for the asynchronous result of a collective before it reads it.

A CPU (model/kernels/elementwise.py), sharded tensors, and shapes that a kernel does not support use the plain functions.
Triton is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, Literal, NamedTuple, get_args

import torch

Kernels = Literal["auto", "torch", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Takers(NamedTuple):
    """The map between tokens and routed rows, in both directions.

    The first `counts_T` entries of `rows_TE` are the rows of a token, ordered by expert; the rest is -1. `tokens_R` is the
    token of each row.
    """

    rows_TE: torch.Tensor
    counts_T: torch.Tensor
    tokens_R: torch.Tensor


_choice: Kernels = "auto"


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_requirements() -> list[str]:
    """What this machine lacks for Triton kernels; empty if they can run."""
    missing = [] if triton_installed() else ["the package triton"]
    if not torch.cuda.is_available() and not interpreted():
        missing.append("a CUDA device (or TRITON_INTERPRET=1, for tests)")
    return missing


def use_kernels(choice: Kernels) -> None:
    """Sets the kernels of the process. "auto": Triton if it can run; "torch": never; "triton": required.

    Raises:
        ValueError: an unknown choice, or "triton" cannot run; the message says what is missing.
    """
    global _choice
    if choice not in get_args(Kernels):
        raise ValueError(f"kernels={choice!r} must be one of {', '.join(get_args(Kernels))}")
    if choice == "triton" and (missing := missing_requirements()):
        raise ValueError(f"kernels='triton' needs {' and '.join(missing)}; use 'auto' or 'torch' here")
    _choice = choice


def supports(x: torch.Tensor) -> bool:
    """Whether element-wise operations on `x` run as Triton kernels."""
    return not torch.compiler.is_compiling() and supports_routing(x)


def supports_routing(x: torch.Tensor) -> bool:
    """Whether routing by the logits `x` runs as Triton kernels."""
    return (
        _choice != "torch"
        and x.dtype in DTYPES
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and _run_on(x.device.type, _choice == "triton")
    )


@torch.compiler.assume_constant_result
def _run_on(device_type: str, asked: bool) -> bool:
    """Whether Triton runs on tensors of that device. A compiler takes the result as a constant."""
    return triton_installed() and (device_type == "cuda" or (asked and interpreted()))


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Runs `kernel` on the device of `x`, which is its first argument."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **constants)
