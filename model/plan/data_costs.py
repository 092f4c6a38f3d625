"""Cost of the training data, for a corpus of any size: bytes, objects, requests, and GPU-hours of the encoders.

    captions --text encoder--> hidden states, stored once ("stored") or computed in every step ("online")
    images   --VAE-----------> latents of the images that each stage draws

All numbers follow from shapes and counts; none is measured. TB is 1e12 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.config import StageConfig
from model.constants import VAE_SCALE

BF16 = 2
LATENT_CHANNELS = 16
ROWS_PER_FILE, TEXT_FILE_BYTES = 4096, 256 << 20  # limits of the file format (model/data/files.py)
PARTS_TABLES = 4  # small files of a part: its tables, meta.json and manifest
INDEX_BYTES_PER_IMAGE = 4 + 4 + 1 + 4 + 8  # place, CRC, tier, order by tier, first caption (model/data/index.py)
INDEX_BYTES_PER_CAPTION = 4 + 2 + 4 + 4  # bytes per caption: reference; tokens, begin and CRC of its text
# FLOPs per pixel of the encoder of AutoencoderKLQwenImage at its defaults (base_dim 96, dim_mult 1 2 4 4, 2 residual
# blocks) on one frame, as PyTorch's FLOP counter counts them (a test compares).
VAE_FLOPS_PER_PIXEL = 2_326_496


@dataclass(frozen=True)
class Corpus:
    """Size of the corpus to encode. Counts default to the paper's; tokens and bytes are assumptions."""

    images: float = 700e6
    captions: float = 1.5e9
    caption_tokens: float = 140.0  # mean tokens of a caption of about 100 words and its end-of-turn; assumed
    prefix_tokens: float = 70.0  # tokens of the 45-word system message and the chat format; assumed
    image_bytes: float = 300e3  # mean size of an original image file; assumed
    shards: int = 70_000

    def check(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")


@dataclass(frozen=True)
class TextEncoder:
    """A decoder-only text encoder, run up to the layer of one hidden state. Defaults: Qwen3-VL-8B's config.json, state -8."""

    layers: int = 29  # of 36: 37 states, counted from the end
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 12288

    @property
    def parameters(self) -> int:
        """Parameters of the layers that run. The embedding table stays on the host and is not counted."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.hidden)

    def flops(self, tokens: float, prefix: float) -> float:
        """FLOPs for `tokens` after a prefix with cached keys and values: matrix products and attention."""
        attention = 4 * self.layers * tokens * (prefix + tokens / 2) * self.heads * self.head_dim
        return 2 * self.parameters * tokens + attention


@dataclass(frozen=True)
class Prices:
    """Assumed prices: list prices of a large cloud's object storage, and a default for a GPU-hour."""

    tb_month: float = 23.0
    million_reads: float = 0.4
    gpu_hour: float = 2.5


def data_costs(
    stages: Sequence[StageConfig],
    corpus: Corpus,
    *,
    gpu_flops: float,
    training_days: float,
    gpus: int,
    text_width: int,
    text_mfu: float = 0.35,
    vae_mfu: float = 0.15,
    prices: Prices | None = None,
    encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """The data costs of a plan, as plain numbers (bytes, seconds, GPU-hours and the prices' currency).

    Args:
        gpu_flops: bf16 peak of one GPU, in FLOP/s. `text_mfu` and `vae_mfu` are the shares of it that the encoders reach.
            The VAE runs in fp32, for which tensor cores reach half the bf16 rate at best.
        training_days: how long stored data must be kept.
        text_width: width of the text encoder's hidden states.

    Raises:
        ValueError: a count or share is out of range.
    """
    corpus.check()
    if not (0 < text_mfu <= 1 and 0 < vae_mfu <= 1):
        raise ValueError(f"text_mfu={text_mfu} and vae_mfu={vae_mfu} must be in (0, 1]")
    prices, encoder = prices or Prices(), encoder or TextEncoder()
    drawn = [_stage_costs(stage, corpus, gpu_flops * vae_mfu) for stage in stages]
    samples = sum(stage["samples"] for stage in drawn)
    months = training_days / 30
    text_bytes = corpus.caption_tokens * text_width * BF16
    a_text = encoder.flops(corpus.caption_tokens, corpus.prefix_tokens) / (gpu_flops * text_mfu) / 3600
    stored_hours, online_hours = corpus.captions * a_text, samples * a_text
    stored = {
        "bytes": corpus.captions * text_bytes,
        "objects": corpus.shards * PARTS_TABLES + corpus.captions * text_bytes / TEXT_FILE_BYTES,
        "reads": samples,
        "bytes_read": samples * text_bytes,
        "bytes_per_s": samples * text_bytes / (training_days * 86400),
        "gpu_hours": stored_hours,
        "memory_bytes_per_gpu": 0,
        "cost": stored_hours * prices.gpu_hour
        + corpus.captions * text_bytes / 1e12 * prices.tb_month * months
        + samples / 1e6 * prices.million_reads,
    }
    ids = corpus.caption_tokens * 4
    online = {
        "bytes": corpus.captions * ids,
        "objects": corpus.shards * PARTS_TABLES + corpus.captions * ids / TEXT_FILE_BYTES,
        "reads": samples,
        "bytes_read": samples * ids,
        "bytes_per_s": samples * ids / (training_days * 86400),
        "gpu_hours": online_hours,
        "memory_bytes_per_gpu": encoder.parameters * BF16,
        "cost": online_hours * prices.gpu_hour
        + corpus.captions * ids / 1e12 * prices.tb_month * months
        + samples / 1e6 * prices.million_reads,
    }
    padded = corpus.captions * (corpus.prefix_tokens + 330) * text_width * BF16
    return {
        "corpus": asdict(corpus),
        "prices": asdict(prices),
        "assumed": {"text_mfu": text_mfu, "vae_mfu": vae_mfu},
        "stages": drawn,
        "latents_bytes": sum(stage["bytes"] for stage in drawn),
        "vae_gpu_hours": sum(stage["gpu_hours"] for stage in drawn),
        "texts": {"stored": stored, "online": online, "padded_bytes": padded},
        "better": "stored" if stored["cost"] <= online["cost"] else "online",
        "index_bytes": corpus.images * INDEX_BYTES_PER_IMAGE + corpus.captions * INDEX_BYTES_PER_CAPTION,
        "gpus": gpus,
    }


def _stage_costs(stage: StageConfig, corpus: Corpus, flops_per_s: float) -> dict[str, Any]:
    """Costs of one stage, as if all images were square and all tiers had equal weights."""
    samples = stage.steps * stage.batch_size
    images = min(corpus.images, samples)
    size = LATENT_CHANNELS * (stage.image_size_px // VAE_SCALE) ** 2 * BF16
    files = max(corpus.shards * len(stage.aspect_ratios), images / ROWS_PER_FILE)
    return {
        "stage": stage.name,
        "samples": samples,
        "images": images,
        "bytes": images * size,
        "objects": corpus.shards * PARTS_TABLES + files,
        "reads": samples,
        "bytes_read": samples * size,
        "originals_read": images * corpus.image_bytes,
        "gpu_hours": images * VAE_FLOPS_PER_PIXEL * stage.image_size_px**2 / flops_per_s / 3600,
    }


def render(costs: dict[str, Any], planned: Sequence[dict[str, Any]], chosen: str | None) -> list[str]:
    """The data costs as text.

    Args:
        planned: the plan's stages; an online encoder must fit into the memory that they leave.
        chosen: the recipe's encoding.text, if it has one.
    """
    corpus, texts, prices = costs["corpus"], costs["texts"], costs["prices"]
    lines = [
        f"data: {corpus['images']:,.0f} images, {corpus['captions']:,.0f} captions of {corpus['caption_tokens']:g} tokens "
        f"after a prefix of {corpus['prefix_tokens']:g} (assumed), {corpus['shards']:,} shards",
    ]
    for stage in costs["stages"]:
        share = stage["images"] / corpus["images"]
        lines.append(
            f"  latents of {stage['stage']}: {stage['samples']:,.0f} samples draw {stage['images']:,.0f} images "
            f"({share:.1%}): {_tb(stage['bytes'])} in {stage['objects']:,.0f} objects, "
            f"{_tb(stage['originals_read'])} of originals read, {stage['gpu_hours']:,.0f} GPU-hours of VAE; training reads "
            f"{_tb(stage['bytes_read'])} in {stage['reads']:,.0f} requests if it streams"
        )
    for name in ("stored", "online"):
        text = texts[name]
        lines.append(
            f"  texts {name}: {_tb(text['bytes'])} in {text['objects']:,.0f} objects, {text['gpu_hours']:,.0f} GPU-hours of "
            f"text encoder, {_tb(text['bytes_read'])} read in training ({text['bytes_per_s'] / 1e9:,.2f} GB/s, "
            f"{text['bytes_per_s'] / costs['gpus'] / 1e6:,.1f} MB/s per GPU), {text['memory_bytes_per_gpu'] / 1e9:,.1f} GB "
            f"per GPU in addition to the model: cost {text['cost']:,.0f}"
        )
    memory = texts["online"]["memory_bytes_per_gpu"]
    for stage in planned:
        total, usable = stage["memory_bytes"]["peak"] + memory, stage["usable_bytes"]
        lines.append(
            f"    online in {stage['stage']}: {total / 1e9:,.2f} GB of {usable / 1e9:,.2f} GB usable: "
            f"{'fits' if total <= usable else 'DOES NOT FIT: lower train.local_batch_size'}"
        )
    ours = f"; the recipe has encoding.text: {chosen}" if chosen else ""
    lines += [
        f"  at {prices['gpu_hour']:g} per GPU-hour, {prices['tb_month']:g} per TB-month and {prices['million_reads']:g} per "
        f"million reads (assumed): {costs['better']} texts cost less{ours}",
        f"  online adds {texts['online']['gpu_hours'] / costs['gpus'] / 24:,.1f} days to training; stored adds "
        f"{texts['stored']['gpu_hours'] / costs['gpus'] / 24:,.1f} days before it, on the same number of GPUs",
        f"  (stored with a prefix each and padded to 330 tokens, texts would take {_tb(texts['padded_bytes'])})",
        f"  index: {costs['index_bytes'] / 1e9:,.1f} GB of each node's disk for all images, shared by its ranks",
    ]
    return lines


def _tb(size: float) -> str:
    return f"{size / 1e12:,.2f} TB"
