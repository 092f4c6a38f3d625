"""Processor time of the scorers of pass 3 that run on a CPU, per image: `tasks.curation.plan` has these rates.

    python benchmarks/curation/scorers.py [--rounds 5] [NAME ...]

Photographs of scikit-image at 512 x 384 px, one caption each, in the scorer's batch size; PP-OCR's also with a line of
text. Medians over rounds of the processor time of all threads, with the least and the largest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (512, 384)


def samples(captioned: bool) -> list:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from skimage import data

    from tasks.curation.scorers import Sample
    from tasks.curation.scoring import filters

    made = []
    for name in PHOTOS:
        image = Image.fromarray(getattr(data, name)()).convert("RGB").resize(SIZE)
        if captioned:
            ImageDraw.Draw(image).text((20, 340), "Copyright Jane Doe 2024", font=ImageFont.load_default(28))
        view = filters.reduced(image, filters.ANALYSIS_PX)
        made.append(Sample(image, np.asarray(view), np.asarray(view.convert("L")), (f"a photo of a {name}",)))
    return made


def main() -> int:
    from tasks.curation.config import ScorerChoice
    from tasks.curation.scorers import SCORERS, Chosen, build_scorer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    for spec in SCORERS:
        if spec.required or (options.names and spec.name not in options.names):
            continue
        scorer = build_scorer(Chosen(spec, ScorerChoice(name=spec.name), spec.columns))
        for captioned in (False, True) if spec.name == "pp-ocr" else (False,):
            inputs = samples(captioned)
            scorer(inputs[: spec.batch])  # loads its model
            rounds = []
            for _ in range(options.rounds):
                begun = time.process_time()
                for begin in range(0, len(inputs), spec.batch):
                    scorer(inputs[begin : begin + spec.batch])
                rounds.append((time.process_time() - begun) / len(inputs) * 1e3)
            what = spec.name + (", with text" if captioned else "")
            print(f"{what}: {statistics.median(rounds):.1f} ms ({min(rounds):.1f} to {max(rounds):.1f})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
