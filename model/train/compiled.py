"""torch.compile for each block: blocks with the same code share compiled kernels. See docs/decisions/gpu.md."""

from __future__ import annotations

from typing import Any

import torch

from model.layers.attention import PackedKeys


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles each block in place. A graph break raises an error on the first call."""
    for block in model.transformer_blocks.children():
        block.register_forward_pre_hook(_mark_lengths)
        block.compile(backend=backend, fullgraph=True)


def inductor_settings(deterministic: bool, expert_parallel: bool) -> dict[str, Any]:
    """Inductor's settings for training: values of torch._inductor.config.

    `deterministic`: otherwise tile sizes are chosen by timing trials, and the order of sums depends on the timings.
    With `expert_parallel` Inductor keeps the order of operations. Reordering for less memory, its default, moves the
    shared expert's gradients out of the exchanges that they overlap with.
    """
    return {"deterministic": deterministic, "reorder_for_peak_memory": not expert_parallel}


@torch._dynamo.disable
def _mark_lengths(block: torch.nn.Module, inputs: tuple) -> None:
    """Marks the numbers of image and text tokens as dynamic, so that one set of kernels serves all pairs of aspect ratio
    and text length, of which there are hundreds."""
    x_BSD, _, _, text, text_kv, (table_image, table_text), mask = inputs
    lengths = [(x_BSD, 1), (table_image, 0), (table_text, 0)]
    lengths += [(text[0], 1)] if text_kv is None else [(tensor, 1) for tensor in text_kv]
    if isinstance(mask, PackedKeys):
        lengths += [(keys, 0) for keys in (mask.order, mask.places, mask.kept)]
    elif mask is not None:
        lengths.append((mask, 1))
    for tensor, dim in lengths:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
