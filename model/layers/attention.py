"""Attention of image queries over image and text keys and values, with grouped heads, QK norm and RoPE.

Four backends compute the same function; `choose_backend` picks one for the process:

    flash3, flash2   flash-attn 3 or 2, where the package is installed
    varlen           PyTorch's own flash kernel for packed sequences (torch.nn.attention.varlen)
    sdpa             F.scaled_dot_product_attention: everywhere, for any dtype

The first three need a CUDA device and half precision. They take a key mask as packed keys: the kept keys of all samples
one after the other, with offsets. SDPA on CUDA sends a mask to its memory-efficient kernel, whose deterministic
backward runs one thread block for each head and sample, too few to fill a large GPU. No backend repeats key-value heads
in memory. See docs/decisions/kernels.md and docs/decisions/gpu.md.

Shape suffixes: B batch, S image tokens, T text tokens, L = S + T keys, D width, J text width, N query heads, K
key-value heads, G = N / K query heads per key-value head, H head dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.elementwise import norm_rope

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "varlen", "flash2", "flash3"]
PackedBackend = Literal["varlen", "flash2", "flash3"]
# The module that each backend needs, and where it comes from; "auto" tries them in this order.
PACKAGES = {"flash3": "flash_attn_interface", "flash2": "flash_attn", "varlen": "torch.nn.attention.varlen"}
_SOURCES = {"flash3": "package flash-attn 3", "flash2": "package flash-attn", "varlen": "PyTorch 2.10 or newer"}
HALF = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_DIM = 256

EPS = 1e-6
# Up to this many scores per head, plain batched products beat PyTorch's blocked CPU kernel (about twice as fast at
# 16 x 32, forward and backward; benchmarks/train_step.py).
PLAIN_SCORES = 16384


_choice: AttentionBackend = "auto"
_packages: dict[str, ModuleType] = {}  # imported by backend; compiled code cannot import
_varlen_options: dict[str, Any] = {}


class Machine(NamedTuple):
    """Properties of the machine that determine which backends it can run."""

    capability: tuple[int, int] | None  # of the CUDA device; None without one, or for tensors of another device
    modules: frozenset[str]  # the installed modules of PACKAGES


@functools.cache
def _machine(device_type: str, index: int | None) -> Machine:
    capability = torch.cuda.get_device_capability(index) if device_type == "cuda" else None
    return Machine(capability, frozenset(m for m in PACKAGES.values() if importlib.util.find_spec(m)))


def missing_requirements(backend: AttentionBackend, machine: Machine) -> list[str]:
    """What the machine lacks for `backend`; empty if it can run it."""
    if backend not in PACKAGES:
        return []
    missing = []
    if PACKAGES[backend] not in machine.modules:
        missing.append(f"the module {PACKAGES[backend]} ({_SOURCES[backend]})")
    wanted = "compute capability 9.0 (Hopper)" if backend == "flash3" else "compute capability 8.0 or higher"
    if machine.capability is None:
        missing.append(f"a CUDA device of {wanted}")
    elif (machine.capability[0] != 9) if backend == "flash3" else (machine.capability < (8, 0)):
        missing.append(f"{wanted}, not {'.'.join(map(str, machine.capability))}")
    return missing


def choose_backend(
    wanted: AttentionBackend, machine: Machine, dtype: torch.dtype, head_dim: int
) -> tuple[Literal["sdpa"] | PackedBackend, str]:
    """The backend to use, and why the faster ones are not used.

    Raises:
        ValueError: `wanted` names a backend that the machine, the dtype or the head dim does not allow.
    """
    if wanted == "sdpa":
        return "sdpa", "asked for"
    unfit = []
    if dtype not in HALF:
        unfit.append(f"bfloat16 or float16 tensors, not {str(dtype).removeprefix('torch.')}")
    if head_dim % 8 or head_dim > MAX_FLASH_HEAD_DIM:
        unfit.append(f"a head dim that is a multiple of 8 up to {MAX_FLASH_HEAD_DIM}, not {head_dim}")
    reasons = []
    for backend in PACKAGES if wanted == "auto" else (wanted,):
        missing = missing_requirements(backend, machine) + unfit
        if not missing:
            return backend, "; ".join(reasons)
        reasons.append(f"{backend} needs {' and '.join(missing)}")
    if wanted != "auto":
        raise ValueError(f"attention_backend='{wanted}': {reasons[0]}; use 'auto' or 'sdpa'")
    return "sdpa", "; ".join(reasons)


def use_attention(choice: AttentionBackend) -> None:
    """Sets the backend of the whole process; the default is "auto".

    Raises:
        ValueError: an unknown name, or a backend that this machine cannot run; the message says what is missing.
    """
    global _choice
    if choice not in get_args(AttentionBackend):
        raise ValueError(f"attention_backend={choice!r} must be one of {', '.join(get_args(AttentionBackend))}")
    missing = missing_requirements(choice, _machine("cuda" if torch.cuda.is_available() else "cpu", None))
    if missing:
        raise ValueError(f"attention_backend='{choice}' needs {' and '.join(missing)}; use 'auto' or 'sdpa' here")
    _choice = choice


def _import(backend: str) -> None:
    if backend not in PACKAGES or backend in _packages:
        return
    module = importlib.import_module(PACKAGES[backend])
    _packages[backend] = module
    if backend == "varlen":
        # PyTorch 2.13 requires this argument for grouped heads; 2.10 and 2.11 accept them but not the argument.
        grouped = "enable_gqa" in inspect.signature(module.varlen_attn).parameters
        _varlen_options.update({"enable_gqa": True} if grouped else {})


def packed_backend() -> PackedBackend | None:
    """The backend of half-precision tensors in this process, imported; None if it is SDPA, which takes no packed
    keys."""
    machine = _machine("cuda" if torch.cuda.is_available() else "cpu", None)
    backend, _ = choose_backend(_choice, machine, torch.bfloat16, MAX_FLASH_HEAD_DIM)
    _import(backend)
    return backend if backend in PACKAGES else None


@functools.cache
def _decide(wanted: AttentionBackend, device_type: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    """The backend for such tensors. Cached, so that its reason is logged once."""
    backend, reason = choose_backend(wanted, _machine(device_type, index), dtype, head_dim)
    _import(backend)
    if device_type == "cuda":
        logger.info("attention runs on %s%s", backend, f" ({reason})" if reason else "")
        if backend == "sdpa" and dtype in HALF:
            logger.warning(
                "attention with a key mask is slow here in deterministic training: SDPA's memory-efficient kernel uses "
                "few of the GPU's multiprocessors. Install flash-attn, or PyTorch 2.10 or newer"
            )
    return backend


@torch.compiler.assume_constant_result
def _chosen(wanted: AttentionBackend, device_type: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    """`_decide` for a compiler, which takes the result as a constant instead of tracing the function."""
    return _decide(wanted, device_type, index, dtype, head_dim)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` run: autocast's if it is enabled."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _backend(x: torch.Tensor, head_dim: int) -> str:
    return _chosen(_choice, x.device.type, x.device.index, product_dtype(x), head_dim)


class PackedKeys(NamedTuple):
    """A key mask in the form that kernels for packed sequences take.

    `order` [B L] indexes the keys of all samples: the kept ones first, in their order, then the masked ones. `places`
    is the inverse permutation. `kept` [B L] is true for the kept keys, in the new order. The number of rows does not
    depend on the mask, so the host never waits for the device; the masked keys come after the last offset.
    """

    order: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor
    query_offsets: torch.Tensor  # [B + 1], int32
    key_offsets: torch.Tensor


def pack_keys(mask_BL: torch.Tensor, queries: int) -> PackedKeys:
    flat = mask_BL.flatten()
    B, device = mask_BL.shape[0], mask_BL.device
    query_offsets = torch.arange(0, (B + 1) * queries, queries, dtype=torch.int32, device=device)
    key_offsets = F.pad(mask_BL.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    order = torch.argsort(~flat, stable=True)
    kept = torch.arange(len(flat), device=device) < key_offsets[-1]
    return PackedKeys(order, torch.argsort(order), kept, query_offsets, key_offsets)


class _Reordered(torch.autograd.Function):
    """x[order] for a permutation, with a gather as gradient. The gradient of `index_select` is an addition, which a
    permutation does not need and which deterministic algorithms on CUDA compute by sorting."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def prepare_mask(mask_BL: torch.Tensor | None, x_BSD: torch.Tensor, head_dim: int) -> torch.Tensor | PackedKeys | None:
    """The mask in the form that `attend` needs, computed once for all blocks."""
    if mask_BL is None or _backend(x_BSD, head_dim) == "sdpa":
        return mask_BL
    return pack_keys(mask_BL, x_BSD.shape[1])


def attend(
    q_BSNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, mask: torch.Tensor | PackedKeys | None
) -> torch.Tensor:
    """softmax(q k / sqrt(H)) v over the keys that `mask` keeps: [B, S, N, H]."""
    backend = _backend(q_BSNH, q_BSNH.shape[-1])
    if backend == "sdpa":
        assert not isinstance(mask, PackedKeys), "a mask prepared for packed keys"
        return _sdpa(q_BSNH, k_BLKH, v_BLKH, mask)
    q_BSNH, k_BLKH = q_BSNH.to(v_BLKH.dtype), k_BLKH.to(v_BLKH.dtype)
    if mask is None:
        return _dense(backend, q_BSNH, k_BLKH, v_BLKH)
    keys = mask if isinstance(mask, PackedKeys) else pack_keys(mask, q_BSNH.shape[1])
    # Zeros in place of the masked keys also stop their gradients, which the kernels leave unwritten.
    k, v = (
        torch.where(keys.kept[:, None, None], _Reordered.apply(x.flatten(0, 1), keys.order, keys.places), 0)
        for x in (k_BLKH, v_BLKH)
    )
    out = _packed(backend, q_BSNH.flatten(0, 1), k, v, keys, q_BSNH.shape[1], k_BLKH.shape[1])
    return out.view(q_BSNH.shape)


def _dense(backend: str, q_BSNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor) -> torch.Tensor:
    if backend == "varlen":  # without a mask SDPA runs the same kernel
        return _sdpa(q_BSNH, k_BLKH, v_BLKH, None)
    deterministic = torch.are_deterministic_algorithms_enabled()  # False: the backward adds in any order
    return _first(_packages[backend].flash_attn_func(q_BSNH, k_BLKH, v_BLKH, deterministic=deterministic))


def _packed(backend: str, q_RNH, k_RKH, v_RKH, keys: PackedKeys, S: int, L: int) -> torch.Tensor:
    """R rows of all samples. PyTorch's kernel checks the global flag for determinism."""
    module = _packages[backend]
    if backend == "varlen":
        return module.varlen_attn(q_RNH, k_RKH, v_RKH, keys.query_offsets, keys.key_offsets, S, L, **_varlen_options)
    out = module.flash_attn_varlen_func(
        q_RNH,
        k_RKH,
        v_RKH,
        cu_seqlens_q=keys.query_offsets,
        cu_seqlens_k=keys.key_offsets,
        max_seqlen_q=S,
        max_seqlen_k=L,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _first(out)


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Early releases of flash-attn 3 return the log-sum-exp as well."""
    return out[0] if isinstance(out, tuple) else out


def _sdpa(q_BSNH, k_BLKH, v_BLKH, mask_BL) -> torch.Tensor:
    N, K = q_BSNH.shape[2], k_BLKH.shape[2]
    k, v = k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2)
    mask = None if mask_BL is None else mask_BL[:, None, None]
    # Only PyTorch's flash kernels on an accelerator take grouped heads: half precision, and no mask.
    takes_groups = mask is None and q_BSNH.device.type != "cpu" and product_dtype(q_BSNH) in HALF
    if N == K or takes_groups:
        q = q_BSNH.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=N != K).transpose(1, 2)
    # Elsewhere the queries of a group become rows of one head: the other kernels would repeat the keys, or fall back to
    # plain products. On a CPU the products get larger.
    rows_BKRH = q_BSNH.unflatten(2, (K, N // K)).transpose(1, 2).flatten(2, 3)
    out = F.scaled_dot_product_attention(rows_BKRH, k, v, attn_mask=mask)
    return out.unflatten(2, (-1, N // K)).transpose(1, 2).flatten(2, 3)


class RMSNorm(nn.Module):
    """RMS norm with a weight; statistics in fp32, as diffusers' RMSNorm."""

    def __init__(self, dim: int, eps: float = EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalise(x) * self.weight

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """`x` normalised but not yet multiplied by the weight; in the weight's dtype."""
        x_float = x.float()
        return (x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)).to(self.weight.dtype)


class Attention(nn.Module):
    """Projections and norms under the names of diffusers' `Attention`.

    `norm_added_q` is never used (text has no queries). diffusers creates it and stores it, so it exists here, frozen.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        kv_dim = kv_heads * head_dim
        self.norm_q = RMSNorm(head_dim)
        self.norm_k = RMSNorm(head_dim)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_dim, bias=False)
        self.to_v = nn.Linear(width, kv_dim, bias=False)
        self.add_k_proj = nn.Linear(width, kv_dim, bias=False)
        self.add_v_proj = nn.Linear(width, kv_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width, bias=False)])
        self.norm_added_q = RMSNorm(head_dim)
        self.norm_added_q.requires_grad_(False)
        self.norm_added_k = RMSNorm(head_dim)

    def text_kv(self, keys_values: torch.Tensor, table_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [B, T, K, H] of the text from its two projections, concatenated: `keys_values` [B, T, 2KH]."""
        k_BTKH, v_BTKH = keys_values.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        return norm_rope(k_BTKH, self.norm_added_k.weight, table_text, EPS), v_BTKH

    def forward(
        self,
        x_BSD: torch.Tensor,
        text_k_BTKH: torch.Tensor,
        text_v_BTKH: torch.Tensor,
        table_image: torch.Tensor,
        mask: torch.Tensor | PackedKeys | None,
    ) -> torch.Tensor:
        """Attention output [B, S, D].

        Args:
            mask: from `prepare_mask`, or a boolean [B, S + T], true for the keys that queries attend to.
        """
        # One product for the three projections; the parameters stay separate, under diffusers' names.
        weight = torch.cat((self.to_q.weight, self.to_k.weight, self.to_v.weight))
        qkv = F.linear(x_BSD, weight).unflatten(-1, (-1, self.head_dim))
        qk, v_BSKH = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        norms = torch.cat(
            (
                self.norm_q.weight.expand(self.heads, self.head_dim),
                self.norm_k.weight.expand(self.kv_heads, self.head_dim),
            )
        )
        q_BSNH, k_BSKH = norm_rope(qk, norms, table_image, EPS).split((self.heads, self.kv_heads), dim=-2)
        S, keys = q_BSNH.shape[1], k_BSKH.shape[1] + text_k_BTKH.shape[1]
        if x_BSD.device.type == "cpu" and S * keys * (self.heads // self.kv_heads) <= PLAIN_SCORES:
            k = torch.cat((k_BSKH.transpose(1, 2), text_k_BTKH.transpose(1, 2)), dim=2)
            v = torch.cat((v_BSKH.transpose(1, 2), text_v_BTKH.transpose(1, 2)), dim=2)
            out = self._plain(q_BSNH, k, v, mask)
        else:
            k_BLKH, v_BLKH = torch.cat((k_BSKH, text_k_BTKH), dim=1), torch.cat((v_BSKH, text_v_BTKH), dim=1)
            out = attend(q_BSNH, k_BLKH, v_BLKH, mask).flatten(2)
        return self.to_out[0](out)

    def _plain(self, q_BSNH, k, v, mask) -> torch.Tensor:
        B, S, N, H = q_BSNH.shape
        K = self.kv_heads
        # The queries of one group are rows of the same product: [B K, G S, H] x [B K, H, S + T].
        q = q_BSNH.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).reshape(B * K, N // K * S, H)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        scale = H**-0.5
        if mask is None:
            scores = torch.bmm(q, k.transpose(1, 2)) * scale
        else:
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
            bias = bias[:, None, None].expand(-1, K, -1, -1).flatten(0, 1)
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        out = torch.bmm(torch.softmax(scores, dim=-1), v)
        return out.unflatten(0, (B, K)).unflatten(2, (N // K, S)).permute(0, 3, 1, 2, 4).reshape(B, S, N * H)
