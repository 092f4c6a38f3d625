"""Curated records -> one stage's latent shards: VAE latents in aspect buckets, and text embeddings.

    curated ----+--> bucket-{W}x{H}/latents-*.safetensors   (posterior mean - latents_mean) / latents_std
    components -+--> text/text-*.safetensors                hidden state -8 of each distinct caption, row 0 is ""
                     index.parquet, meta.json (model/data/latents.py), texts.parquet, report.json

Only records of the train split are encoded. Stages of one corpus share their captions, so a later stage takes the
embeddings of an earlier one instead of computing them again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.encoding import curated
from tasks.encoding.buckets import Bucket, cropped_fraction, stage_buckets
from tasks.encoding.config import EncodingConfig

if TYPE_CHECKING:
    import torch

    from model.data.latents import LatentWriter

TEXTS = "texts.parquet"
TEXT_ROWS_PER_SHARD = 4096


class Stage(Protocol):
    """What of a training stage decides its latents."""

    image_size_px: int
    aspect_ratios: tuple[str, ...]


def encode_stage(
    curated_dir: str | Path,
    components_dir: str | Path,
    stage: Stage,
    encoding: EncodingConfig,
    out_dir: str | Path,
    text_from: str | Path | None = None,
) -> dict[str, Any]:
    """Fills `out_dir` with the latents of one stage, and returns the report.

    Args:
        text_from: latents directory of another stage. Its text embeddings are taken where they are of the same
            texts, text encoder and settings; otherwise they are computed.

    Raises:
        ValueError: nothing to train on, or settings that do not fit.
    """
    from model.data.latents import LatentMeta, LatentWriter

    curated_dir, components_dir, out_dir = Path(curated_dir), Path(components_dir), Path(out_dir)
    started = time.monotonic()
    table = curated.load_table(curated_dir)
    table = table[table["split"] == "train"].reset_index(drop=True)
    if table.empty:
        raise ValueError(f"{curated_dir} has no record of the train split")
    buckets = stage_buckets(stage.image_size_px, stage.aspect_ratios)

    texts = list(dict.fromkeys(["", *(text for captions in table["captions"] for text in captions)]))
    text_row = {text: i for i, text in enumerate(texts)}
    source = _TextSource(components_dir, encoding, texts, text_from)
    meta = LatentMeta(
        latent_channels=_latent_channels(components_dir),
        text_dim=source.dim,
        text_tokens=source.tokens,
        dtype=encoding.dtype,
        rows_per_shard=encoding.rows_per_shard,
        text_rows_per_shard=TEXT_ROWS_PER_SHARD,
    )
    with LatentWriter(out_dir, meta) as writer:
        for embeds in source:
            writer.add_text(embeds)
        source.write_texts(out_dir / TEXTS)
        report = _encode_images(curated_dir, components_dir, table, buckets, encoding, text_row, writer)
    report |= {
        "image_size_px": stage.image_size_px,
        "buckets": writer.meta.buckets,
        "texts": len(texts),
        "text_tokens": source.tokens,
        "texts_reused": source.reused,
    }
    # No times in it: latents that were lost and made again must have the digest that training was cached under.
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"latents: done in {time.monotonic() - started:.0f} s", flush=True)
    return report


# ---------------------------------------------------------------- images


def _encode_images(
    curated_dir: Path,
    components_dir: Path,
    table: pd.DataFrame,
    buckets: list[Bucket],
    encoding: EncodingConfig,
    text_row: dict[str, int],
    writer: LatentWriter,
) -> dict[str, Any]:
    """Encodes every record whose crop is not too large; the report counts the others."""
    assigned = curated.buckets_of(table, buckets)
    cropped = np.array(
        [cropped_fraction(w, h, b) for w, h, b in zip(table["width"], table["height"], assigned, strict=True)]
    )
    fits = cropped <= encoding.max_crop_fraction
    if not fits.any():
        raise ValueError(
            f"none of {len(table)} images fits {', '.join(b.name for b in buckets)} with a crop of at most "
            f"encoding.max_crop_fraction={encoding.max_crop_fraction} (the smallest is {cropped.min():.2f}): "
            "give the stage more aspect_ratios"
        )
    kept = table[fits].reset_index(drop=True)
    assigned = [bucket for bucket, fit in zip(assigned, fits, strict=True) if fit]
    encode = _image_encoder(components_dir)

    sums, squares, done, said = 0.0, 0.0, 0, 0
    started = time.monotonic()
    waiting: dict[Bucket, list[tuple[int, np.ndarray]]] = {}

    def flush(bucket: Bucket) -> None:
        nonlocal sums, squares, done, said
        batch = waiting.pop(bucket)
        latents = encode(np.stack([pixels for _, pixels in batch]))
        sums, squares = sums + float(latents.mean()) * len(batch), squares + float(latents.square().mean()) * len(batch)
        for (row, _), latent in zip(batch, latents, strict=True):
            captions = [text_row[text] for text in kept["captions"][row]] or [0]
            writer.add_image(kept["record_id"][row], latent, kept["tier"][row], captions)
        done += len(batch)
        if done * 10 // len(kept) > said:
            said = done * 10 // len(kept)
            print(f"latents: {done}/{len(kept)} images, {time.monotonic() - started:.0f} s", flush=True)

    for row, pixels in curated.read_images(curated_dir, kept, assigned):
        bucket = assigned[row]
        waiting.setdefault(bucket, []).append((row, pixels))
        if len(waiting[bucket]) == encoding.batch_size:
            flush(bucket)
    for bucket in sorted(waiting):
        flush(bucket)
    mean = sums / done
    return {
        "images": done,
        "left_out_by_crop": int((~fits).sum()),
        "cropped_fraction": {"mean": float(cropped[fits].mean()), "max": float(cropped[fits].max())},
        "latent_mean": mean,
        "latent_std": (squares / done - mean**2) ** 0.5,
    }


def _latent_channels(components_dir: Path) -> int:
    return json.loads((components_dir / "vae" / "config.json").read_text())["z_dim"]


def _image_encoder(components_dir: Path):
    """uint8 [B, H, W, 3] -> normalised latents [B, C, H/8, W/8] float32: the posterior's mean, as nothing is sampled."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    from tasks.encoding.small.vae import to_tensor
    from tasks.encoding.vae_codec import FrameCodec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLQwenImage.from_pretrained(components_dir / "vae", torch_dtype=torch.float32)
    codec = FrameCodec(vae.to(device).eval().requires_grad_(False))
    center = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1)

    def encode(pixels: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            mean, _ = codec.encode(to_tensor(pixels).to(device))
            return ((mean - center) / deviation).float().cpu()

    return encode


# ---------------------------------------------------------------- texts


def text_settings(latents_dir: str | Path) -> dict[str, Any]:
    """How the texts of a latents directory were encoded: encoder (digest), dtype, max_text_tokens, hidden_state_index."""
    return json.loads(pq.read_schema(Path(latents_dir) / TEXTS).metadata[b"settings"])


class _TextSource:
    """The embeddings [L, D] of texts, in order: of another stage where they are the same, else computed.

    Attributes: dim (D), tokens (the longest L, rounded up to a multiple of 8), reused.
    """

    def __init__(
        self, components_dir: Path, encoding: EncodingConfig, texts: list[str], text_from: str | Path | None
    ) -> None:
        self.components_dir, self.encoding, self.texts = components_dir, encoding, texts
        self.settings = {
            "encoder": _digest(components_dir),
            "dtype": encoding.dtype,
            "max_text_tokens": encoding.max_text_tokens,
            "hidden_state_index": encoding.hidden_state_index,
        }
        self.earlier = None if text_from is None else self._same_texts(Path(text_from))
        self.reused = self.earlier is not None
        if self.reused:
            self.dim, self.tokens = self.earlier.meta.text_dim, self.earlier.meta.text_tokens
        else:
            self._load()

    def _same_texts(self, directory: Path) -> Any:
        """The dataset of another stage if it holds exactly these texts with these settings, else None."""
        from model.data.latents import LatentDataset

        if not (directory / TEXTS).is_file():
            return None
        if text_settings(directory) != self.settings:
            return None
        if pq.read_table(directory / TEXTS)["text"].to_pylist() != self.texts:
            return None
        return LatentDataset(directory)

    def _load(self) -> None:
        import torch

        from tasks.encoding.chat import PAD_MULTIPLE, load_processor, load_text_encoder, text_lengths

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_text_encoder(self.components_dir / "text_encoder", dtype="auto").to(device)
        self.processor = load_processor(self.components_dir / "processor")
        side = getattr(self.processor, "tokenizer", self.processor).padding_side
        if side != "right":
            raise ValueError(f"the processor pads on the {side}: a text's place would depend on its batch; set right")
        self.lengths = text_lengths(self.processor, self.texts, self.encoding.max_text_tokens)
        self.dim = self.model.config.text_config.hidden_size
        self.tokens = -(-max(self.lengths) // PAD_MULTIPLE) * PAD_MULTIPLE

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Shard by shard, so that at most one shard of embeddings is in memory."""
        started, said = time.monotonic(), 0
        for start in range(0, len(self.texts), TEXT_ROWS_PER_SHARD):
            rows = range(start, min(start + TEXT_ROWS_PER_SHARD, len(self.texts)))
            yield from self._copied(rows) if self.reused else self._computed(rows)
            if rows.stop * 10 // len(self.texts) > said:
                said = rows.stop * 10 // len(self.texts)
                how = "taken over" if self.reused else "encoded"
                print(f"texts: {rows.stop}/{len(self.texts)} {how}, {time.monotonic() - started:.0f} s", flush=True)

    def _copied(self, rows: range) -> Iterator[torch.Tensor]:
        embeds, _ = self.earlier.text(np.arange(rows.start, rows.stop), self.tokens)
        for row, embed in zip(rows, embeds, strict=True):
            yield embed[: int(self.earlier.text_lengths[row])]

    def _computed(self, rows: range) -> Iterator[torch.Tensor]:
        from tasks.encoding.chat import encode_text

        found: dict[int, torch.Tensor] = {}
        by_length = sorted(rows, key=lambda row: self.lengths[row])  # little padding
        for start in range(0, len(by_length), self.encoding.text_batch_size):
            batch = by_length[start : start + self.encoding.text_batch_size]
            embeds, mask = encode_text(
                self.model,
                self.processor,
                [self.texts[row] for row in batch],
                self.encoding.max_text_tokens,
                self.encoding.hidden_state_index,
            )
            lengths = [embeds.shape[1]] * len(batch) if mask is None else mask.sum(1).tolist()
            for row, embed, length in zip(batch, embeds.cpu(), lengths, strict=True):
                found[row] = embed[:length]
        for row in rows:
            yield found[row]

    def write_texts(self, path: Path) -> None:
        """texts.parquet: the text of every row, and under which settings it was encoded."""
        table = pa.table({"row": pa.array(range(len(self.texts)), pa.int32()), "text": self.texts})
        pq.write_table(table.replace_schema_metadata({"settings": json.dumps(self.settings)}), path)


def _digest(components_dir: Path) -> str:
    """SHA-256 over the text encoder's and the processor's files."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "processor"):
        for path in sorted((components_dir / part).iterdir()):
            with open(path, "rb") as file:
                digest.update(f"{part}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
