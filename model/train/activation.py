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

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

from model import kernels
from model.attention import PACKAGES, flash_backend

from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

# The choice of experts: plain, and by the Triton kernel.
CHOICE_OPS = ("aten.topk.default", "nucleus.route.default")
# Saved besides torchtitan's list.
SAVED_OPS = (*CHOICE_OPS, "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten.baddbmm.default")
# The forward pass of flash-attn, by what is chosen.
FLASH_OPS = {
    "flash2": ("flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_varlen_forward.default"),
    "flash3": ("flash_attn_3._flash_attn_forward.default",),
}
# All that early releases have: no compiler can tell what shape it returns.
EARLY_FLASH_OPS = {"flash3": ("flash_attn_3.fwd.default",)}


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
        attention = flash_operations("train.activation_checkpointing='selective'", early=True)
        return super().get_save_ops() | set(_operations(SAVED_OPS)) | set(attention)

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


def flash_operations(asked_for: str, early: bool = False) -> list[object]:
    """The forward pass of the flash-attn that this process chooses; empty if it chooses none.

    Args:
        asked_for: what cannot do without, for the message.
        early: early releases will do.

    Raises:
        ValueError: flash-attn is chosen, of a release that has no such operation.
    """
    backend = flash_backend()  # which imports it: its operations exist from then on
    if backend is None:
        return []
    names = FLASH_OPS[backend] + (EARLY_FLASH_OPS.get(backend, ()) if early else ())
    found = _operations(names)
    if not found:
        raise ValueError(
            f"{asked_for} needs a release of flash-attn whose module {PACKAGES[backend]} has the operation "
            f"{' or '.join(names)}: install a newer one, or set train.attention_backend='sdpa'"
        )
    return found


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
