"""Attention of image queries over image and text keys and values, with grouped heads, QK norm and RoPE.

Shape suffixes: B batch, S image tokens, T text tokens, D width, J text width, N query heads, K key-value
heads, G = N / K query heads per key-value head, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.cpu_ops import norm_rope

EPS = 1e-6
# Under this many scores per head, plain batched products beat PyTorch's blocked CPU kernel (about twice at
# 16 x 32, forward and backward; benchmarks/train_step.py).
PLAIN_SCORES = 16384


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
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`mask`: None, or boolean [B, S + T], True where a query may look. Returns [B, S, D]."""
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
        k = torch.cat((k_BSKH.transpose(1, 2), text_k_BTKH.transpose(1, 2)), dim=2)
        v = torch.cat((v_BSKH.transpose(1, 2), text_v_BTKH.transpose(1, 2)), dim=2)
        S, keys = q_BSNH.shape[1], k.shape[2]
        if x_BSD.device.type == "cpu" and S * keys * (self.heads // self.kv_heads) <= PLAIN_SCORES:
            out = self._plain(q_BSNH, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(
                q_BSNH.transpose(1, 2),
                k,
                v,
                attn_mask=None if mask is None else mask[:, None, None],
                enable_gqa=self.heads != self.kv_heads,
            ).transpose(1, 2)
            out = out.flatten(2)
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
