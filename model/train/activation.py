"""Activation checkpointing of the blocks: which tensors of a block's forward are saved, and which are recomputed.

    none       saves every tensor that autograd needs
    selective  saves the outputs of matrix products, attention, top-k and communication; recomputes the rest
    full       saves the block's input; recomputes the whole block (compiled: all but the choice of experts)

Experts must choose the same tokens in the recomputation. Eager code runs the same kernels on the same bits. A compiler
may fuse differently in the backward pass, and round differently: a token near the threshold would change experts.

Selective checkpointing (Korthikanti et al., arXiv 2205.05198) saves most of the memory for little time: what it
recomputes (norms, modulation, RoPE, SwiGLU, gather) is bound by memory traffic, not by the matrix units.
The reasons are in docs/decisions/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

from model import kernels
from model.layers.attention import PACKAGES, packed_backend

from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

# The choice of experts: plain, and by the Triton kernel.
CHOICE_OPS = ("aten.topk.default", "nucleus.route.default")
# Saved in addition to torchtitan's list.
SAVED_OPS = (*CHOICE_OPS, "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten.baddbmm.default")
# The forward operations of each attention backend other than SDPA.
FLASH_OPS = {
    "varlen": ("torch_attn._varlen_attn.default",),
    "flash2": ("flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_varlen_forward.default"),
    "flash3": ("flash_attn_3._flash_attn_forward.default",),
}
# The only operation of early releases. It has no shape function, so it cannot be compiled.
EARLY_FLASH_OPS = {"flash3": ("flash_attn_3.fwd.default",)}


class _OnBlocks(ActivationCheckpointing):
    """torchtitan's policies wrap `model.layers`; the blocks here have diffusers' name."""

    def apply(self, model: torch.nn.Module) -> None:
        """Wraps every block. `state_dict` keeps the names; `named_parameters` adds the wrapper's (`canonical_fqn`)."""
        blocks = model.transformer_blocks
        for name, block in blocks.named_children():
            blocks.register_module(name, self._wrap_block(block))


class FullCheckpointing(_OnBlocks, FullAC):
    """torchtitan's full checkpointing, except that compiled blocks save the choice of experts."""

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
    """torchtitan's set of operations, but every product is saved. Its own policy recomputes every second product,
    counted in execution order, which has no meaning for these blocks."""

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
    """torchtitan's configuration of `train.activation_checkpointing`. The model draws no random numbers, so no RNG
    state is saved."""
    if policy == "none":
        return None
    kind = SelectiveCheckpointing if policy == "selective" else FullCheckpointing
    return kind.Config(preserve_rng_state=False)


def flash_operations(needed_by: str, early: bool = False) -> list[object]:
    """The forward operations of this process's attention backend; empty for SDPA.

    Args:
        needed_by: the setting that needs the operation, named in the error.
        early: whether the operation of an early release is enough.

    Raises:
        ValueError: a release of flash-attn without such an operation.
    """
    backend = packed_backend()  # imports it, which registers its operations
    if backend is None:
        return []
    names = FLASH_OPS[backend] + (EARLY_FLASH_OPS.get(backend, ()) if early else ())
    operations = _operations(names)
    if not operations:
        raise ValueError(
            f"{needed_by} needs a release of flash-attn whose module {PACKAGES[backend]} has the operation "
            f"{' or '.join(names)}: install a newer one, or set train.attention_backend='sdpa'"
        )
    return operations


def _operations(names: tuple[str, ...]) -> list[object]:
    """The operations of these names that are registered."""
    if not kernels.missing_requirements():
        import model.kernels.route  # noqa: F401  (registers its operation)
    return [op for op in map(_operation, names) if op is not None]


def _operation(name: str) -> object | None:
    operation = torch.ops
    for part in name.split("."):
        try:
            operation = getattr(operation, part)
        except AttributeError:
            return None
    return operation
