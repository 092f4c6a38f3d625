"""The detector of coloured shapes as a judge: no model, milliseconds on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from eval.benchmarks.shapes.detector import detect
from eval.benchmarks.shapes.vocabulary import COLORS
from eval.judging.protocols import Request, digest_of


class ShapesDetector:
    """See eval.judging.protocols.Judge. Its detections include colours, so that no further questions are needed."""

    name = "shapes-detector"
    model = "eval.benchmarks.shapes.detector:detect"
    spec: Mapping[str, Any] = {"class": "eval.benchmarks.shapes.detector.detect", "version": 1}
    revision = digest_of(spec)

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        return [detect(request.images[0]) for request in requests]

    def selftest(self) -> None:
        image = Image.new("RGB", (64, 64), (250, 250, 250))
        ImageDraw.Draw(image).rectangle((20, 20, 43, 43), fill=COLORS["red"])
        seen = [(name, item.get("color")) for name, items in detect(image).items() for item in items]
        if seen != [("square", "red")]:
            raise ValueError(f"judge {self.name} takes a red square for {seen}")
