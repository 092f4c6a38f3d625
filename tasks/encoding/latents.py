"""Encodes one shard's images into a latents part of one stage: VAE latents in aspect buckets.

    selection, original bytes -> bucket-{W}x{H}/latents-*.safetensors   (posterior mean - latents_mean) / latents_std
    VAE                          rows.parquet (model/data/files.py), ledger.parquet, report.json

Encodes only records that the stage draws: those of the train split, of tiers with a weight, and only a sample of these if
the stage draws less than an epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from eval.files import file_sha256
from model.config import Section
from model.data.files import LatentMeta, LatentPartWriter
from model.data.hashing import hash_words, uniform
from tasks.encoding.buckets import Bucket, cropped_fraction, nearest_bucket, stage_buckets
from tasks.encoding.config import EncodingConfig
from tasks.encoding.images import Changed, ChangedRecords, read_images
from tasks.encoding.ledger import CHANGED_SINCE_SCORING, SHAPE_FITS_NO_BUCKET, UNDECODABLE, Notes

if TYPE_CHECKING:
    import torch

    from tasks.curation.curated import Curated
    from tasks.store import Part

COLUMNS = ["key", "record_id", "row", "locator", "width", "height"]  # columns of a selection that the part depends on
WARN_CROP = 0.12  # images that the crop to their bucket cuts by more are counted in the report
EncodeImages = Callable[[np.ndarray], "torch.Tensor"]


class StageShape(Section):
    """The settings of a stage that latents depend on."""

    image_size_px: int
    aspect_ratios: tuple[str, ...]


def is_drawn(record_id: str, fraction: float, seed: int) -> bool:
    """Whether a record is in the encoded fraction. Depends only on its id, so that other records do not change it."""
    if fraction >= 1 or fraction <= 0:
        return fraction > 0
    return float(uniform(hash_words(seed, int(record_id[:16], 16)))[0]) < fraction


def draw(
    selection: pa.Table, fractions: Mapping[str, float], seed: int, episode_weights: Mapping[str, float] | None = None
) -> tuple[list[int], int, int]:
    """(rows of the selection to encode, number of held-out records, number of records that the stage does not draw)."""
    rows, held_out, not_drawn = [], 0, 0
    left_out = {episode for episode, weight in (episode_weights or {}).items() if not weight}
    columns = (selection[name].to_pylist() for name in ("record_id", "tier", "split", "bucket"))
    for i, (record_id, tier, split, episode) in enumerate(zip(*columns, strict=True)):
        if split != "train":
            held_out += 1
        elif episode not in left_out and is_drawn(record_id, fractions.get(tier, 0.0), seed):
            rows.append(i)
        else:
            not_drawn += 1
    return rows, held_out, not_drawn


def records_of(selection: pa.Table, rows: list[int]) -> list[dict]:
    """`COLUMNS` of rows of a shard's selection. A stage may draw none of them: Arrow cannot take by an empty list without
    a type."""
    return selection.select(COLUMNS).take(pa.array(rows, pa.int64())).to_pylist()


def encode_latents(
    curated: Curated,
    part: Part,
    rows: list[int],
    shape: StageShape,
    encoding: EncodingConfig,
    channels: int,
    encode: EncodeImages,
    out_dir: str | Path,
    changed: Mapping[int, str],
) -> int:
    """Encodes rows of one shard's selection into `out_dir`; returns the number of images.

    Args:
        encode: see `image_encoder`.
        changed: rows known to have changed since scoring, with the reason. They are listed in the ledger and not read.

    Raises:
        ChangedRecords: other rows have changed; raised after all rows are read.
    """
    out_dir, notes = Path(out_dir), Notes(part.name)
    table = dict(zip(rows, records_of(curated.selection(part), rows), strict=True))
    buckets = stage_buckets(shape.image_size_px, shape.aspect_ratios, from_data=encoding.shapes == "data")
    assigned: dict[int, tuple[Bucket, int]] = {}
    crops = []
    for i, row in table.items():
        if i in changed:
            notes.reject(row, CHANGED_SINCE_SCORING, changed[i])
            continue
        bucket = nearest_bucket(row["width"], row["height"], buckets)
        crop = cropped_fraction(row["width"], row["height"], bucket)
        detail = f"{row['width']}x{row['height']} loses {crop:.0%} to the nearest bucket, {bucket.name}"
        if encoding.shapes == "stage" and crop > encoding.max_crop_fraction:
            limit = f"encoding.max_crop_fraction={encoding.max_crop_fraction}"
            notes.reject(row, SHAPE_FITS_NO_BUCKET, f"{detail}; {limit}")
            continue
        if crop > WARN_CROP:
            notes.remark(row, f"cropped_over_{WARN_CROP:.0%}", detail)
        crops.append(crop)
        assigned[i] = (bucket, row["width"] * row["height"])

    newly_changed: dict[int, str] = {}

    def on_failure(i: int, error: ValueError) -> None:
        if isinstance(error, Changed):
            newly_changed[i] = str(error)
        else:
            notes.reject(table[i], UNDECODABLE, str(error))

    sums, squares, done = 0.0, 0.0, 0
    meta = LatentMeta(latent_channels=channels, dtype=encoding.dtype, rows_per_file=encoding.rows_per_file)
    with LatentPartWriter(out_dir, meta) as writer:
        waiting: dict[Bucket, list[tuple[int, np.ndarray]]] = {}

        def flush(bucket: Bucket) -> None:
            nonlocal sums, squares, done
            batch = waiting.pop(bucket)
            latents = encode(np.stack([pixels for _, pixels in batch]))
            sums += float(latents.mean()) * len(batch)
            squares += float(latents.square().mean()) * len(batch)
            for (i, _), latent in zip(batch, latents, strict=True):
                writer.add(table[i]["row"], table[i]["record_id"], latent)
            done += len(batch)

        for i, pixels in read_images(curated, part, assigned, on_failure):
            bucket = assigned[i][0]
            waiting.setdefault(bucket, []).append((i, pixels))
            if len(waiting[bucket]) == encoding.batch_size:
                flush(bucket)
        for bucket in sorted(waiting):
            flush(bucket)
    if newly_changed:
        raise ChangedRecords(newly_changed)
    notes.write(
        out_dir,
        encoded=done,
        buckets=writer.meta.buckets,
        crop_sum=sum(crops),
        max_crop=max(crops, default=0.0),
        latent_sum=sums,
        latent_square_sum=squares,
    )
    return done


def latent_channels(components_dir: str | Path) -> int:
    return json.loads((Path(components_dir) / "vae" / "config.json").read_text())["z_dim"]


def vae_digest(components_dir: str | Path) -> str:
    """SHA-256 of the VAE's files."""
    digest = hashlib.sha256()
    for path in sorted((Path(components_dir) / "vae").iterdir()):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def image_encoder(components_dir: str | Path) -> EncodeImages:
    """A function from uint8 [B, H, W, 3] to normalised latents [B, C, H/8, W/8] float32, the posterior's mean."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    from tasks.encoding.vae_codec import FrameCodec, to_tensor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae: Any = AutoencoderKLQwenImage.from_pretrained(Path(components_dir) / "vae", torch_dtype=torch.float32)
    codec = FrameCodec(vae.to(device).eval().requires_grad_(False))
    center = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1)

    def encode(pixels: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            mean, _ = codec.encode(to_tensor(pixels).to(device))
            return ((mean - center) / deviation).float().cpu()

    return encode
