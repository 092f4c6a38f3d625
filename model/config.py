"""Configuration of the model and of its training: the `model` and `train` sections of a recipe.

Every class is frozen and refuses unknown keys, so that a typing mistake in a recipe is one error that names
the key. The numbers are in recipes: no default here hides a value of the paper (comments in recipes/nucleus_17b.yaml
give sources).
"""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from model.names import COMMIT
from model.storage import check_path

TIERS = ("A1", "A2", "A3", "A4", "A5")  # quality of a curated image, best first

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
# 32 bits: every random number generator takes such a seed, and offsets added to it never overflow.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
SUBFOLDER = r"\w[\w.-]*(?:/\w[\w.-]*)*"  # names separated by /, none of them . or ..
INIT_FROM = re.compile(rf"[^@]+|[\w.-]+/[\w.-]+(?:/{SUBFOLDER})?@{COMMIT.pattern}")
ImageSize = Annotated[int, Field(gt=0, le=16384)]  # px
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

MoeStrategy = Literal[
    "leave_first_three_and_last_block_dense",
    "leave_first_three_blocks_dense",
    "leave_first_block_dense",
    "all_moe",
    "all_dense",
]


class Free:
    """Marks a setting of `TrainSettings` that may change between two attempts at one training.

    Such a setting decides how training is computed, stored or logged. Up to rounding, the trained weights do not depend
    on it.
    """


FREE = Free()


class Section(BaseModel):
    """Base of every recipe section: frozen, strict about keys and about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @classmethod
    @functools.cache
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """Cached: flytekit requests it for each input of each task, a third of the time of `pyflyte run --help`.
        Callers must not change it."""
        return super().model_json_schema(*args, **options)


class RoutingConfig(Section):
    """How the MoE layers route. The defaults are the released model; everything else is an ablation of it.

    kind: "expert_choice", each expert takes its top tokens; "token_choice", each token takes its top-k experts, with
        k the layer's capacity factor (then a whole number), so that the mean number of experts per token is equal;
        "dense", a SwiGLU in place of router and experts, as wide as the experts of a token
        (`TransformerConfig.ffn_hidden`).
    coupled: the router sees the modulated tokens, as the experts do, instead of the unmodulated ones.
    expert_limit: token choice only: an expert takes at most ceil(expert_limit k S / E) of a sample's S tokens, the
        highest scores first, and drops the others (the "capacity factor" of the Switch Transformer, arXiv
        2101.03961); None drops nothing.
    """

    kind: Literal["expert_choice", "token_choice", "dense"] = "expert_choice"
    coupled: bool = False
    expert_limit: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> RoutingConfig:
        if self.expert_limit is not None and self.kind != "token_choice":
            raise ValueError(f"expert_limit={self.expert_limit} is of kind 'token_choice', not of {self.kind!r}")
        if self.coupled and self.kind == "dense":
            raise ValueError("coupled=true needs a router, and kind 'dense' has none")
        return self


class TransformerConfig(Section):
    """The keys of diffusers' `NucleusMoEImageTransformer2DModel` config.json, with the released defaults' names.

    Source: diffusers 0.42.1, transformer_nucleusmoe_image.py. Width is heads x head dim. `routing` is this project's
    own, for ablations, which diffusers cannot load; its defaults are not written to config.json.
    """

    patch_size: Positive = 2
    in_channels: Positive = 64
    out_channels: Positive | None = None
    num_layers: Annotated[int, Field(gt=0, le=1024)] = 24
    attention_head_dim: Positive = 128
    num_attention_heads: Positive = 16
    num_key_value_heads: Positive | None = None
    joint_attention_dim: Positive = 3584
    axes_dims_rope: tuple[Positive, Positive, Positive] = (16, 56, 56)
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    moe_enabled: bool = True
    dense_moe_strategy: MoeStrategy = "leave_first_three_and_last_block_dense"
    num_experts: Positive = 128
    moe_intermediate_dim: Positive = 1344
    capacity_factors: float | tuple[float, ...] = 8.0
    use_sigmoid: bool = False
    route_scale: float = 2.5
    use_grouped_mm: bool = False
    routing: RoutingConfig = RoutingConfig()

    @model_serializer(mode="wrap")
    def _without_default_routing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = write(self)
        if not self.is_ablation:
            values.pop("routing", None)
        return values

    @property
    def is_ablation(self) -> bool:
        """Whether the model differs from diffusers' class, which then cannot load its weights."""
        return self.routing != RoutingConfig()

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dense_inner_dim(self) -> int:
        """Inner width of a dense block's SwiGLU (diffusers rounds down to a multiple of 128)."""
        return int(self.width * self.mlp_ratio * 2 / 3) // 128 * 128

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) routes."""
        return self.routing.kind != "dense" and self._is_sparse(layer)

    def _is_sparse(self, layer: int) -> bool:
        """Whether block `layer` routes in the released model; the rule of diffusers' `_is_moe_layer`."""
        if not self.moe_enabled or self.dense_moe_strategy == "all_dense":
            return False
        if self.dense_moe_strategy == "all_moe":
            return True
        if self.dense_moe_strategy == "leave_first_block_dense":
            return layer >= 1
        if self.dense_moe_strategy == "leave_first_three_blocks_dense":
            return layer >= 3
        return 3 <= layer < self.num_layers - 1

    def ffn_hidden(self, layer: int) -> int:
        """Inner width of the dense SwiGLU of block `layer`.

        Of kind "dense", it has as many weights as are active on a token in the MoE layer that it replaces. Each of E
        experts, of hidden width F and 3 D F weights, takes C = cf S / E of S tokens, so that on average E C / S = cf
        experts process a token, and the shared expert one more: 3 D F (cf + 1) = 3 D x, x = (cf + 1) F. The router's 2
        D E weights (1% of that in the 17B model) are not compensated for.
        """
        if not self._is_sparse(layer):
            return self.dense_inner_dim
        return round((self.capacity_factor(layer) + 1) * self.moe_intermediate_dim)

    def with_capacity_factors(self, factors: float | tuple[float, ...]) -> TransformerConfig:
        """The same model at a training stage's capacity factors.

        Of kind "dense" they determine the width of its layers, which no stage may change, so the model is returned
        unchanged.
        """
        if self.routing.kind == "dense":
            return self
        return TransformerConfig(**{**self.model_dump(), "capacity_factors": factors})

    def capacity_factor(self, layer: int) -> float:
        factors = self.capacity_factors
        return factors[layer] if isinstance(factors, tuple) else factors

    def capacity(self, layer: int, num_tokens: int) -> int:
        """Tokens that each expert of block `layer` takes of a sample with `num_tokens` image tokens."""
        return max(1, math.ceil(self.capacity_factor(layer) * num_tokens / self.num_experts))

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.kv_heads} must divide num_attention_heads={self.num_attention_heads}: "
                f"{self.num_attention_heads} = {self.num_attention_heads // self.kv_heads} x {self.kv_heads} + "
                f"{self.num_attention_heads % self.kv_heads}"
            )
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={list(self.axes_dims_rope)} must sum to attention_head_dim={self.attention_head_dim}"
            )
        if any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope={list(self.axes_dims_rope)} must be even numbers")
        if self.in_channels % self.patch_size**2:
            raise ValueError(f"in_channels={self.in_channels} must be a multiple of patch_size^2={self.patch_size**2}")
        factors = self.capacity_factors
        if isinstance(factors, tuple) and len(factors) != self.num_layers:
            raise ValueError(
                f"capacity_factors has {len(factors)} values; give one number or one for each of the {self.num_layers} layers"
            )
        # A dense layer's factor is never read: diffusers accepts any number there.
        moe_layers = [layer for layer in range(self.num_layers) if self._is_sparse(layer)]
        for value in dict.fromkeys(map(self.capacity_factor, moe_layers)):
            if not 0 < value <= self.num_experts:
                raise ValueError(
                    f"capacity factor {value} must be in (0, num_experts={self.num_experts}]: above it an expert "
                    "would take more tokens than there are"
                )
            if self.routing.kind == "token_choice" and value != int(value):
                raise ValueError(f"capacity factor {value} must be a whole number: with token choice, it is top-k")
        if any(not self._is_sparse(i) for i in range(self.num_layers)) and self.dense_inner_dim == 0:
            raise ValueError(
                f"width {self.width} x mlp_ratio {self.mlp_ratio} x 2/3 is under 128: the dense blocks would be empty"
            )
        return self


class OptimConfig(Section):
    """Muon for attention and expert matrices, AdamW for every other parameter; constant rate after warm-up (WSM), unless a
    stage has a `decay`.

    muon_scale: scale of an orthogonal update (`model.optim.update_scale`). "spectral", Muon's own, for rates of 1e-3 to
    1e-2; "rms", the size of AdamW's updates, so that one rate can serve both groups.
    """

    matrices: Literal["muon", "adamw"] = "muon"  # "adamw": AdamW, at adamw_lr, for every parameter
    muon_lr: Annotated[float, Field(gt=0)]
    adamw_lr: Annotated[float, Field(gt=0)]
    muon_momentum: Fraction = 0.95
    muon_ns_steps: Positive = 5
    muon_scale: Literal["spectral", "rms"] = "spectral"
    muon_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adamw_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    adamw_eps: Annotated[float, Field(gt=0)] = 1e-8
    adamw_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class LossConfig(Section):
    """Weight of each loss in addition to flow matching; 0 switches it off.

    A field's name is the name of its function in `model.losses` (`LOSSES`, or `AFTER_STEP` for functions that change
    weights after the optimiser step). docs/extending.md shows how to add one.
    """

    router_z_loss: Weight = 0.0
    router_orthogonality: Weight = 0.0
    load_balance: Weight = 0.0  # for token choice: expert choice is balanced by construction
    wavelet: Weight = 0.0  # only in stages with `StageConfig.wavelet`


class CaptionWeight(Section):
    """The weight of captions of a length, in tokens of the text encoder without the system message."""

    up_to_tokens: Positive
    weight: Weight


class DecayConfig(Section):
    """Learning rates fall linearly, over a stage's last `steps`, to `to` times the constant rate."""

    steps: Positive
    to: Fraction = 0.0


class GuidanceConfig(Section):
    """Over a stage's last `steps`, the model learns to predict the result of guidance (`model.losses.guidance`): of
    classifier-free guidance of `scale`, and of guidance of scale `autoguidance` away from the weights that the stage
    started from, a weaker model. It is then sampled without guidance, at a fraction of the cost. A scale of 1 is none."""

    steps: Positive
    scale: Annotated[float, Field(ge=1.0)]
    autoguidance: Annotated[float, Field(ge=1.0)] = 1.0

    @model_validator(mode="after")
    def _check_scales(self) -> GuidanceConfig:
        if self.scale == self.autoguidance == 1.0:
            raise ValueError("scale and autoguidance are 1, which is no guidance: set one above 1, or guidance: null")
        return self

    @property
    def forwards(self) -> int:
        """Forward passes of a step besides the one that is trained."""
        return (self.scale > 1.0) + (self.autoguidance > 1.0)


class StageConfig(Section):
    """One training stage: a resolution, a capacity factor, and a share of the steps."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    image_size_px: ImageSize
    steps: Positive
    batch_size: Positive  # global: all ranks and accumulation steps together
    capacity_factors: float | tuple[float, ...]
    aspect_ratios: tuple[str, ...] = ("1:1",)
    tier_weights: dict[str, Weight] = dict.fromkeys(TIERS, 1.0)
    bucket_weights: dict[str, Weight] = {}  # factors on images of `curation.buckets`; 1 for one that is not named
    caption_weights: tuple[CaptionWeight, ...] = ()  # ascending; the last also for longer captions. Empty: equal
    wavelet: bool = False  # whether the wavelet loss is on
    decay: DecayConfig | None = None  # None: a constant rate to the end (WSM)
    guidance: GuidanceConfig | None = None

    @model_validator(mode="after")
    def _check_ends(self) -> StageConfig:
        for name, end in (("decay", self.decay), ("guidance", self.guidance)):
            if end is not None and end.steps > self.steps:
                raise ValueError(f"{name}.steps={end.steps} must be at most the stage's steps={self.steps}")
        return self

    @field_validator("caption_weights")
    @classmethod
    def _check_lengths(cls, entries: tuple[CaptionWeight, ...]) -> tuple[CaptionWeight, ...]:
        lengths = [entry.up_to_tokens for entry in entries]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"up_to_tokens {lengths} must rise")
        return entries

    @property
    def needs_weaker_model(self) -> bool:
        """Whether some step guides away from the weights that the stage starts from."""
        return self.guidance is not None and self.guidance.autoguidance > 1.0

    def active_losses(self, losses: LossConfig) -> LossConfig:
        """The weights of this stage."""
        return losses if self.wavelet else losses.model_copy(update={"wavelet": 0.0})


class TimestepConfig(Section):
    """Logit-normal timesteps whose shift rises linearly with the number of image tokens; a share is uniform."""

    base_tokens: Positive = 256
    base_shift: float = 0.5
    max_tokens: Positive = 4096
    max_shift: float = 1.15
    uniform_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self) -> TimestepConfig:
        if self.max_tokens <= self.base_tokens:
            raise ValueError(f"max_tokens={self.max_tokens} must be above base_tokens={self.base_tokens}")
        return self


class SkipConfig(Section):
    """Which steps are skipped (model/train/guard.py): those whose loss or gradient is not finite and, with
    `spike_mads`, those whose loss is that many median absolute deviations above the median of the last `window_steps`.
    If `max_skipped` of the last `window_steps` are skipped, the run ends."""

    spike_mads: Annotated[float, Field(gt=0)] | None = None
    window_steps: Positive = 100
    max_skipped: Positive = 10

    @model_validator(mode="after")
    def _check(self) -> SkipConfig:
        if self.max_skipped > self.window_steps:
            raise ValueError(f"max_skipped={self.max_skipped} must be at most window_steps={self.window_steps}")
        return self


class TrainSettings(Section):
    """The `train` section of a recipe without its stages: the settings that all stages share."""

    seed: Seed = 0  # of the whole training; each stage derives its own (model.stages)
    optim: OptimConfig
    carry_optimizer: bool = (
        True  # a stage continues with the optimiser state and rate of the previous one, without warm-up
    )
    losses: LossConfig = LossConfig()
    timesteps: TimestepConfig = TimestepConfig()
    caption_dropout: Fraction = 0.1
    # Released weights that the first stage starts from: a transformer directory, or ORG/REPO[/SUBFOLDER]@COMMIT on the Hub.
    init_from: str | None = None
    # Most samples per rank and accumulation step; None: global batch / ranks.
    local_batch_size: Annotated[Positive | None, FREE] = None
    checkpoint_every_steps: Positive = 500
    keep_checkpoints: Positive = 16  # of the model alone, for merging
    keep_full_checkpoints: Annotated[Positive, FREE] = 2  # to resume from; 1 needs the least space
    async_checkpoint: Annotated[bool, FREE] = False  # written in the background while training continues
    # s3://bucket/prefix or a folder, for all runs; None: the run's own work_dir.
    checkpoint_uri: Annotated[str | None, FREE] = None
    skip: SkipConfig = SkipConfig()
    num_workers: Annotated[int, Field(ge=0), FREE] = 0  # threads of each rank that read batches ahead
    # "stream": each rank reads the rows of its batches from the store of the latents, instead of copying them all.
    latents: Annotated[Literal["download", "stream"], FREE] = "download"
    log_every_steps: Annotated[Positive, FREE] = 10
    sample_every_steps: Annotated[int, Field(ge=0)] = 0  # 0: no sample grids
    sample_prompts: tuple[str, ...] = ()
    nnodes: Annotated[Positive, FREE] = 1
    nproc_per_node: Annotated[Positive, FREE] = 1
    # How the ranks share the weights (model/ranks.py): replicas x shard ranks; -1: all remaining ranks.
    data_parallel_replicate: Annotated[Positive, FREE] = 1
    data_parallel_shard: Annotated[int, Field(ge=-1), FREE] = -1
    expert_parallel: Annotated[Positive, FREE] = 1  # of the shard ranks
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Annotated[bool, FREE] = False
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], FREE] = "none"
    # On a CUDA device: the same bits in each attempt, by algorithms that may be slower (not measured).
    deterministic: Annotated[bool, FREE] = True
    # On a CUDA device; "auto" takes the fastest that is installed and supported (model/layers/attention.py, model/kernels).
    attention_backend: Annotated[Literal["auto", "sdpa", "varlen", "flash2", "flash3"], FREE] = "auto"
    kernels: Annotated[Literal["auto", "torch", "triton"], FREE] = "auto"
    # If FSDP shards the model, torchtitan's DistMuon can update some matrices (model/train/parallel/dist_muon.py).
    muon_implementation: Annotated[Literal["nucleus", "torchtitan"], FREE] = "nucleus"

    @model_validator(mode="after")
    def _check_settings(self) -> TrainSettings:
        if self.init_from is not None and not INIT_FROM.fullmatch(self.init_from):
            raise ValueError(
                f"init_from={self.init_from!r} must be a directory, or ORG/REPO[/SUBFOLDER]@COMMIT with the 40 digits of "
                "a commit: a branch's weights change"
            )
        if self.checkpoint_uri is not None:
            try:
                check_path(self.checkpoint_uri)
            except ValueError as error:
                raise ValueError(f"checkpoint_uri: {error}") from None
        if self.data_parallel_shard == 0:
            raise ValueError("data_parallel_shard=0 must be 1 or more, or -1 for all remaining ranks")
        return self


FREE_KEYS = frozenset(name for name, field in TrainSettings.model_fields.items() if FREE in field.metadata)


class TrainConfig(TrainSettings):
    """The `train` section of a recipe."""

    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_stages(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, got {names}")
        first = self.stages[0]
        if first.needs_weaker_model:
            raise ValueError(
                f"stages[0].guidance.autoguidance={first.guidance.autoguidance} guides away from the weights of the stage "
                f"before, and {first.name} is the first stage: leave it out there, or set it in a later stage"
            )
        sizes = [stage.image_size_px for stage in self.stages]
        if sizes != sorted(sizes):
            raise ValueError(f"image_size_px must not fall from stage to stage, got {sizes}")
        return self


class MergeConfig(Section):
    """WSM merge of the last checkpoints of the last stage (arXiv 2507.17634)."""

    last_n: Positive = 16
