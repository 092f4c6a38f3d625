"""Speed of curation's passes 1 and 2 on one core, as a share of plain decoding by Pillow.

    python benchmarks/curation/decode.py [--rounds 15] [--form jpeg] [--before COMMIT_DIR] [--pipe]

Photographs of scikit-image, scaled to 512, 1024 and 2048 px of the shorter side, as JPEG of quality 90, or in another form:
turned by EXIF, in Display P3, as a PNG with transparency. Plain: Pillow's
`Image.open(data).convert("RGB")`. Ours: SHA-256, checks, decoding, statistics, hashes and thumbnail
(tasks.curation.scoring.score), in this process. Both run in turns in each round; the figures are processor time,
medians over rounds with their quartiles. `--before` measures another checkout in the same way, in a separate process,
in turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
BARS = {512: 0.30, 1024: 0.65, 2048: 1.0}


FORMS = ("jpeg", "turned", "display-p3", "alpha")


def photographs(side_px: int, form: str = "jpeg") -> list[bytes]:
    from icc_profiles import DISPLAY_P3, rgb_profile
    from PIL import Image
    from skimage import data

    turned = Image.Exif()
    turned[0x0112] = 6
    options = {"turned": {"exif": turned}, "display-p3": {"icc_profile": rgb_profile(DISPLAY_P3)}}.get(form, {})

    contents = []
    for name in PHOTOS:
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        scale = side_px / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if form == "alpha":
            image.putalpha(image.getchannel("G"))
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=90, **options)
        contents.append(buffer.getvalue())
    return contents


def plain(data: bytes) -> None:
    from PIL import Image

    Image.open(io.BytesIO(data)).convert("RGB")


def passes_of() -> Callable[[bytes], object]:
    """SHA-256, passes 1 and 2, and the hashes of deduplication; also in the form of an older checkout."""
    from tasks.curation.config import CurationConfig

    config = CurationConfig()
    for name in ("tasks.curation.scoring.score", "tasks.curation.score"):  # the second before 2026-11-29
        with contextlib.suppress(ImportError):
            score = importlib.import_module(name)
            score._load_libraries()
            return lambda data: (hashlib.sha256(data).hexdigest(), score.measure(data, config, whole=False))
    curate, dedup = (importlib.import_module(f"tasks.curation.{name}") for name in ("curate", "dedup"))

    def run(data: bytes) -> None:
        hashlib.sha256(data).hexdigest()
        _, sample = curate.score_record(data, [], config)
        dedup.thumbnail(sample.image, config.dedup.thumbnail_px)

    return run


def shares(sizes: list[int], rounds: int, form: str) -> dict[int, list[tuple[float, float]]]:
    """Size -> (plain, ours) in ms for each image, one pair a round."""
    run, found = passes_of(), {}
    for size in sizes:
        contents, pairs = photographs(size, form), []
        for number in range(rounds + 1):
            times = [0.0, 0.0]
            for data in contents:
                for i, call in enumerate((plain, run)):
                    begun = time.process_time()
                    call(data)
                    times[i] += (time.process_time() - begun) * 1000 / len(contents)
            if number:  # the first round warms up caches
                pairs.append((times[0], times[1]))
        found[size] = pairs
    return found


def pipe_costs(sizes: list[int], repeats: int = 100) -> None:
    """Prints the cost of the pipes to and from a worker process: processor time of both ends, and that of the passes.

    The worker returns earlier results, so that nothing is decoded. "For scorers": with the image that scorers get.
    """
    from tasks.curation.config import CurationConfig
    from tasks.curation.scoring import score
    from tasks.curation.scoring.workers import Workers

    score._load_libraries()
    print("   px   for scorers   bytes there   bytes back   pipe ms   passes ms   share")
    for size, whole in itertools.product(sizes, (False, True)):
        contents = photographs(size)
        score.measure(contents[0], CurationConfig())  # warms caches up
        begun = time.process_time()
        measured = {data: score.measure(data, CurationConfig(), whole) for data in contents}
        passes = (time.process_time() - begun) * 1000 / len(contents)
        items = [(0, data) for data in contents] * repeats
        begun, children = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with Workers(measured.__getitem__, 1) as workers:
            for _ in workers.map(items):
                pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        theirs = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
        pipe = (time.process_time() - begun + theirs) * 1000 / len(items)
        there, back = (round(statistics.mean(sides)) for sides in zip(*((len(data), len(pickle.dumps(one))) for data, one in measured.items()), strict=True))  # fmt: skip
        print(
            f"{size:5} {'yes' if whole else 'no':>13} {there:13,} {back:12,} {pipe:9.3f} {passes:11.2f} {pipe / passes:7.3f}"
        )


def print_table(title: str, found: dict[int, list[tuple[float, float]]], bars: bool) -> list[int]:
    missed = []
    print(f"{title}\n   px   plain ms    ours ms   share of plain (quartiles)")
    for size, pairs in found.items():
        low, share, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        bar = BARS.get(size, 0.0)
        verdict = f"   bar {bar:.2f}" + ("" if share >= bar else " MISSED") if bars else ""
        if share < bar:
            missed.append(size)
        print(
            f"{size:5} {statistics.median(a for a, _ in pairs):10.2f} {statistics.median(b for _, b in pairs):10.2f}   "
            f"{share:.3f} ({low:.3f} to {high:.3f}, n={len(pairs)}){verdict}"
        )
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BARS))
    parser.add_argument("--form", choices=FORMS, default="jpeg", help="the bars are for jpeg")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--pipe", action="store_true", help="what the pipes to a worker process cost")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        print(json.dumps(shares(options.sizes, options.rounds, options.form)))
        return
    print("command:", shlex.join(["python", *sys.argv]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    if options.pipe:
        pipe_costs(options.sizes)
        return
    if options.before is None:
        bars = options.form == "jpeg"
        missed = print_table("this checkout", shares(options.sizes, options.rounds, options.form), bars=bars)
        if bars:
            print(f"MISSED: {missed}" if missed else "all bars met")
        return
    sides: dict[str, dict[int, list[tuple[float, float]]]] = {"before": {}, "this checkout": {}}
    for _ in range(options.rounds):
        for name, root in (("before", options.before.resolve()), ("this checkout", ROOT)):
            command = [sys.executable, __file__, "--json", "--rounds", "3", "--form", options.form, "--sizes", *map(str, options.sizes)]  # fmt: skip
            done = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(root)},
                cwd=root,
                capture_output=True,
                text=True,
                check=True,
            )
            for size, pairs in json.loads(done.stdout.splitlines()[-1]).items():
                sides[name].setdefault(int(size), []).extend((a, b) for a, b in pairs)
    for name, found in sides.items():
        print_table(name, found, bars=name != "before" and options.form == "jpeg")
    for size in options.sizes:
        was, now = (statistics.median(a / b for a, b in side[size]) for side in sides.values())
        print(f"{size:5} px: {now / was:.2f} times the share before{'' if now >= 0.95 * was else ' SLOWER'}")


if __name__ == "__main__":
    sys.path[:0] = [os.environ.get("PYTHONPATH", str(ROOT)), str(ROOT / "tests" / "fixtures" / "inputs")]
    main()
