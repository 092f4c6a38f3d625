"""Samples the benchmark's images from a pipeline, in GenEval's folder layout, and goes on where it was stopped.

    OUT/images/prompts.jsonl            what was asked, one prompt per line
               generation.json          how it was sampled
               seed0/00000/metadata.jsonl
                           samples/0000.png ...
               seed1/...

Every image has its own noise, a function of (seed, prompt, image) alone, so that it depends on neither the batch size
nor on where a run was stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.config import EvalConfig
from eval.geneval import expected_images

# (prompts, noise seeds, height, width) -> one image per prompt
Sampler = Callable[[list[str], list[int], int, int], list[Image.Image]]
IMAGES, PROMPTS, SETTINGS = "images", "prompts.jsonl", "generation.json"


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """The noise seed of one image, in [0, 2^63): no two images of a benchmark share one."""
    low, high = np.random.SeedSequence([seed, prompt_index, image_index]).generate_state(2)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def generate(
    sampler: Sampler,
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    out_dir: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples each prompt's images (`expected_images`) for each of `config.seeds` into `out_dir`/images.

    Images that exist are kept. A batch is what it would be in an unbroken run, and is sampled whole if any image of it
    is missing: its composition may change the last bits of an image, and a resumed run should equal an unbroken one.

    Args:
        sampler: see `Sampler`; a `settings` attribute (a dict) on it is recorded.
        prompts: metadata with "prompt".
        config: seeds, images per prompt, image size, batch size.
        out_dir: made if absent.
        provenance: recorded as it is, such as the digest of the weights.
        log: gets a line of progress now and then.

    Returns:
        {"expected", "made", "kept": numbers of images, "seconds"}

    Raises:
        ValueError: `out_dir` holds images of other prompts or settings, or the sampler returns too few images.
    """
    images_dir = Path(out_dir) / IMAGES
    settings = {
        "config": config.model_dump(mode="json"),
        "sampler": dict(getattr(sampler, "settings", {})),
        "provenance": dict(provenance or {}),
    }
    _claim(images_dir, prompts, settings)
    jobs = []
    for seed in config.seeds:
        for index, metadata in enumerate(prompts):
            folder = images_dir / f"seed{seed}" / f"{index:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            _write(folder / "metadata.jsonl", json.dumps(metadata) + "\n")
            for image in range(expected_images(metadata, config.images_per_prompt)):
                path = folder / "samples" / f"{image:04d}.png"
                jobs.append((path, metadata["prompt"], image_seed(seed, index, image)))
    batches = [jobs[i : i + config.batch_size] for i in range(0, len(jobs), config.batch_size)]
    todo = [batch for batch in batches if not all(path.is_file() for path, _, _ in batch)]
    total = sum(len(batch) for batch in todo)
    made, done, started, last_line = 0, 0, time.monotonic(), 0.0
    if total < len(jobs):
        log(f"images: {len(jobs) - total} of {len(jobs)} are there already")
    for batch in todo:
        texts, seeds = [prompt for _, prompt, _ in batch], [seed for _, _, seed in batch]
        images = sampler(texts, seeds, config.image_size_px, config.image_size_px)
        if len(images) != len(batch):
            raise ValueError(f"the sampler returned {len(images)} images for {len(batch)} prompts")
        for (path, _, _), image in zip(batch, images, strict=True):
            if not path.is_file():
                _save_png(image, path)
                made += 1
        done += len(batch)
        elapsed = time.monotonic() - started
        if elapsed - last_line >= 5 or done == total:
            last_line = elapsed
            log(f"images: {len(jobs) - total + done}/{len(jobs)}, {done / elapsed:.1f}/s, {elapsed:.0f} s")
    return {
        "expected": len(jobs),
        "made": made,
        "kept": len(jobs) - made,
        "seconds": round(time.monotonic() - started, 3),
    }


def diffusers_sampler(pipeline: Any, config: EvalConfig, text_kv_cache: bool = True) -> Sampler:
    """A sampler over diffusers' NucleusMoEImagePipeline (or one that is called alike).

    Noise is drawn on the CPU, so that it is the same on every device; that of a stochastic scheduler too, and from the
    image's own generator. With `text_kv_cache`, the text's keys and values
    are computed once per call for the prompts and once for the empty ones, not at each step (lossless; the pipeline
    clears them at the start of each call).

    Args:
        pipeline: loaded, on its device.
        config: steps and guidance.
    """
    import diffusers
    import torch

    transformer = pipeline.transformer
    if text_kv_cache and not transformer.is_cache_enabled:
        transformer.enable_cache(diffusers.TextKVCacheConfig())
    elif not text_kv_cache and transformer.is_cache_enabled:
        transformer.disable_cache()
    pipeline.set_progress_bar_config(disable=True)

    def sample(prompts: list[str], seeds: list[int], height: int, width: int) -> list[Image.Image]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with _noise_of_steps(pipeline.scheduler, generators):
            return pipeline(
                prompt=list(prompts),
                generator=generators,
                height=height,
                width=width,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                output_type="pil",
            ).images

    sample.settings = {
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": str(transformer.device.type),
        "negative_prompt": "",
        "prompt_rewriting": False,
        "text_kv_cache": text_kv_cache,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }
    return sample


@contextlib.contextmanager
def _noise_of_steps(scheduler: Any, generators: list[Any]) -> Iterator[None]:
    """Lets a stochastic scheduler draw from these generators, one for each image: the pipeline, which draws the first
    noise from them, hands the scheduler none, and it would draw from the global state."""
    if not scheduler.config.get("stochastic_sampling"):
        yield
        return
    scheduler.step = functools.partial(scheduler.step, generator=generators)
    try:
        yield
    finally:
        del scheduler.step


def _claim(images_dir: Path, prompts: Sequence[Mapping[str, Any]], settings: dict[str, Any]) -> None:
    """Writes what is asked and how; refuses a folder in which something else was."""
    images_dir.mkdir(parents=True, exist_ok=True)
    asked = "".join(json.dumps(metadata) + "\n" for metadata in prompts)
    wanted = _of_sampling(settings)
    same = {PROMPTS: lambda text: text == asked, SETTINGS: lambda text: _of_sampling(json.loads(text)) == wanted}
    for name, is_same in same.items():
        path = images_dir / name
        if path.is_file() and not is_same(path.read_text(encoding="utf-8")):
            raise ValueError(f"{images_dir} holds images of another run: its {name} differs; use an empty folder")
    _write(images_dir / PROMPTS, asked)
    _write(images_dir / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _of_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only scoring reads, which may change while the images stay."""
    config = {k: v for k, v in settings["config"].items() if k not in ("bootstrap_samples", "missing")}
    return {**json.loads(json.dumps(settings)), "config": config}


def _write(path: Path, text: str) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _save_png(image: Image.Image, path: Path) -> None:
    with _replacing(path) as temporary:
        image.save(temporary, format="PNG")


@contextlib.contextmanager
def _replacing(path: Path):
    """A file that exists is whole: what is there after a kill needs no check when resuming."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
