"""The `components` and `encoding` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from model.config import SUBFOLDER, Fraction, ImageSize, Positive, Section, Seed
from model.constants import PIPELINE_TEXT_STATE
from model.names import COMMIT


class HubComponent(Section):
    """A pinned model of the Hugging Face Hub. `revision` is a commit, not a branch.

    `repo_id` is ORG/NAME, or a local directory that begins with ./ or /, whose files are copied unchanged.
    """

    repo_id: Annotated[str, Field(pattern=r"^(\.?/.*|[\w.-]+/[\w.-]+)$")]
    revision: Annotated[str, Field(pattern=f"^{COMMIT.pattern}$")]
    subfolder: Annotated[str, Field(pattern=rf"^{SUBFOLDER}$")] | None = None

    @property
    def is_local(self) -> bool:
        """Only ./ and / mark a directory, so that a local directory named ORG/NAME cannot replace a repository."""
        return self.repo_id.startswith(("./", "/"))


class TinyVAEConfig(Section):
    """A small `AutoencoderKLQwenImage` trained on the curated corpus. Three temporal stages fix its downsampling to 8x."""

    base_dim: Positive = 8
    z_dim: Positive = 16
    dim_mult: tuple[Positive, ...] = (1, 2, 4, 8)
    num_res_blocks: Positive = 1
    steps: Positive = 900
    batch_size: Positive = 8  # full images of image_size_px; batches of halved or cropped views have twice as many
    image_size_px: ImageSize = 64
    aspect_ratios: tuple[str, ...] = ("1:1", "4:3", "3:4")
    max_images: Positive = 8192  # decoded images in memory during training
    muon_lr: Annotated[float, Field(gt=0)] = 1e-2  # kernels of the inner layers
    lr: Annotated[float, Field(gt=0)] = 2e-3  # AdamW: every other parameter
    latent_std: Annotated[float, Field(gt=0)] = 1.0  # standard deviation of normalised latents; noise has 1
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3  # on nats per latent number; the MSE is over pixels in [-1, 1]

    @model_validator(mode="after")
    def _check(self) -> TinyVAEConfig:
        if len(self.dim_mult) != 4:
            raise ValueError(f"dim_mult={list(self.dim_mult)} must have 4 entries: 8x takes three halvings")
        return self


class TinyTextEncoderConfig(Section):
    """A small `Qwen3VLForConditionalGeneration` trained as a language model of the captions."""

    vocab_size: Positive = 512  # upper bound of the tokenizer
    words: tuple[str, ...] = ()  # always in the vocabulary; the corpus's most frequent words fill the rest
    hidden_size: Positive = 128
    intermediate_size: Positive = 256
    num_hidden_layers: Annotated[int, Field(ge=9)] = 10  # the pipeline's return_index -8 needs at least 9
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive = 2
    steps: Positive = 400
    batch_size: Positive = 32
    muon_lr: Annotated[float, Field(gt=0)] = 1.5e-2  # matrices of the layers
    lr: Annotated[float, Field(gt=0)] = 2e-3  # AdamW: embeddings and norms

    @model_validator(mode="after")
    def _check(self) -> TinyTextEncoderConfig:
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_size // self.num_attention_heads < 6:
            raise ValueError(
                f"hidden_size={self.hidden_size} / num_attention_heads={self.num_attention_heads} must be at least 6: "
                "positions have three axes"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        return self


class ComponentsConfig(Section):
    """Frozen VAE and text encoder: pinned ones from the Hub, or small ones of the same classes trained by the recipe."""

    kind: Literal["hub", "trained"]
    hub_vae: HubComponent | None = None
    hub_text_encoder: HubComponent | None = None
    vae: TinyVAEConfig | None = None
    text_encoder: TinyTextEncoderConfig | None = None
    min_psnr_db: float = 28.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> ComponentsConfig:
        required = ("hub_vae", "hub_text_encoder") if self.kind == "hub" else ("vae", "text_encoder")
        for name in required:
            if getattr(self, name) is None:
                raise ValueError(f"components of kind {self.kind!r} need the key {name!r}")
        return self


class EncodingConfig(Section):
    """How curated records are encoded into parts of latents and texts."""

    rows_per_file: Positive = 4096  # images per file of latents
    batch_size: Positive = 64  # images
    text_batch_size: Positive = 256
    # "stage": buckets have the stage's aspect ratios; an image that would lose more than max_crop_fraction to the nearest
    # one is rejected and listed in the ledger. "data": more aspect ratios (buckets.DATA_RATIOS); no image is rejected.
    shapes: Literal["stage", "data"] = "stage"
    max_crop_fraction: Fraction = 0.5
    # "stored": states of all captions are written to disk before training. "online": only tokens are stored, and the text
    # encoder runs in the training job. Losses are equal up to rounding; the planner compares the costs.
    text: Literal["stored", "online"] = "stored"
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    max_text_tokens: Positive = 1024
    hidden_state_index: Annotated[int, Field(lt=0)] = PIPELINE_TEXT_STATE
    max_groups: Positive = 2000  # maximum sub-tasks of a map task; each encodes the shards of one group
    concurrency: Annotated[int, Field(ge=0)] = 0  # sub-tasks that run at the same time; 0: no limit
    min_success_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0  # of groups; the ledger names shards of failed ones
