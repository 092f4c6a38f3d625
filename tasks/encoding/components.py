"""The frozen components: a VAE, a text encoder and its processor, pinned from the Hub or trained here in small.

    curated --> vae/ (AutoencoderKLQwenImage), text_encoder/ (Qwen3VLForConditionalGeneration), processor/,
                report.json, reconstructions.png

Either way the VAE must reconstruct held-out images of the corpus (`min_psnr_db`) before anything is encoded.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tasks.encoding import curated
from tasks.encoding.buckets import Bucket, fit, stage_buckets
from tasks.encoding.config import ComponentsConfig, HubComponent
from tasks.encoding.small.vae import reconstruct, train_vae

if TYPE_CHECKING:
    from tasks.encoding.vae_codec import FrameCodec

HUB_CHECK_PX = 256  # side of the held-out images that a VAE of the Hub is checked with
HUB_CHECK_IMAGES = 32
MAX_VAL_IMAGES = 1024
VAL_SCALES = (1.0, 0.75, 0.5)  # the VAE is scored at the resolutions of earlier stages as well
SHOWN = 12  # pairs in reconstructions.png, of each source
VAE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (*VAE_FILES, "generation_config.json")
PROCESSOR_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def make_components(
    curated_dir: str | Path, config: ComponentsConfig, out_dir: str | Path, work_dir: str | Path | None = None
) -> dict[str, Any]:
    """Fills `out_dir` and returns the report, which is report.json too.

    Args:
        work_dir: the same for every attempt at the same components: a killed training goes on from what it left there.

    Raises:
        ValueError: a component cannot be had, or the VAE misses min_psnr_db on held-out images.
    """
    curated_dir, out_dir = Path(curated_dir), Path(out_dir)
    table = curated.load_table(curated_dir)
    train, val = _splits(table)
    report: dict[str, Any] = {"kind": config.kind, "train_records": len(train), "val_records": len(val)}
    if config.kind == "hub":
        report |= _from_hub(config, out_dir)
        report |= _check_hub_vae(curated_dir, val, config, out_dir)
    else:
        report |= _train_vae(curated_dir, train, val, config, out_dir, _state_path(work_dir, "vae"))
        report |= _train_text_encoder(train, config, out_dir, _state_path(work_dir, "text_encoder"))
    # No times in it: components that were lost and made again must have the digest that latents were cached under.
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _splits(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and held-out records. A corpus too small to have any of the latter gives up 3%, and at least one.

    Raises:
        ValueError: a single record.
    """
    table = table.sort_values("record_id", kind="stable")  # record ids are hashes: a prefix is a fair sample
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    if val.empty:
        held = math.ceil(0.03 * len(train))
        train, val = train[held:], train[:held]
    if train.empty:
        raise ValueError(f"{len(table)} curated records are too few: one to train on and one held out are needed")
    return train.reset_index(drop=True), val.reset_index(drop=True)


# ---------------------------------------------------------------- trained here


def _state_path(work_dir: str | Path | None, name: str) -> Path | None:
    return None if work_dir is None else Path(work_dir) / f"{name}.pt"


def _train_vae(
    curated_dir: Path,
    train: pd.DataFrame,
    val: pd.DataFrame,
    config: ComponentsConfig,
    out_dir: Path,
    state_path: Path | None,
) -> dict[str, Any]:
    from tasks.encoding.vae_codec import FrameCodec

    started = time.monotonic()
    size = config.vae.image_size_px
    buckets = stage_buckets(size, config.vae.aspect_ratios)
    pixels, _ = _load(curated_dir, train[: config.vae.max_images], buckets)
    print(f"vae: {sum(map(len, pixels.values()))} images of {', '.join(b.name for b in sorted(pixels))}", flush=True)
    vae = train_vae(pixels, config.vae, config.seed, state_path)
    vae.save_pretrained(out_dir / "vae")

    codec = FrameCodec(vae)
    sources: dict[str, dict[Bucket, np.ndarray]] = {}
    for source, rows in val[:MAX_VAL_IMAGES].groupby("source"):
        sources[str(source)], _ = _load(curated_dir, rows.reset_index(drop=True), buckets)
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
    print(
        f"vae: {report['psnr_db']:.2f} dB on {len(val[:MAX_VAL_IMAGES])} held-out images, {seconds:.0f} s", flush=True
    )
    _show(codec, sources, out_dir / "reconstructions.png")
    _require(report["psnr_db"], config, "raise components.vae.steps, or lower components.vae.kl_weight")
    return report


def _train_text_encoder(
    train: pd.DataFrame, config: ComponentsConfig, out_dir: Path, state_path: Path | None
) -> dict[str, Any]:
    from tasks.encoding.chat import UNKNOWN, build_tokenizer, hide_bars, save_processor
    from tasks.encoding.small.text_encoder import train_text_encoder

    captions = [list(texts) for texts in train["captions"]]
    flat = [text for texts in captions for text in texts]
    if not flat:
        raise ValueError("no curated record has a caption; a text encoder cannot be trained without any")
    tokenizer = build_tokenizer(flat, config.text_encoder.vocab_size)
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


# ---------------------------------------------------------------- from the Hub


def _from_hub(config: ComponentsConfig, out_dir: Path) -> dict[str, Any]:
    fetch(config.hub_vae, VAE_FILES, out_dir / "vae")
    fetch(config.hub_text_encoder, MODEL_FILES, out_dir / "text_encoder")
    fetch(config.hub_text_encoder, PROCESSOR_FILES, out_dir / "processor")
    for name, key, wanted in (
        ("vae", "_class_name", "AutoencoderKLQwenImage"),
        ("text_encoder", "architectures", ["Qwen3VLForConditionalGeneration"]),
    ):
        found = json.loads((out_dir / name / "config.json").read_text()).get(key)
        if found != wanted:
            raise ValueError(f"components.hub_{name}: its config.json has {key}={found!r}, {wanted!r} is needed")
    return {
        name: {"repo_id": part.repo_id, "revision": part.revision, "subfolder": part.subfolder}
        for name, part in (("vae", config.hub_vae), ("text_encoder", config.hub_text_encoder))
    }


def fetch(component: HubComponent, patterns: tuple[str, ...], target: Path) -> None:
    """Puts the files of a pinned component that match into `target`. A `repo_id` that is a directory is copied.

    Raises:
        ValueError: the Hub has no such repository or revision, cannot be reached, or has no config.json in it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = f"{component.subfolder}/" if component.subfolder else ""
    if Path(component.repo_id).is_dir():
        source = Path(component.repo_id)
    else:
        print(f"downloading {component.repo_id}@{component.revision[:12]} {inside}", flush=True)
        try:
            source = Path(
                snapshot_download(
                    component.repo_id,
                    revision=component.revision,
                    allow_patterns=[inside + pattern for pattern in patterns],
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{component.repo_id} at {component.revision} is not to be had: {error}") from error
    target.mkdir(parents=True, exist_ok=True)
    found = {path for pattern in patterns for path in (source / inside).glob(pattern) if path.is_file()}
    if not found:
        raise ValueError(f"{component.repo_id} at {component.revision} has no {inside}{patterns[0]}")
    for path in sorted(found):
        shutil.copyfile(path, target / path.name)  # the content: the Hub's cache holds links


def _check_hub_vae(curated_dir: Path, val: pd.DataFrame, config: ComponentsConfig, out_dir: Path) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKLQwenImage

    from tasks.encoding.vae_codec import FrameCodec

    vae = AutoencoderKLQwenImage.from_pretrained(out_dir / "vae", torch_dtype=torch.float32).requires_grad_(False)
    codec = FrameCodec(vae.to("cuda" if torch.cuda.is_available() else "cpu").eval())
    pixels, _ = _load(curated_dir, val[:HUB_CHECK_IMAGES], stage_buckets(HUB_CHECK_PX, ["1:1", "4:3", "3:4"]))
    psnr = _psnr(codec, {"all": pixels})["all"]
    _show(codec, {"val": pixels}, out_dir / "reconstructions.png")
    _require(psnr, config, "this corpus does not suit the VAE of components.hub_vae")
    return {"psnr_db": psnr, "image_size_px": HUB_CHECK_PX}


# ---------------------------------------------------------------- held-out reconstruction


def _load(
    curated_dir: Path, table: pd.DataFrame, buckets: list[Bucket]
) -> tuple[dict[Bucket, np.ndarray], dict[Bucket, list[int]]]:
    """uint8 [n, H, W, 3] of each bucket, and the rows of `table` they came from."""
    assigned = curated.buckets_of(table, buckets)
    pixels: dict[Bucket, list[np.ndarray]] = {}
    rows: dict[Bucket, list[int]] = {}
    for row, image in curated.read_images(curated_dir, table, assigned):
        pixels.setdefault(assigned[row], []).append(image)
        rows.setdefault(assigned[row], []).append(row)
    return {bucket: np.stack(images) for bucket, images in pixels.items()}, rows


def _scaled(images: dict[Bucket, np.ndarray], scale: float) -> dict[Bucket, np.ndarray]:
    """The images at another resolution, sides rounded to what the VAE takes."""
    from PIL import Image

    if scale == 1.0:
        return images
    out: dict[Bucket, list[np.ndarray]] = {}
    for bucket, pixels in images.items():
        smaller = Bucket(*(max(8, round(side * scale / 8) * 8) for side in bucket))  # two buckets may become one
        out.setdefault(smaller, []).extend(np.asarray(fit(Image.fromarray(image), smaller)) for image in pixels)
    return {bucket: np.stack(pixels) for bucket, pixels in out.items()}


def _psnr(codec: FrameCodec, sources: dict[str, dict[Bucket, np.ndarray]]) -> dict[str, float]:
    """PSNR in dB of each source and, as `all`, of all their pixels together."""
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
    """PSNR of 8-bit pixels from mean squared errors: of the pooled error, which is stricter than a mean of PSNRs."""
    return round(10 * math.log10(255.0**2 / max(float(np.average(squared_errors, weights=weights)), 1e-10)), 3)


def _show(codec: FrameCodec, sources: dict[str, dict[Bucket, np.ndarray]], path: Path) -> None:
    """A PNG of held-out images, each above its reconstruction; a line for each source and bucket."""
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
