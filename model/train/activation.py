"""Activation checkpointing of the blocks: what the backward keeps of a block's forward, and what it computes again.

    none       every tensor that autograd saves
    selective  the outputs of matrix products, attention, top-k and communication; the rest is computed again
    full       the block's input alone; the whole block is computed again (compiled, all but the choice of experts)

Experts must choose the same tokens again. Eager code runs the same kernels on the same bits; a compiler may fuse, and
so round, otherwise in the backward pass, where a token on the edge would then change experts.

Selective checkpointing (Korthikanti et al., arXiv 2205.05198) buys most of the memory for little time: what it
computes again (norms, modulation, RoPE, SwiGLU, gather) is bound by memory traffic and not by the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.train.device import DEVICE_TYPE  # noqa: F401  (first: it prepares torchtitan)

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

from model import kernels

# The choice of experts: plain, and by the Triton kernel.
CHOICE_OPS = ("aten.topk.default", "nucleus.route.default")
# Saved besides torchtitan's list; those of packages that are not installed are skipped.
SAVED_OPS = (
    *CHOICE_OPS,
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten.baddbmm.default",
    "flash_attn._flash_attn_forward.default",
    "flash_attn._flash_attn_varlen_forward.default",
    "flash_attn_3.fwd.default",
)


class _OnBlocks(ActivationCheckpointing):
    """torchtitan's policies look for `model.layers`; here blocks have diffusers' name."""

    def apply(self, model: torch.nn.Module) -> None:
        """Wraps every block. `state_dict` keeps its names; `named_parameters` shows the wrapper's (`canonical_fqn`)."""
        blocks = model.transformer_blocks
        for name, block in blocks.named_children():
            blocks.register_module(name, self._wrap_block(block))


class FullCheckpointing(_OnBlocks, FullAC):
    """torchtitan's, but compiled blocks keep the choice of experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        pass

    def _wrap_block(self, module: torch.nn.Module, *, base_fqn: str | None = None) -> torch.nn.Module:
        chosen = _operations(CHOICE_OPS)
        return checkpoint_wrapper(
            module,
            context_fn=lambda: (
                create_selective_checkpoint_contexts(chosen) if torch.compiler.is_compiling() else noop_context_fn()
            ),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            early_stop=False,
        )


class SelectiveCheckpointing(_OnBlocks, SelectiveAC):
    """torchtitan's set of operations, but every product is saved: its own policy drops every second one by count,
    and which of ours that hits would be chance."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | set(_operations(SAVED_OPS))

    def _wrap_block(self, module: torch.nn.Module, *, base_fqn: str | None = None) -> torch.nn.Module:
        saved = list(self.get_save_ops())
        return checkpoint_wrapper(
            module,
            context_fn=lambda: create_selective_checkpoint_contexts(saved),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
        )


def activation_config(policy: Literal["none", "selective", "full"]) -> ActivationCheckpointing.Config | None:
    """torchtitan's configuration of `train.activation_checkpointing`. The model draws no random numbers: no RNG state
    is kept."""
    if policy == "none":
        return None
    kind = SelectiveCheckpointing if policy == "selective" else FullCheckpointing
    return kind.Config(preserve_rng_state=False)


def _operations(names: tuple[str, ...]) -> list[object]:
    """Those that exist."""
    if not kernels.lacking():
        import model.kernels.route  # noqa: F401  (its operation exists from then on)
    return [op for op in map(_operation, names) if op is not None]


def _operation(name: str) -> object | None:
    found = torch.ops
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return None
    return found
