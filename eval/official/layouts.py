"""Writes generated images in the layouts of the official code, for its scripts.

    geneval   OUT/00000/{metadata.jsonl, samples/0000.png ...}          one seed's folders
    dpg       OUT/ITEM_ID.png                                           a 2 x 2 grid of a prompt's four images
    oneig     OUT/images/CLASS/MODEL/ID.webp                            the same, lossless

Tiles are in reading order: top left, top right, bottom left, bottom right.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from eval.files import replacing
from eval.generation.generate import PROMPTS, read_prompts
from eval.geneval import walk_layout
from eval.judging.images import open_png
from eval.judging.protocols import category_of

Layout = Literal["geneval", "dpg", "oneig"]
LAYOUTS = ("geneval", "dpg", "oneig")


def join_tiles(tiles: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """One picture of equal tiles, row by row; missing tiles at the end are black, as OneIG-Bench expects.

    Raises:
        ValueError: no tiles, or tiles of different sizes.
    """
    sizes = {tile.size for tile in tiles}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs tiles of one size, and not of {sorted(sizes) or 'none'}")
    width, height = sizes.pop()
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * width, rows * height))
    for i, tile in enumerate(tiles):
        grid.paste(tile.convert("RGB"), (i % columns * width, i // columns * height))
    return grid


def export(
    images_dir: str | Path,
    out_dir: str | Path,
    layout: Layout,
    *,
    seed: int = 0,
    model: str = "model",
    columns: int = 2,
) -> int:
    """Writes one seed's images of a run in an official layout; existing files are kept. Returns the number written.

    Args:
        images_dir: images/ of a run.
        seed: the sampling seed.
        model: name of the folder that OneIG-Bench's layout has.

    Raises:
        ValueError: no such run, a missing image, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} must be one of {', '.join(LAYOUTS)}")
    images_dir, out_dir = Path(images_dir), Path(out_dir)
    prompts = read_prompts(images_dir / PROMPTS)
    items = walk_layout(images_dir / f"seed{seed}", prompts)
    by_folder: dict[str, list[Path]] = {}
    for item in items:
        by_folder.setdefault(item["folder"], []).append(item["path"])
    written = 0
    for folder, paths in by_folder.items():
        prompt = prompts[int(folder)]
        if layout == "geneval":
            targets = {out_dir / folder / "samples" / path.name: path for path in paths}
            targets[out_dir / folder / "metadata.jsonl"] = paths[0].parent.parent / "metadata.jsonl"
            for target, source in targets.items():
                if not target.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(target) as temporary:
                        shutil.copyfile(source, temporary)
                    written += 1
            continue
        target = out_dir / f"{prompt['id']}.png"
        if layout == "oneig":
            target = out_dir / "images" / category_of(prompt) / model / f"{prompt['id']}.webp"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            grid = join_tiles([open_png(path) for path in paths], columns)
            with replacing(target) as temporary:
                grid.save(temporary, format="PNG" if layout == "dpg" else "WEBP", lossless=True)
            written += 1
    return written
