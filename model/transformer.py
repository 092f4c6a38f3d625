"""The Nucleus-Image transformer, with diffusers' parameter names and numerics.

    latents [B,S,64] -> img_in -> block x L -> norm_out (timestep) -> proj_out -> velocity (clean - noise)
                                    ^    ^
                       text K, V ---+    +--- timestep embedding: 2 scales and 2 gates, and the router

Source: diffusers 0.42.1, transformer_nucleusmoe_image.py, which is the reference for every number here.

Shape suffixes: B batch, S image tokens, T text tokens, D width, J text width, K key-value heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.elementwise import norm_modulate
from model.layers.attention import EPS, Attention, RMSNorm, prepare_mask, product_dtype
from model.layers.moe import Experts, MoE, Routing, SwiGLU
from model.layers.rope import ImageShape, image_shape, rope_tables

if TYPE_CHECKING:  # imports pydantic, which a container that only runs blocks may lack
    from model.config import TransformerConfig

TextKV = list[tuple[torch.Tensor, torch.Tensor]]  # key and value of each block
# Initial bias of the gates, tanh(0.5) = 0.46; see `NucleusTransformer.init_weights`.
GATE_INIT = 0.5


class TimestepEmbedding(nn.Module):
    """Sinusoids of 1000 t (cosines first), two layers, RMS norm: [B] in [0, 1] -> [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(width, 4 * width)
        self.timestep_embedder.linear_2 = nn.Linear(4 * width, width)
        self.norm = RMSNorm(width)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.width // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = 1000 * (timestep[:, None].float() * exponent.exp()[None])
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        if self.width % 2:
            waves = F.pad(waves, (0, 1))
        hidden = F.silu(self.timestep_embedder.linear_1(waves.to(dtype)))
        return self.norm(self.timestep_embedder.linear_2(hidden))


class OutputNorm(nn.Module):
    """LayerNorm, scaled and shifted by the timestep (diffusers' AdaLayerNormContinuous)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x_BSD: torch.Tensor, silu_time_BD: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(silu_time_BD).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=EPS), 1 + scale)


class Block(nn.Module):
    """Attention over image and text, then a dense or an MoE feed-forward, both gated by the timestep."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))
        self.encoder_proj = nn.Linear(config.joint_attention_dim, width)
        self.attn = Attention(width, config.num_attention_heads, config.kv_heads, config.attention_head_dim)
        self.moe_enabled = config.is_moe_layer(layer)
        self.img_mlp = (
            MoE(
                width,
                config.moe_intermediate_dim,
                config.num_experts,
                config.capacity_factor(layer),
                config.use_sigmoid,
                config.route_scale,
                config.routing,
            )
            if self.moe_enabled
            else SwiGLU(width, config.ffn_hidden(layer))
        )

    def text_kv(self, text_BTJ, text_weight_J, table_text) -> tuple[torch.Tensor, torch.Tensor]:
        """Text key and value [B, T, K, H] of this block from the normalised text and the norm's weight."""
        weight_kv = torch.cat((self.attn.add_k_proj.weight, self.attn.add_v_proj.weight))
        rows, (kv, width), text = text_BTJ.shape[0] * text_BTJ.shape[1], weight_kv.shape, text_BTJ.shape[2]
        if (
            product_dtype(text_BTJ) == torch.float32
            and rows * (text * width + width * kv - text * kv) > kv * width * text
        ):
            # Fuses three consecutive linear maps into one by multiplying their weights first. This is cheaper if the text
            # has many rows. Only in fp32, where the different rounding does not matter.
            weight = (weight_kv @ self.encoder_proj.weight) * text_weight_J
            keys_values = F.linear(text_BTJ, weight, weight_kv @ self.encoder_proj.bias)
        else:
            keys_values = F.linear(self.encoder_proj(text_BTJ * text_weight_J), weight_kv)
        return self.attn.text_kv(keys_values, table_text)

    def forward(
        self,
        x_BSD: torch.Tensor,
        time_BD: torch.Tensor,
        silu_time_BD: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        text_kv: tuple[torch.Tensor, torch.Tensor] | None,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """`text` is (normalised text, norm weight); `text_kv` replaces it when given."""
        table_image, table_text = tables
        modulation = self.img_mod[1](silu_time_BD).unsqueeze(1)
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        gate1, gate2 = gate1.clamp(-2.0, 2.0).tanh(), gate2.clamp(-2.0, 2.0).tanh()
        key, value = self.text_kv(*text, table_text) if text_kv is None else text_kv

        _, modulated = norm_modulate(x_BSD, scale1, EPS, want_normed=False)
        x_BSD = torch.addcmul(x_BSD, gate1, self.attn(modulated, key, value, table_image, mask))

        normed, modulated = norm_modulate(x_BSD, scale2, EPS, want_normed=self.moe_enabled)
        if self.moe_enabled:
            out, routing = self.img_mlp(modulated, normed, time_BD)
        else:
            out, routing = self.img_mlp(modulated), None
        x_BSD = torch.addcmul(x_BSD, gate2, out)
        if x_BSD.dtype == torch.float16:
            limits = torch.finfo(torch.float16)
            x_BSD = x_BSD.clip(limits.min, limits.max)
        return x_BSD, routing


class RouterTrace:
    """Collects the `Routing` of each MoE layer in one forward pass: `model(..., collect=trace)`. Keys are block indices."""

    def __init__(self) -> None:
        self.layers: dict[int, Routing] = {}

    def add(self, layer: int, routing: Routing) -> None:
        self.layers[layer] = routing

    def routings(self) -> list[Routing]:
        """Routing of each MoE layer, in order, with autograd graph (for the losses)."""
        return [self.layers[i] for i in sorted(self.layers)]

    def logits(self) -> list[torch.Tensor]:
        """Router logits [B, S, E] of each MoE layer, in order, with autograd graph (for the z-loss)."""
        return [routing.logits_BSE for routing in self.routings()]

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Statistics of the traced forward pass: means over the MoE layers and, as `layer03/...`, values of each layer.
        In training the pass is one rank's micro-batch. Synchronises with the device once.

        dropped: share of tokens that no expert took; experts_max: most experts that took one token; entropy: normalised
        entropy of a token's scores over the experts, 1 for uniform; logit_max: the largest absolute router logit.
        """
        if not self.layers:
            return {}
        statistics = []
        for routing in self.routings():
            E = routing.logits_BSE.shape[-1]
            taken = routing.taken_BSE().sum(dim=-1)
            shares = routing.scores_BSE.float()
            shares = shares / shares.sum(-1, keepdim=True)
            entropy = -(shares * shares.clamp_min(1e-20).log()).sum(-1).mean() / math.log(max(E, 2))
            largest = routing.logits_BSE.float().abs().max()
            statistics += [(taken == 0).float().mean(), taken.max().float(), entropy, largest]
        names = ("dropped", "experts_max", "entropy", "logit_max")
        rows = torch.stack(statistics).view(-1, len(names)).tolist()
        per_layer = {layer: dict(zip(names, row)) for layer, row in zip(sorted(self.layers), rows)}
        means = {key: sum(values[key] for values in per_layer.values()) / len(per_layer) for key in names}
        return means | {f"layer{i:02d}/{k}": v for i, values in per_layer.items() for k, v in values.items()}


Fill = Callable[[torch.Tensor], object]
OnWhole = Callable[[nn.Parameter, Fill], object]


def _in_place(parameter: nn.Parameter, fill: Fill) -> None:
    fill(parameter)


class NucleusTransformer(nn.Module):
    """`NucleusMoEImageTransformer2DModel` in plain PyTorch, with the same state dict, outputs and gradients."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.time_text_embed = TimestepEmbedding(width)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.norm_out = OutputNorm(width)
        out_channels = config.out_channels or config.in_channels
        self.proj_out = nn.Linear(width, config.patch_size**2 * out_channels, bias=False)
        if self.proj_out.weight.device.type != "meta":
            self.init_weights()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NucleusTransformer:
        """The model of diffusers' config.json. Keys that start with "_" are ignored.

        Raises:
            ValueError: an unknown key (the message names it) or an invalid value.
        """
        from model.config import TransformerConfig

        known = TransformerConfig.model_fields
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown transformer keys {', '.join(unknown)}; valid: {', '.join(sorted(known))}")
        return cls(TransformerConfig(**values))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, on_whole: OnWhole = _in_place) -> None:
        """Initialises all weights in place. Also initialises a model from the meta device after `to_empty`.

        `on_whole(parameter, fill)` calls `fill` with the full parameter. Sharded models pass another function: each rank
        then draws the full parameter and keeps its shard, so that a seed gives the same weights in every layout.

        Matrices are Xavier-uniform (each expert, gate and up separately), the timestep embedding N(0, 0.02), biases 0 and
        norms 1, as in DiT. The output projection is 0, so that the first prediction is 0. Modulation weights are 0, so
        that scales are 1 at every timestep. DiT also starts gates at 0, which makes every block the identity: the
        gradient of a block is then proportional to a gate that must grow first, while Muon, which normalises updates,
        amplifies noise. Here a gate is tanh of a clamped number, and a bias of 0.5 gives 0.46: every block contributes
        from the first step, and tanh is far from saturation. In a toy training (4 layers of width 64, two coloured cells
        named by text, 240 steps of Muon and AdamW, two seeds) the final loss was 0.159 and 0.166, against 0.176 and 0.177
        with gates at 0, and 0.176 and 0.154 at 1.
        """

        def xavier(fan_in: int, fan_out: int) -> Fill:
            return lambda weight: _xavier(weight, fan_in, fan_out, generator)

        def normal(weight: torch.Tensor) -> None:
            nn.init.normal_(weight, std=0.02, generator=generator)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                on_whole(module.weight, xavier(*reversed(module.weight.shape)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, TimestepEmbedding):
                for linear in (module.timestep_embedder.linear_1, module.timestep_embedder.linear_2):
                    on_whole(linear.weight, normal)
            elif isinstance(module, OutputNorm):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, SwiGLU):
                hidden2, width = module.net[0].proj.weight.shape
                on_whole(module.net[0].proj.weight, xavier(width, hidden2 // 2))
            elif isinstance(module, Experts):
                _, width, hidden2 = module.gate_up_proj.shape
                on_whole(module.gate_up_proj, xavier(width, hidden2 // 2))
                on_whole(module.down_proj, xavier(hidden2 // 2, width))
            elif isinstance(module, MoE):
                # Small logits: experts start nearly equal, so that routing can still change.
                on_whole(module.gate.weight, normal)
            elif isinstance(module, Block):
                nn.init.zeros_(module.img_mod[1].weight)
                on_whole(module.img_mod[1].bias, _open_gates)
        nn.init.zeros_(self.proj_out.weight)

    def set_capacity_factors(self, factors: float | Sequence[float]) -> None:
        """Sets the capacity factors (a number, or one per block). Does not change weights.

        Raises:
            ValueError: a wrong number of factors, or a factor outside (0, num_experts].
        """
        values = factors if isinstance(factors, (int, float)) else tuple(factors)
        self.config = self.config.with_capacity_factors(values)
        for layer, block in enumerate(self.transformer_blocks):
            if block.moe_enabled:
                block.img_mlp.capacity_factor = self.config.capacity_factor(layer)

    def text_kv(self, encoder_hidden_states: torch.Tensor, img_shapes: ImageShape | list[ImageShape]) -> TextKV:
        """Each block's text key and value [B, T, K, H]. They are equal at all denoising steps of one image shape."""
        shape = tuple(img_shapes[0] if isinstance(img_shapes, list) else img_shapes)
        text = self.txt_norm.normalise(encoder_hidden_states)
        _, table = rope_tables(self.config.axes_dims_rope, shape, text.shape[1], text.device)
        return [self.block_text_kv(block, text, table) for block in self.transformer_blocks]

    def block_text_kv(
        self, block: Block, text_BTJ: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The text key and value of one block, from the normalised text."""
        return block.text_kv(text_BTJ, self.txt_norm.weight, table)

    def forward(
        self,
        hidden_states: torch.Tensor,
        img_shapes: ImageShape | list[ImageShape],
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        *,
        text_kv: TextKV | None = None,
        collect: RouterTrace | None = None,
    ) -> torch.Tensor:
        """Predicted velocity, clean minus noise.

        Args:
            hidden_states: packed latents [B, S, in_channels].
            img_shapes: (1, rows, columns) in patches, or a list of equal ones.
            encoder_hidden_states: text [B, T, joint_attention_dim]; not needed with `text_kv`.
            encoder_hidden_states_mask: [B, T], true for real tokens; None if all are real.
            timestep: [B] in [0, 1], 1 is noise.
            text_kv: the result of `text_kv()`, instead of `encoder_hidden_states`.
            collect: records the routing of each MoE layer.

        Returns:
            [B, S, patch_size^2 * out_channels].
        """
        if timestep is None:
            raise ValueError("timestep is missing: a tensor [B] in [0, 1]")
        if encoder_hidden_states is None and text_kv is None:
            raise ValueError("give encoder_hidden_states or text_kv")
        B, S, _ = hidden_states.shape
        x_BSD = self.img_in(hidden_states)
        time_BD = self.time_text_embed(timestep.to(x_BSD.dtype), x_BSD.dtype)
        silu_time_BD = F.silu(time_BD)

        text = None
        if text_kv is None:
            text = (self.txt_norm.normalise(encoder_hidden_states), self.txt_norm.weight)
        text_tokens = text_kv[0][0].shape[1] if text is None else text[0].shape[1]
        mask = None
        if encoder_hidden_states_mask is not None:
            if encoder_hidden_states_mask.shape != (B, text_tokens):
                raise ValueError(
                    f"encoder_hidden_states_mask has shape {tuple(encoder_hidden_states_mask.shape)}, "
                    f"not (batch, text tokens) = {(B, text_tokens)}"
                )
            mask = F.pad(encoder_hidden_states_mask.bool(), (S, 0), value=True)
            mask = prepare_mask(mask, x_BSD, self.config.attention_head_dim)
        shape = image_shape(img_shapes, S)
        tables = rope_tables(self.config.axes_dims_rope, shape, text_tokens, x_BSD.device)

        for layer, block in enumerate(self.transformer_blocks):
            kv = None if text_kv is None else text_kv[layer]
            x_BSD, routing = block(x_BSD, time_BD, silu_time_BD, text, kv, tables, mask)
            if collect is not None and routing is not None:
                collect.add(layer, routing)
        return self.proj_out(self.norm_out(x_BSD, silu_time_BD))


def _open_gates(bias: torch.Tensor) -> None:
    bias.zero_()
    _, gate1, _, gate2 = bias.chunk(4)
    gate1.fill_(GATE_INIT)
    gate2.fill_(GATE_INIT)


def _xavier(weight: torch.Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound, generator=generator)
