"""Samples a benchmark's images from a pipeline, in GenEval's folder layout, and resumes after an interruption.

    OUT/images/prompts.jsonl            one prompt per line, each with its id
               generation.json          the settings of sampling
               seed0/00000/metadata.jsonl
                           samples/0000.png ...
               seed1/...

An image's noise is a function of (benchmark, prompt id, image, seed). It does not depend on the batch, the shard, other
prompts or interruptions. A batch has all images of several prompts with one seed. Batches do not depend on the number of
shards, and an interrupted run loses at most one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.config import SCORING_KEYS, EvalConfig, stored_settings
from eval.files import replacing
from eval.geneval import expected_images
from eval.judging.protocols import with_ids

# (prompts, noise seeds, height, width) -> one image per prompt
Sampler = Callable[[list[str], list[int], int, int], list[Image.Image]]
IMAGES, PROMPTS, SETTINGS = "images", "prompts.jsonl", "generation.json"
MAX_REWRITES_BYTES = 64 << 20


def image_seed(benchmark: str, prompt_id: str, image_index: int, seed: int) -> int:
    """The noise seed of one image, in [0, 2^63)."""
    key = json.dumps([benchmark, prompt_id, image_index, seed]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Job:
    path: Path
    text: str
    noise: int


@dataclass(frozen=True)
class Batch:
    """Several prompts with one seed: (prompt index, prompt), and all images to make of them."""

    seed: int
    prompts: tuple[tuple[int, Mapping[str, Any]], ...]
    jobs: tuple[Job, ...]


def plan_batches(prompts: Sequence[Mapping[str, Any]], config: EvalConfig, images_dir: Path) -> list[Batch]:
    """All batches of a run, in order. A batch has as many prompts as fit into `config.batch_size` images, at least one.

    Args:
        prompts: with ids (`with_ids`); the text of "rewritten", if present, replaces that of "prompt".
    """
    batches = []
    for seed in config.seeds:
        part: list[tuple[int, Mapping[str, Any]]] = []
        jobs: list[Job] = []
        for index, prompt in enumerate(prompts):
            samples = images_dir / f"seed{seed}" / f"{index:05d}" / "samples"
            count = expected_images(prompt, config.images_per_prompt)
            if jobs and len(jobs) + count > config.batch_size:
                batches.append(Batch(seed, tuple(part), tuple(jobs)))
                part, jobs = [], []
            part.append((index, prompt))
            text = prompt.get("rewritten", prompt["prompt"])
            jobs += [
                Job(samples / f"{i:04d}.png", text, image_seed(config.benchmark, prompt["id"], i, seed))
                for i in range(count)
            ]
        if jobs:
            batches.append(Batch(seed, tuple(part), tuple(jobs)))
    return batches


def generate(
    sampler: Sampler,
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    out_dir: str | Path,
    *,
    shard: int = 0,
    shards: int = 1,
    provenance: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples each prompt's images (`expected_images`) for each of `config.seeds` into `out_dir`/images.

    Existing images are never overwritten. If any image of a batch is missing, the whole batch is sampled, because the
    composition of a batch may change the last bits of its images, and a resumed run must equal an uninterrupted one.

    Args:
        sampler: see `Sampler`; its attribute `settings` (a dict), if any, is recorded.
        prompts: with "prompt"; a missing "id" is derived.
        config: seeds, images per prompt, image size, batch size.
        out_dir: created if it does not exist.
        shard, shards: samples the batches whose number modulo `shards` is `shard`.
        provenance: recorded unchanged, such as the digest of the weights.
        log: called with progress lines.

    Returns:
        {"expected", "made", "kept": numbers of images of this shard, "seconds": duration}

    Raises:
        ValueError: `out_dir` contains images of other prompts or settings, or the sampler returns too few images.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard={shard} must be one of the {shards} from 0 to {shards - 1}")
    images_dir = Path(out_dir) / IMAGES
    rewrites = read_rewrites(config.prompt_rewrites)
    prompts = rewrite(with_ids(prompts), rewrites)
    settings = {
        "config": config.model_dump(mode="json"),
        "sampler": dict(getattr(sampler, "settings", {})),
        "prompt_rewriting": rewrites and {"sha256": rewrites["sha256"], "prompts": len(rewrites["texts"])},
        "provenance": dict(provenance or {}),
    }
    _claim(images_dir, prompts, settings)
    batches = plan_batches(prompts, config, images_dir)[shard::shards]
    for batch in batches:
        for index, prompt in batch.prompts:
            folder = images_dir / f"seed{batch.seed}" / f"{index:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            write_once(folder / "metadata.jsonl", json.dumps(prompt) + "\n")
    todo = [batch for batch in batches if not all(job.path.is_file() for job in batch.jobs)]
    expected, total = (sum(len(batch.jobs) for batch in selected) for selected in (batches, todo))
    made, done, started, last_line = 0, 0, time.monotonic(), 0.0
    if total < expected:
        log(f"images: {expected - total} of {expected} exist")
    for batch in todo:
        images = _sample(sampler, batch, config)
        for job, image in zip(batch.jobs, images, strict=True):
            if not job.path.is_file():
                save_png(image, job.path)
                made += 1
        done += len(batch.jobs)
        elapsed = time.monotonic() - started
        if elapsed - last_line >= 5 or done == total:
            last_line = elapsed
            log(f"images: {expected - total + done}/{expected}, {done / elapsed:.1f}/s, {elapsed:.0f} s")
    seconds = round(time.monotonic() - started, 3)
    return {"expected": expected, "made": made, "kept": expected - made, "seconds": seconds}


def _sample(sampler: Sampler, batch: Batch, config: EvalConfig) -> list[Image.Image]:
    """Samples one batch. A prompt with more images than `batch_size` takes several calls."""
    images: list[Image.Image] = []
    side = config.image_size_px
    for i in range(0, len(batch.jobs), config.batch_size):
        jobs = batch.jobs[i : i + config.batch_size]
        sampled = sampler([job.text for job in jobs], [job.noise for job in jobs], side, side)
        if len(sampled) != len(jobs):
            raise ValueError(f"the sampler returned {len(sampled)} images for {len(jobs)} prompts")
        images += sampled
    return images


def read_rewrites(path: str | Path | None) -> dict[str, Any] | None:
    """{"texts": {prompt id or text: rewritten text}, "sha256"} of a JSON file; None if `path` is None.

    Raises:
        ValueError: no such file, or not a JSON object whose values are texts.
    """
    if path is None:
        return None
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_REWRITES_BYTES:
        raise ValueError(f"prompt_rewrites={str(path)!r} is not a JSON file of at most {MAX_REWRITES_BYTES >> 20} MiB")
    data = path.read_bytes()
    try:
        texts = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(v, str) and v.strip() for v in texts.values()):
        raise ValueError(f"{path} must be a JSON object that maps each prompt (its id or text) to a rewritten text")
    return {"texts": texts, "sha256": hashlib.sha256(data).hexdigest()}


def rewrite(prompts: Sequence[dict[str, Any]], rewrites: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Adds the text of `rewrites` to each prompt as "rewritten". All prompts need one, as a score over rewritten and original
    prompts would mix two benchmarks.

    Raises:
        ValueError: a prompt has no rewritten text.
    """
    if rewrites is None:
        return list(prompts)
    texts = rewrites["texts"]
    absent = [p for p in prompts if p["id"] not in texts and p["prompt"] not in texts]
    if absent:
        raise ValueError(
            f"the rewrites lack {len(absent)} of {len(prompts)} prompts, the first {absent[0]['prompt']!r}"
        )
    return [{**p, "rewritten": texts.get(p["id"], texts.get(p["prompt"]))} for p in prompts]


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a run, with their ids.

    Raises:
        ValueError: no such file, or a line that is not a prompt; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of prompts (one JSON object per line)")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
            raise ValueError(f"{path}, line {number}: a prompt needs 'prompt'")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    return with_ids(prompts)


def copy_references(prompts: Sequence[Mapping[str, Any]], source: Path, images_dir: Path) -> None:
    """Copies the real images of prompts, files that lie below `source`, to the same places below `images_dir`.

    Raises:
        ValueError: a file is not there, or not below `source`.
    """
    for prompt in prompts:
        if name := prompt.get("reference", {}).get("file"):
            path = (source / name).resolve()
            if not path.is_relative_to(source.resolve()) or not path.is_file():
                raise ValueError(f"prompt {prompt['id']!r}: {name!r} is not a file below {source}")
            target = images_dir / path.relative_to(source.resolve())
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_file():
                with replacing(target) as temporary:
                    temporary.write_bytes(path.read_bytes())


def _claim(images_dir: Path, prompts: Sequence[Mapping[str, Any]], settings: dict[str, Any]) -> None:
    """Writes prompts and settings. Raises ValueError if the folder has other ones."""
    images_dir.mkdir(parents=True, exist_ok=True)
    prompt_lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    sampling = _sampling_settings(settings)
    same = {
        PROMPTS: lambda text: text == prompt_lines,
        SETTINGS: lambda text: _sampling_settings(json.loads(text)) == sampling,
    }
    for name, is_same in same.items():
        path = images_dir / name
        if path.is_file() and not is_same(path.read_text(encoding="utf-8")):
            raise ValueError(f"{images_dir} holds images of another run: its {name} differs; use an empty folder")
    write_once(images_dir / PROMPTS, prompt_lines)
    write_once(images_dir / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _sampling_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that only scoring reads, and without the path of the rewrites (their digest remains)."""
    ignored = SCORING_KEYS | {"prompt_rewrites"}
    kept = {k: v for k, v in stored_settings(settings["config"]).items() if k not in ignored}
    config = EvalConfig(**kept).model_dump(mode="json")
    return {**json.loads(json.dumps(settings)), "config": config}


def write_once(path: Path, text: str) -> None:
    """Writes a file unless it exists."""
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
