"""How often GenEval's rule with a judge of this package is right about pictures whose captions name one object.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/evaluation/detector_on_pictures.py stamps/usr/share/tuxpaint/stamps

Reads PNGs with a .txt of the same name, the caption in its first line; of these, the ones whose caption has exactly one
of GenEval's 80 class names (or its plural). Each is put on white and judged as the prompt "a photo of a CLASS"
(single_object, threshold 0.3). Then the same pictures are judged as if another class, drawn at random, had been asked
for: the share that is called right is that of false alarms. Prints the misses, and intervals over pictures.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from eval import stats
from eval.benchmarks.geneval import CLASSES
from eval.geneval import COUNTING_THRESHOLD, THRESHOLD, judge_image
from eval.judges import registry
from eval.judging.protocols import Request

SIDE_PX = 512
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
PATTERNS = {name: re.compile(rf"\b({name}s?|{name}es|{PLURALS.get(name, name)})\b", re.IGNORECASE) for name in CLASSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--judge", default="ssd-mobilenet-v2")
    args = parser.parse_args()
    print(f"command: {shlex.join(sys.argv)}")
    pictures = labelled(args.folder)
    judge, rng = registry.load(args.judge), random.Random(0)
    right: dict[float, list[list[float]]] = {THRESHOLD: [], COUNTING_THRESHOLD: []}
    false: list[list[float]] = []
    for path, name in pictures:
        (objects,) = judge.answer([Request([on_white(path)], "")])
        for threshold, scores in right.items():
            scores.append([float(asked(objects, name, threshold))])
        false.append([float(asked(objects, rng.choice([other for other in CLASSES if other != name]), THRESHOLD))])
        if not right[THRESHOLD][-1][0]:
            best = max(
                ((items[0]["score"], found) for found, items in objects.items() if items), default=(0.0, "nothing")
            )
            print(f"missed: {path.relative_to(args.folder)}, {name}; best is {best[1]} {best[0]:.2f}")
    for text, scores in (
        *((f"right above {threshold}", scores) for threshold, scores in right.items()),
        ("false alarms above 0.3", false),
    ):
        e = stats.interval(scores)
        print(f"{text}: {sum(s[0] for s in scores):.0f} of {len(scores)}, {e.mean:.3f} ({e.low:.3f} to {e.high:.3f})")


def labelled(folder: Path) -> list[tuple[Path, str]]:
    """(picture, class) of the pictures whose captions name exactly one class."""
    result = []
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8").partition("\n")[0]
        names = [name for name, pattern in PATTERNS.items() if pattern.search(caption)]
        # "hot dog" has "dog" inside, and "teddy bear" "bear"
        names = [name for name in names if not any(name != other and name in other for other in names)]
        if len(names) == 1:
            result.append((path, names[0]))
    return result


def on_white(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", [max(image.size) * 9 // 8] * 2, "white")
    ground.alpha_composite(image, tuple((g - i) // 2 for g, i in zip(ground.size, image.size, strict=True)))
    return ground.convert("RGB").resize((SIDE_PX, SIDE_PX))


def asked(objects: dict, name: str, threshold: float) -> bool:
    prompt = {"tag": "single_object", "include": [{"class": name, "count": 1}]}
    return judge_image(objects, prompt, threshold=threshold)["correct"]


if __name__ == "__main__":
    main()
