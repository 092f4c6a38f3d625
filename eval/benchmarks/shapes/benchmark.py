"""The `shapes` benchmark: GenEval's six tasks and decision rule on coloured shapes (see eval/benchmarks/shapes/vocabulary.py).

    image --shapes_detector.detect--> objects --geneval.judge_image(prompt)--> right or wrong

No model judges, so that a score takes milliseconds on a CPU and never drifts. The headline score is that of the
prompts with "split": "seen"; those that ask for a combination held out of training are scored apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from eval.benchmarks.shapes.detector import detect
from eval.benchmarks.shapes.prompts import make_prompts
from eval.geneval import judge_image

__all__ = ["detect", "judge", "make_prompts"]


def judge(image: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an image shows what a prompt of `make_prompts` asks for.

    Returns:
        {"correct": bool, "reason": str, "found": {shape: count}, "objects": what was detected}
    """
    objects = detect(image)
    return {**judge_image(objects, metadata), "objects": objects}
