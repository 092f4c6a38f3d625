"""Makes the frozen components: a VAE, a text encoder and its processor, pinned from the Hub or small and trained here.

    curated --> vae/ (AutoencoderKLQwenImage), text_encoder/ (Qwen3VLForConditionalGeneration), processor/,
                report.json, reconstructions.png

In both cases the VAE must reconstruct held-out images of the corpus with at least `min_psnr_db`. Training and checks read a
bounded sample of the corpus: the images with the lowest record ids (which are hashes) in at most SAMPLED_SHARDS shards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from model.data.hashing import hash_words
from model.logs import get_logger
from tasks.curation.curated import Curated, open_curated
from tasks.encoding import hub
from tasks.encoding.buckets import Bucket, fit, nearest_bucket, stage_buckets
from tasks.encoding.config import ComponentsConfig
from tasks.encoding.images import read_images
from tasks.encoding.small.vae import train_vae
from tasks.encoding.vae_codec import FrameCodec, reconstruct

logger = get_logger(__name__)

if TYPE_CHECKING:
    from tasks.store import Part

Load = Callable[[pd.DataFrame, list[Bucket]], dict[Bucket, np.ndarray]]
HUB_CHECK_PX = 256  # size of the held-out images that check a VAE from the Hub
HUB_CHECK_IMAGES = 32
MAX_VAL_IMAGES = 1024
SAMPLED_SHARDS = 64
SAMPLED_RECORDS = 100_000  # maximum number of records that train the small components
VAL_SCALES = (1.0, 0.75, 0.5)  # the VAE is also scored at the lower resolutions of earlier stages
SHOWN = 12  # pairs per source and bucket in reconstructions.png
SAMPLE_COLUMNS = ["record_id", "width", "height", "source", "captions", "split"]


def make_components(
    curated_dir: str | Path, config: ComponentsConfig, out_dir: str | Path, work_dir: str | Path | None = None
) -> dict[str, Any]:
    """Writes the components and report.json to `out_dir`; returns the report.

    Args:
        work_dir: training state, the same for every attempt; a killed training resumes from it.

    Raises:
        ValueError: a component is not available, or the VAE does not reach min_psnr_db on held-out images.
    """
    out_dir, curated = Path(out_dir), open_curated(curated_dir)
    table, parts = sample(curated)
    train, val = _splits(table)
    load = partial(_load, curated, parts)
    report: dict[str, Any] = {"kind": config.kind, "train_records": len(train), "val_records": len(val)}
    if config.kind == "hub":
        report |= hub.copy_components(config, out_dir)
        report |= _check_hub_vae(load, val, config, out_dir)
    else:
        report |= _train_vae(load, train, val, config, out_dir, _state_path(work_dir, "vae"))
        report |= _train_text_encoder(train, config, out_dir, _state_path(work_dir, "text_encoder"))
    # The report contains no times: components that are made again must have the same digest, as latents depend on it.
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def sample(curated: Curated, limit: int = SAMPLED_RECORDS) -> tuple[pd.DataFrame, list[Part]]:
    """SAMPLE_COLUMNS of the `limit` records with the lowest ids, with columns `part` (index into the returned list of
    parts) and `row` (in the part's selection). Reads at most SAMPLED_SHARDS selections, one at a time.

    Raises:
        ValueError: the corpus has no record.
    """
    parts = list(curated.parts())
    if len(parts) > SAMPLED_SHARDS:
        order = hash_words(0, np.array([int(part.digest[:15], 16) for part in parts]))
        parts = [parts[i] for i in sorted(np.argsort(order, kind="stable")[:SAMPLED_SHARDS])]
    table = pd.DataFrame()
    for number, part in enumerate(parts):
        rows = curated.selection(part).select(SAMPLE_COLUMNS).to_pandas()
        rows["part"], rows["row"] = number, np.arange(len(rows))
        table = pd.concat([table, rows]).sort_values("record_id", kind="stable")[:limit]
    if table.empty:
        raise ValueError("the curated corpus has no record to encode; its ledger says which rule rejected each")
    return table, parts


def _splits(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and held-out records. If a small corpus has no held-out records, 3% (at least one) are taken as such.

    Raises:
        ValueError: there is only one record.
    """
    # Sorted by record ids, which are hashes, so that the first records are a random sample.
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    if val.empty:
        held_out = math.ceil(0.03 * len(train))
        train, val = train[held_out:], train[:held_out]
    if train.empty:
        raise ValueError(f"{len(table)} curated records are too few: one to train on and one held out are needed")
    return train.reset_index(drop=True), val.reset_index(drop=True)


# ---------------------------------------------------------------- small components, trained


def _state_path(work_dir: str | Path | None, name: str) -> Path | None:
    return None if work_dir is None else Path(work_dir) / f"{name}.pt"


def _train_vae(
    load: Load,
    train: pd.DataFrame,
    val: pd.DataFrame,
    config: ComponentsConfig,
    out_dir: Path,
    state_path: Path | None,
) -> dict[str, Any]:
    started = time.monotonic()
    size = config.vae.image_size_px
    buckets = stage_buckets(size, config.vae.aspect_ratios)
    pixels = load(train[: config.vae.max_images], buckets)
    logger.info(f"vae: {sum(map(len, pixels.values()))} images of {', '.join(b.name for b in sorted(pixels))}")
    vae = train_vae(pixels, config.vae, config.seed, state_path)
    vae.save_pretrained(out_dir / "vae")

    codec = FrameCodec(vae)
    sources: dict[str, dict[Bucket, np.ndarray]] = {}
    for source, rows in val[:MAX_VAL_IMAGES].groupby("source"):
        sources[str(source)] = load(rows, buckets)
    by_size = {
        str(int(size * scale)): _psnr(codec, {name: _scaled(images, scale) for name, images in sources.items()})
        for scale in VAL_SCALES
    }
    sample = {name: images[:512] for name, images in pixels.items()}
    report = {
        "psnr_db": by_size[str(size)]["all"],
        "psnr_db_by_size_px": by_size,
        "psnr_db_train": _psnr(codec, {"train": sample})["all"],
        "image_size_px": size,
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
    }
    seconds = time.monotonic() - started
    logger.info(f"vae: {report['psnr_db']:.2f} dB on {len(val[:MAX_VAL_IMAGES])} held-out images, {seconds:.0f} s")
    _show(codec, sources, out_dir / "reconstructions.png")
    _require(report["psnr_db"], config, "raise components.vae.steps, or lower components.vae.kl_weight")
    return report


def _train_text_encoder(
    train: pd.DataFrame, config: ComponentsConfig, out_dir: Path, state_path: Path | None
) -> dict[str, Any]:
    from tasks.encoding.small.text_encoder import train_text_encoder
    from tasks.encoding.small.tokenizer import UNKNOWN, build_tokenizer, save_processor
    from tasks.encoding.text.chat import hide_bars

    captions = [list(texts) for texts in train["captions"]]
    flat = [text for texts in captions for text in texts]
    if not flat:
        raise ValueError("no curated record has a caption; a text encoder cannot be trained without any")
    tokenizer = build_tokenizer(flat, config.text_encoder.vocab_size, config.text_encoder.words)
    model, losses = train_text_encoder(captions, tokenizer, config.text_encoder, config.seed, state_path)
    hide_bars()
    model.save_pretrained(out_dir / "text_encoder")
    save_processor(tokenizer, out_dir / "processor")
    sample = tokenizer(flat[:2000], add_special_tokens=False)["input_ids"]
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    return {
        "vocabulary": len(tokenizer),
        "unknown_words": float(np.mean([token == unknown for tokens in sample for token in tokens])),
        "text_losses_nats": {name: loss for name, loss in losses.items() if math.isfinite(loss)},
        "text_parameters": sum(p.numel() for p in model.parameters()),
    }


def _check_hub_vae(load: Load, val: pd.DataFrame, config: ComponentsConfig, out_dir: Path) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_pretrained(out_dir / "vae", torch_dtype=torch.float32).requires_grad_(False)
    codec = FrameCodec(vae.to("cuda" if torch.cuda.is_available() else "cpu").eval())
    pixels = load(val[:HUB_CHECK_IMAGES], stage_buckets(HUB_CHECK_PX, ["1:1", "4:3", "3:4"]))
    psnr = _psnr(codec, {"all": pixels})["all"]
    _show(codec, {"val": pixels}, out_dir / "reconstructions.png")
    _require(psnr, config, "this corpus does not suit the VAE of components.hub_vae")
    return {"psnr_db": psnr, "image_size_px": HUB_CHECK_PX}


# ---------------------------------------------------------------- held-out reconstruction


def _load(curated: Curated, parts: list[Part], table: pd.DataFrame, buckets: list[Bucket]) -> dict[Bucket, np.ndarray]:
    """Images uint8 [n, H, W, 3] by bucket, in the order of the corpus. Skips unreadable images; encoding lists them."""
    pixels: dict[Bucket, list[np.ndarray]] = {}
    for number, rows in table.groupby("part", sort=True):
        assigned: Mapping[int, tuple[Bucket, int]] = {
            int(row.row): (nearest_bucket(row.width, row.height, buckets), int(row.width) * int(row.height))
            for row in rows.itertuples()
        }
        for row, image in read_images(curated, parts[number], assigned, lambda row, error: None):
            pixels.setdefault(assigned[row][0], []).append(image)
    return {bucket: np.stack(images) for bucket, images in pixels.items()}


def _scaled(images: dict[Bucket, np.ndarray], scale: float) -> dict[Bucket, np.ndarray]:
    """The images scaled, with sides rounded to multiples of 8."""
    from PIL import Image

    if scale == 1.0:
        return images
    out: dict[Bucket, list[np.ndarray]] = {}
    for bucket, pixels in images.items():
        smaller = Bucket(*(max(8, round(side * scale / 8) * 8) for side in bucket))  # two buckets may become one
        out.setdefault(smaller, []).extend(np.asarray(fit(Image.fromarray(image), smaller)) for image in pixels)
    return {bucket: np.stack(pixels) for bucket, pixels in out.items()}


def _psnr(codec: FrameCodec, sources: dict[str, dict[Bucket, np.ndarray]]) -> dict[str, float]:
    """PSNR in dB by source, and of all pixels together as `all`."""
    out, errors, counts = {}, [], []
    for name, images in sources.items():
        pairs = [(pixels, reconstruct(codec, pixels)) for pixels in images.values()]
        mse = [float(np.mean((a.astype(np.float32) - b) ** 2, dtype=np.float64)) for a, b in pairs]
        sizes = [a.size for a, _ in pairs]
        out[name] = _decibels(mse, sizes)
        errors += mse
        counts += sizes
    return {"all": _decibels(errors, counts)} | out


def _decibels(squared_errors: list[float], weights: list[int]) -> float:
    """PSNR of 8-bit pixels from the weighted mean of squared errors, which is stricter than a mean of PSNRs."""
    return round(10 * math.log10(255.0**2 / max(float(np.average(squared_errors, weights=weights)), 1e-10)), 3)


def _show(codec: FrameCodec, sources: dict[str, dict[Bucket, np.ndarray]], path: Path) -> None:
    """Writes a PNG of held-out images above their reconstructions, one line per source and bucket."""
    from PIL import Image

    lines = []
    for images in sources.values():
        for _, pixels in sorted(images.items()):
            shown = pixels[:SHOWN]
            copies = reconstruct(codec, shown)
            pairs = [np.concatenate([a, b]) for a, b in zip(shown, copies, strict=True)]
            lines.append(np.concatenate([np.pad(pair, ((2, 2), (2, 2), (0, 0))) for pair in pairs], axis=1))
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in lines]
    Image.fromarray(np.concatenate(padded)).save(path)


def _require(psnr: float, config: ComponentsConfig, hint: str) -> None:
    if psnr < config.min_psnr_db:
        raise ValueError(
            f"the VAE reconstructs held-out images with {psnr:.2f} dB, under components.min_psnr_db={config.min_psnr_db}: "
            f"{hint}, or lower components.min_psnr_db"
        )
