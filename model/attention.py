"""Attention of image queries over image and text keys and values, with grouped heads, QK norm and RoPE.

The implementation is chosen here (`choose_backend`), for the whole process: flash-attn 3 or 2 where the package is
installed and the card, type and head dim allow it, else PyTorch's. None repeats key-value heads in memory.

Shape suffixes: B batch, S image tokens, T text tokens, L = S + T keys, D width, J text width, N query heads, K
key-value heads, G = N / K query heads per key-value head, H head dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.elementwise import norm_rope

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "sdpa", "flash2", "flash3"]
PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface"}  # modules of flash-attn 2 and 3
MAX_FLASH_HEAD_DIM = 256

EPS = 1e-6
# Under this many scores per head, plain batched products beat PyTorch's blocked CPU kernel (about twice at
# 16 x 32, forward and backward; benchmarks/train_step.py).
PLAIN_SCORES = 16384


_choice: AttentionBackend = "auto"
_packages: dict[str, ModuleType] = {}  # by backend; what is compiled reads them here, since it cannot import


class Machine(NamedTuple):
    """What the choice of a backend depends on, of the machine."""

    capability: tuple[int, int] | None  # of the CUDA device; None: there is none, or the tensors are not on it
    modules: frozenset[str]  # of PACKAGES, those that are installed


@functools.cache
def _machine(device_type: str, index: int | None) -> Machine:
    capability = torch.cuda.get_device_capability(index) if device_type == "cuda" else None
    return Machine(capability, frozenset(m for m in PACKAGES.values() if importlib.util.find_spec(m)))


def lacking(backend: AttentionBackend, machine: Machine) -> list[str]:
    """What the machine lacks for `backend`; empty if it has all."""
    if backend not in PACKAGES:
        return []
    lacks = []
    if PACKAGES[backend] not in machine.modules:
        lacks.append(f"the module {PACKAGES[backend]} (package flash-attn{' 3' if backend == 'flash3' else ''})")
    wanted = "compute capability 9.0 (Hopper)" if backend == "flash3" else "compute capability 8.0 or higher"
    if machine.capability is None:
        lacks.append(f"a CUDA device of {wanted}")
    elif (machine.capability[0] != 9) if backend == "flash3" else (machine.capability < (8, 0)):
        lacks.append(f"{wanted}, not {'.'.join(map(str, machine.capability))}")
    return lacks


def choose_backend(
    wanted: AttentionBackend, machine: Machine, dtype: torch.dtype, head_dim: int
) -> tuple[Literal["sdpa", "flash2", "flash3"], str]:
    """The backend, and why no faster one. A key mask decides nothing: flash-attn takes the keys packed then.

    Raises:
        ValueError: a flash backend is asked for by name, and machine, type or head dim do not allow it.
    """
    if wanted == "sdpa":
        return "sdpa", "asked for"
    unfit = []
    if dtype not in (torch.bfloat16, torch.float16):
        unfit.append(f"bfloat16 or float16 tensors, not {str(dtype).removeprefix('torch.')}")
    if head_dim % 8 or head_dim > MAX_FLASH_HEAD_DIM:
        unfit.append(f"a head dim that is a multiple of 8 up to {MAX_FLASH_HEAD_DIM}, not {head_dim}")
    reasons = []
    for backend in ("flash3", "flash2") if wanted == "auto" else (wanted,):
        lacks = lacking(backend, machine) + unfit
        if not lacks:
            return backend, "; ".join(reasons)
        reasons.append(f"{backend} needs {' and '.join(lacks)}")
    if wanted != "auto":
        raise ValueError(f"attention_backend='{wanted}': {reasons[0]}; use 'auto' or 'sdpa'")
    return "sdpa", "; ".join(reasons)


def use_attention(choice: AttentionBackend) -> None:
    """Chooses the backend for the whole process; "auto" is what holds before any call.

    Raises:
        ValueError: an unknown name, or one that this machine cannot run; the message says what is missing.
    """
    global _choice
    if choice not in get_args(AttentionBackend):
        raise ValueError(f"attention_backend={choice!r} must be one of {', '.join(get_args(AttentionBackend))}")
    lacks = lacking(choice, _machine("cuda" if torch.cuda.is_available() else "cpu", None))
    if lacks:
        raise ValueError(f"attention_backend='{choice}' needs {' and '.join(lacks)}; use 'auto' or 'sdpa' here")
    _choice = choice


def _import(backend: str) -> None:
    if backend in PACKAGES and backend not in _packages:
        _packages[backend] = importlib.import_module(PACKAGES[backend])


def flash_backend() -> Literal["flash2", "flash3"] | None:
    """The flash-attn that this process chooses for tensors that it takes, imported; None: it chooses none."""
    machine = _machine("cuda" if torch.cuda.is_available() else "cpu", None)
    backend, _ = choose_backend(_choice, machine, torch.bfloat16, MAX_FLASH_HEAD_DIM)
    _import(backend)
    return backend if backend in PACKAGES else None


@functools.cache
def _decide(wanted: AttentionBackend, device_type: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    """The backend for such tensors; cached, so that its reason is logged once."""
    backend, reason = choose_backend(wanted, _machine(device_type, index), dtype, head_dim)
    _import(backend)
    if device_type == "cuda":
        logger.info("attention runs on %s%s", backend, f" ({reason})" if reason else "")
    return backend


@torch.compiler.assume_constant_result
def _chosen(wanted: AttentionBackend, device_type: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    """The same, which a compiler calls instead of reading it."""
    return _decide(wanted, device_type, index, dtype, head_dim)


def _backend(x: torch.Tensor, head_dim: int) -> str:
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    return _chosen(_choice, device, x.device.index, dtype, head_dim)


class PackedKeys(NamedTuple):
    """A key mask as flash-attn's "varlen" functions take it.

    `order` lists the keys [B L] of all samples, those that the mask leaves first and in their order; `places` is its
    inverse: where each key is listed. `kept` says which of the listed ones the mask leaves. Nothing here waits for the
    device: there are as many rows as keys, and the last ones, which the mask drops, lie beyond the offsets.
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
    """x[order], whose gradient is a gather as well. That of `index_select` adds up, which a permutation does not need,
    and by a sort where PyTorch is asked for one order on CUDA."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def prepare_mask(mask_BL: torch.Tensor | None, x_BSD: torch.Tensor, head_dim: int) -> torch.Tensor | PackedKeys | None:
    """What every block's attention needs of the mask, once for all blocks."""
    if mask_BL is None or _backend(x_BSD, head_dim) == "sdpa":
        return mask_BL
    return pack_keys(mask_BL, x_BSD.shape[1])


def attend(
    q_BSNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, mask: torch.Tensor | PackedKeys | None
) -> torch.Tensor:
    """softmax(q k / sqrt(H)) v over the keys that `mask` leaves: [B, S, N, H]."""
    backend = _backend(q_BSNH, q_BSNH.shape[-1])
    if backend == "sdpa":
        assert not isinstance(mask, PackedKeys), "a mask prepared for flash-attn"
        return _sdpa(q_BSNH, k_BLKH, v_BLKH, mask)
    module = _packages[backend]
    q_BSNH, k_BLKH = q_BSNH.to(v_BLKH.dtype), k_BLKH.to(v_BLKH.dtype)
    deterministic = torch.are_deterministic_algorithms_enabled()  # else its backward adds up in any order
    if mask is None:
        out = module.flash_attn_func(q_BSNH, k_BLKH, v_BLKH, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out  # early releases of 3 return the log-sum-exp as well
    S, L = q_BSNH.shape[1], k_BLKH.shape[1]
    keys = mask if isinstance(mask, PackedKeys) else pack_keys(mask, S)
    # Zeros in place of the dropped keys also stop their gradients, which flash-attn leaves unwritten.
    k, v = (
        torch.where(keys.kept[:, None, None], _Reordered.apply(x.flatten(0, 1), keys.order, keys.places), 0)
        for x in (k_BLKH, v_BLKH)
    )
    out = module.flash_attn_varlen_func(
        q_BSNH.flatten(0, 1),
        k,
        v,
        cu_seqlens_q=keys.query_offsets,
        cu_seqlens_k=keys.key_offsets,
        max_seqlen_q=S,
        max_seqlen_k=L,
        deterministic=deterministic,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.view(q_BSNH.shape)


def _sdpa(q_BSNH, k_BLKH, v_BLKH, mask_BL) -> torch.Tensor:
    N, K = q_BSNH.shape[2], k_BLKH.shape[2]
    k, v = k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2)
    mask = None if mask_BL is None else mask_BL[:, None, None]
    if N == K or (mask is None and q_BSNH.device.type != "cpu"):
        q = q_BSNH.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=N != K).transpose(1, 2)
    # The queries of a group become rows of the same head, so that keys are not repeated: on CUDA, PyTorch's flash kernel
    # takes no mask, and its memory-efficient one no grouped heads; on a CPU its products are larger ones.
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
        """Without the weight; same type as the weight."""
        x_float = x.float()
        return (x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)).to(self.weight.dtype)


class Attention(nn.Module):
    """Projections and norms under the names of diffusers' `Attention`.

    `norm_added_q` has no use (text has no queries): diffusers creates it, so checkpoints hold it. It is frozen.
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
        """Key and value [B, T, K, H] of text whose two projections side by side are `keys_values` [B, T, 2KH]."""
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
        """`mask`: None, or boolean [B, S + T], True where a query may look, or of `prepare_mask`. Returns [B, S, D]."""
        # One product for the three projections; the parameters stay apart under diffusers' names.
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
