"""Near duplicates among real photographs: the share of edited copies that match, and pairs of different pictures that
match.

    python benchmarks/curation/real_photographs.py                 photographs among Debian's wallpapers, fetched with `apt-get download`
    python benchmarks/curation/real_photographs.py FOLDER          the JPEG and PNG files below FOLDER

Each picture is scaled so that its shorter side has 1024 px and cut into tiles of 224 px (--tile); each tile and its edited
copies are hashed as curation does, and all are compared in one search. A flat tile (see `min_hash_margin`) is left out: flat
pictures match by their bytes only. Intervals are Wilson's, at 95%; tiles of one picture resemble each other, so they are
somewhat too narrow.
"""

from __future__ import annotations

import argparse
import io
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from PIL import Image, ImageDraw, ImageEnhance

from tasks.curation.config import DedupConfig
from tasks.curation.decisions import near
from tasks.curation.decisions.engines import open_engine, rows_of
from tasks.curation.scoring.decoding import decode
from tasks.curation.scoring.filters import ANALYSIS_PX, reduced
from tasks.curation.scoring.hashes import HASHES, picture_hashes

# Package -> the folder of its photographs; drawings and gradients are elsewhere in it.
PACKAGES = {
    "lomiri-wallpapers-16.04": "usr/share/backgrounds",
    "mate-backgrounds": "usr/share/backgrounds/mate/nature",
}
SIDE_PX, TILE_PX = 1024, 224


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smaller(image: Image.Image, factor: int) -> bytes:
    return encoded(image.resize([side // factor for side in image.size], Image.Resampling.LANCZOS), "PNG")


def with_logo(image: Image.Image) -> bytes:
    """A white box of 15% by 7.5% of the width in a corner, with dark text."""
    marked, side = image.copy(), image.width
    draw = ImageDraw.Draw(marked)
    x, y = int(0.82 * side), int(0.895 * side)
    draw.rectangle((x, y, x + int(0.15 * side), y + int(0.075 * side)), fill="white")
    draw.text((x + 3, y + 1), "LOGO", fill=(20, 20, 20))
    return encoded(marked, "PNG")


# Edit -> (function, the share of pictures whose copy must match)
EDITS: dict[str, tuple[Callable[[Image.Image], bytes], float]] = {
    "jpeg 75": (lambda image: encoded(image, "JPEG", quality=75), 0.95),
    "jpeg 50": (lambda image: encoded(image, "JPEG", quality=50), 0.95),
    "webp 80": (lambda image: encoded(image, "WEBP", quality=80), 0.95),
    "half size": (lambda image: smaller(image, 2), 0.95),
    "quarter size": (lambda image: smaller(image, 4), 0.95),
    "brightness +15 %": (lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15), "PNG"), 0.90),
    "logo": (with_logo, 0.85),
}


class Matches(NamedTuple):
    count: int  # pictures that are not flat
    recall: dict[str, float]  # share of them that match their copy, by edit
    wrong: list[tuple[tuple[int, str], tuple[int, str]]]  # matched pairs of different pictures: (picture, edit or "")


def hashes_of(encoded_image: bytes) -> dict:
    return picture_hashes(reduced(decode(encoded_image, 10**8), ANALYSIS_PX))


def match(pictures: list[Image.Image], config: DedupConfig | None = None) -> Matches:
    """Searches the pictures and their edited copies for near duplicates, all against all."""
    config = config or DedupConfig()
    versions = [(i, "", hashes_of(encoded(picture, "PNG", compress_level=1))) for i, picture in enumerate(pictures)]
    flat = {i for i, _, hashes in versions if hashes["hash_margin"] < config.min_hash_margin}
    versions += [
        (i, name, hashes_of(edit(picture))) for i, picture in enumerate(pictures) for name, (edit, _) in EDITS.items()
    ]
    rows = [
        {"position": n, "pixels": 1, "points": 1, "tie": f"{n:09}", "name": "", **{k: hashes[k] for k in HASHES}}
        | {"by_hashes": hashes["hash_margin"] >= config.min_hash_margin}
        for n, (_, _, hashes) in enumerate(versions)
    ]
    with tempfile.TemporaryDirectory() as work:
        engine = open_engine("duckdb", work)
        engine.load("compared", pa.Table.from_pylist(rows).schema, rows)
        near.match_by_hashes(engine, config)
        leaders = {row["position"]: row["leader"] for row in rows_of(engine, "SELECT position, leader FROM same")}
        pairs = {frozenset((row["a"], row["b"])) for row in rows_of(engine, "SELECT a, b FROM matched")}
        engine.close()
    hits = dict.fromkeys(EDITS, 0)
    for n, (i, name, _) in enumerate(versions):
        if name and i not in flat:
            nodes = frozenset((leaders.get(i, i), leaders.get(n, n)))
            hits[name] += len(nodes) == 1 or nodes in pairs
    groups = [*pairs, *(frozenset(item) for item in leaders.items())]
    matched = [tuple(versions[n][:2] for n in sorted(group)) for group in groups]
    count = len(pictures) - len(flat)
    return Matches(
        count, {name: hit / max(count, 1) for name, hit in hits.items()}, [(a, b) for a, b in matched if a[0] != b[0]]
    )


def tiles(picture: Image.Image, tile_px: int) -> list[Image.Image]:
    """Squares without overlap, from the top left corner."""
    width, height = picture.size
    corners = [(x, y) for y in range(0, height - tile_px + 1, tile_px) for x in range(0, width - tile_px + 1, tile_px)]
    return [picture.crop((x, y, x + tile_px, y + tile_px)) for x, y in corners]


def fetch(folder: Path) -> None:
    """Puts the packages' photographs into `folder`; nothing is installed."""
    for package, pictures in PACKAGES.items():
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(["apt-get", "download", "-qq", package], cwd=work, check=True, stderr=subprocess.DEVNULL)
            subprocess.run(["dpkg-deb", "-x", next(Path(work).glob("*.deb")).name, "."], cwd=work, check=True)
            for path in (Path(work) / pictures).glob("*.jpg"):
                shutil.copy(path, folder)


def photographs(folder: Path) -> list[Image.Image]:
    """The pictures whose shorter side has at least SIDE_PX, scaled to it."""
    pictures = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            with Image.open(path) as image:
                scale = SIDE_PX / min(image.size)
                if scale <= 1:
                    size = [round(side * scale) for side in image.size]
                    pictures.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return pictures


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return center - half, center + half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tile", type=int, default=TILE_PX, help="px")
    options = parser.parse_args()
    print("command:", shlex.join(["python", *sys.argv]))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.folder is None:
            fetch(folder)
        pictures = photographs(folder)
        if not pictures:
            sys.exit(f"error: {folder} has no JPEG or PNG file of at least {SIDE_PX} px")
        cut = [tile for picture in pictures for tile in tiles(picture, options.tile)]
    result = match(cut)
    if not result.count:
        sys.exit(f"error: all {len(cut)} tiles are flat")
    print(
        f"{len(pictures)} pictures, {len(cut)} tiles of {options.tile} px, of which {len(cut) - result.count} are flat"
    )
    missed = []
    for name, share in result.recall.items():
        low, high = wilson(share, result.count)
        bar = EDITS[name][1]
        print(f"{name:18} {share:.3f} ({low:.3f} to {high:.3f}; at least {bar:.2f})")
        missed += [name] * (share < bar)
    pairs = len(cut) * (len(cut) - 1) // 2
    logo = [pair for pair in result.wrong if all(edit == "logo" for _, edit in pair)]
    print(
        f"different tiles that matched: {len(result.wrong)} ({len(logo)} of them both with the logo) of {pairs} pairs of "
        f"tiles in each of {(len(EDITS) + 1) ** 2} combinations of versions; {time.perf_counter() - start:.0f} s"
    )
    others = [pair for pair in result.wrong if pair not in logo]
    print("missed bars:", ", ".join([*missed, *(["no wrong match"] if others else [])]) or "none")
    return 1 if missed or others else 0


if __name__ == "__main__":
    sys.exit(main())
