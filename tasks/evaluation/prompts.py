"""The prompts of a run: a benchmark's prompts, and for `captions` the real images of held-out captions.

benchmark's data, or curated corpus --write_prompts--> OUT/prompts.jsonl
                                                           reference/RECORD_ID.png      (captions only)
"""

from __future__ import annotations

import hashlib
import heapq
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from eval import catalog
from eval.config import EvalConfig
from eval.generation.generate import PROMPTS
from model import storage

REFERENCE = "reference"
CAPTIONS = "captions"
DEFAULT_CAPTIONS = 256
ENOUGH = 16  # held-out captions; if a corpus has fewer, training images are added, and the card says so
MAX_PARTS = 64  # maximum selections to read: a corpus has tens of thousands


def write_prompts(config: EvalConfig, out_dir: Path, curated: Path | None = None) -> dict[str, int]:
    """Writes the prompts of `config`, with ids. Returns {"prompts"}.

    Args:
        curated: a curated directory, for captions without `prompts_file`.

    Raises:
        ValueError: the prompts cannot be downloaded or read, or the captions benchmark has no corpus.
    """
    if config.benchmark == CAPTIONS:
        prompts = _captions(config, out_dir, curated)
    else:
        with tempfile.TemporaryDirectory() as folder:
            local = fetched(config, Path(folder))
            prompts = catalog.prompts(local)
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (out_dir / PROMPTS).write_text(lines, encoding="utf-8")
    return {"prompts": len(prompts)}


def deciding(config: EvalConfig) -> dict[str, Any]:
    """The settings that determine the prompts."""
    keys = ("benchmark", "prompts_file", "prompt_set", "prompts_per_task")
    values = config.model_dump(mode="json")
    return {key: values[key] for key in (*keys, *(("image_size_px",) if config.benchmark == CAPTIONS else ()))}


def fetched(config: EvalConfig, folder: Path) -> EvalConfig:
    """The configuration with its prompt file, or folder of files, on this machine."""
    path = config.prompts_file
    if path is None or not storage.is_remote(storage.check_path(path)):
        return config
    target = folder / path.rstrip("/").rpartition("/")[2]
    content = storage.read_bytes(path)
    if content is None:
        storage.copy_folder(path, target)
    else:
        target.write_bytes(content)
    return config.model_copy(update={"prompts_file": str(target)})


def _captions(config: EvalConfig, out_dir: Path, curated: Path | None) -> list[dict[str, Any]]:
    if config.prompts_file is not None:
        return _given_captions(config, out_dir)
    if curated is None:
        raise ValueError(
            "benchmark 'captions' needs held-out captions: a curated corpus (--curated DIR), or a prompts_file of lines "
            '{"prompt": ..., "reference": {"file": ..., "sha256": ...}}'
        )
    number = config.prompts_per_task or DEFAULT_CAPTIONS
    return write_held_out(curated, out_dir, number, config.image_size_px, config.prompt_set == "development")


def _given_captions(config: EvalConfig, out_dir: Path) -> list[dict[str, Any]]:
    """Captions of a user's file, with images next to it."""
    with tempfile.TemporaryDirectory() as folder:
        local = fetched(config, Path(folder))
        assert local.prompts_file is not None
        prompts = catalog.prompts(local)
        for prompt in prompts:
            reference = prompt["reference"]
            source = (Path(local.prompts_file).parent / reference["file"]).resolve()
            if not source.is_relative_to(Path(local.prompts_file).parent.resolve()) or not source.is_file():
                raise ValueError(f"{local.prompts_file}: {reference['file']!r} is not a file next to it")
            name, sha256 = _write_reference(source.read_bytes(), prompt["id"], config.image_size_px, out_dir)
            prompt["reference"] = {"file": name, "sha256": sha256}
    return prompts


def write_held_out(
    curated: Path, out_dir: Path, number: int, side_px: int, development: bool = False
) -> list[dict[str, Any]]:
    """The captions of held-out images, and these images at `side_px` x `side_px`, cut at their centre.

    The `number` images with the lowest ids, which are hashes and so a random sample; for development those with the
    highest, which are others if the corpus has twice as many. Uses the first caption of an image. At most `MAX_PARTS`
    selections are read.

    Raises:
        ValueError: the corpus has fewer than two images.
    """
    from tasks.curation.curated import open_curated

    corpus = open_curated(curated)
    parts = list(corpus.parts())
    step = max(1, len(parts) // MAX_PARTS)
    first = heapq.nlargest if development else heapq.nsmallest
    held_out: list[tuple[str, int, int, str]] = []
    trained_on: list[tuple[str, int, int, str]] = []
    columns = ("record_id", "captions", "split")
    for index in range(0, len(parts), step):
        table = corpus.selection(parts[index]).select(list(columns))
        for row, (record_id, captions, split) in enumerate(zip(*(table[name].to_pylist() for name in columns))):
            if captions:
                (trained_on if split == "train" else held_out).append((record_id, index, row, captions[0]))
        held_out, trained_on = first(number, held_out), first(min(number, ENOUGH), trained_on)
    chosen = held_out + trained_on[: max(0, min(number, ENOUGH) - len(held_out))]
    if len(chosen) < 2:
        raise ValueError(f"{curated} has {len(chosen)} images with a caption, and captions needs at least two")
    trained = {record_id for record_id, *_ in trained_on}
    by_part: dict[int, dict[int, tuple[str, str]]] = {}
    for record_id, index, row, caption in chosen:
        by_part.setdefault(index, {})[row] = (record_id, caption)
    prompts = []
    for index, rows in by_part.items():
        for row, record in corpus.images(parts[index], rows):
            record_id, caption = rows[row]
            name, sha256 = _write_reference(record.data, record_id[:16], side_px, out_dir)
            prompt = {
                "id": record_id[:16],
                "prompt": caption,
                "tag": CAPTIONS,
                "reference": {"file": name, "sha256": sha256},
            }
            prompts.append(prompt | ({"trained_on": True} if record_id in trained else {}))
    return sorted(prompts, key=lambda prompt: prompt["id"])


def _write_reference(data: bytes, name: str, side_px: int, out_dir: Path) -> tuple[str, str]:
    """(path of the image as a PNG inside `out_dir`, its SHA-256)."""
    from tasks.curation.scoring.decoding import decode

    whole = decode(data, sys.maxsize)  # curation has kept it; its limit of memory holds here too
    image = ImageOps.fit(whole, (side_px, side_px), Image.Resampling.BICUBIC)
    path = out_dir / REFERENCE / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path, format="PNG")
    return f"{REFERENCE}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """The prompts of a directory of `write_prompts`."""
    from eval.generation.generate import read_prompts as read

    return read(folder / PROMPTS)
