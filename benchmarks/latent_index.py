"""Opens a synthetic index of latents and draws batches from it: time, and the private memory of a rank.

    python benchmarks/latent_index.py --images 50000000 --folder /tmp/index

Writes the columns of an index (about 45 bytes an image with two captions), then opens it in a separate process, draws
`--steps` plans of 256 samples, and prints one line of JSON. Private memory is Private_Dirty and Swap of
/proc/self/smaps_rollup, minus that of an import of torch; clean pages of a mapped file are shared by all of its
readers, and the kernel may drop them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BUCKETS = ("1024x1024", "1184x896", "1248x832", "1344x768", "768x1344", "832x1248", "896x1184")
CAPTIONS = 2  # of an image
PART = 10_000  # images
BLOCK = 1 << 20


def write_synthetic(folder: Path, images: int) -> None:
    """An index of `images` in seven buckets and five tiers, without the latents and texts."""
    import torch

    from model.config import TIERS
    from model.data.files import TextMeta, write_prefix
    from model.data.index import INDEX, LOCATIONS, IndexMeta, write_json

    folder.mkdir(parents=True)
    sizes = np.full(len(BUCKETS), images // len(BUCKETS))
    sizes[0] += images - sizes.sum()
    texts = images * CAPTIONS + 1

    def column(name: str, dtype: type, size: int, values) -> None:
        out = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(size,))
        for begin in range(0, size, BLOCK):
            rows = np.arange(begin, min(begin + BLOCK, size), dtype=np.int64)
            out[begin : begin + len(rows)] = values(rows)
        out.flush()

    begins = np.concatenate([[0], np.cumsum(sizes)])
    counts = [[int(size * (tier + 1) // 5 - size * tier // 5) for tier in range(5)] for size in sizes]

    def tier_of(rows: np.ndarray) -> np.ndarray:
        bucket = np.searchsorted(begins, rows, "right") - 1
        ends = np.cumsum(np.array(counts), axis=1)
        return (rows - begins[bucket])[:, None].__ge__(ends[bucket]).sum(1)

    column("place", np.uint32, images, lambda rows: rows % PART)
    column("crc32", np.uint32, images, lambda rows: rows % 2**32)
    column("tier", np.uint8, images, tier_of)
    column("by_tier", np.uint32, images, lambda rows: rows)
    column("caption_begin", np.uint32, images + 1, lambda rows: rows * CAPTIONS)
    column("caption_texts", np.uint32, images * CAPTIONS, lambda rows: rows + 1)
    column("text_tokens", np.uint16, texts, lambda rows: 20 + rows % 200)
    column("text_begin", np.uint32, texts, lambda rows: rows % 2**32)
    column("text_crc32", np.uint32, texts, lambda rows: rows % 2**32)
    parts = -(-images // PART)
    runs = np.stack([np.arange(parts) * PART, np.arange(parts)], axis=1)
    np.save(folder / "runs.npy", runs)
    text_runs = np.concatenate(
        [[[0, -1, 0]], np.stack([runs[:, 0] * CAPTIONS + 1, runs[:, 1], 0 * runs[:, 1]], axis=1)]
    )
    np.save(folder / "text_runs.npy", text_runs)
    (folder / "prefix").mkdir()
    write_prefix(folder / "prefix", TextMeta(text_dim=8), torch.zeros(0, 8), torch.zeros(2, 8))
    place = {"latents": "latents", "texts": "texts", "latents_at": "latents", "texts_at": "texts"}
    write_json(folder / LOCATIONS, {"prefix": "prefix", "parts": [place] * parts})
    buckets = dict(zip(BUCKETS, map(tuple, counts), strict=True))
    meta = IndexMeta(content="synthetic", text_dim=8, text_rows=texts, tiers=TIERS, buckets=buckets)
    write_json(folder / INDEX, meta.model_dump())


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:")))


def measure(folder: Path, steps: int) -> dict[str, float]:
    from model.data.latents import LatentDataset
    from model.data.order import SampleOrder

    before, begin = private_bytes(), time.perf_counter()
    dataset = LatentDataset(folder)
    order = SampleOrder(dataset, 256, 0, {"A1": 4.0, "A2": 2.0, "A3": 1.0}, 0.1)
    opened = time.perf_counter()
    for step in range(steps):
        order.batch(step)
    drawn = time.perf_counter()
    return {
        "images": len(dataset),
        "open_s": round(opened - begin, 3),
        "plan_ms": round((drawn - opened) / steps * 1000, 3),
        "private_mb": round((private_bytes() - before) / 1e6, 1),
        "file_mb": round(sum(path.stat().st_size for path in folder.glob("*.npy")) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--measure", action="store_true", help="open an existing index instead of writing one")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.steps)))
        return
    if not (args.folder / "index.json").is_file():
        write_synthetic(args.folder, args.images)
    command = [sys.executable, __file__, "--measure", "--folder", str(args.folder), "--steps", str(args.steps)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
