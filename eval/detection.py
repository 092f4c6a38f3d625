"""GenEval's rule as a benchmark: a detector says which objects an image shows, and the rule decides.

    image --detector--> {class: [{"box", "score", "color"}]} --geneval.judge_image--> right or wrong, and why

`SHAPES` runs the same rule on coloured shapes, with a detector of classical image processing: no model, milliseconds on
a CPU, and it never drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval import geneval
from eval.benchmarks.shapes.detector import detect
from eval.benchmarks.shapes.prompts import make_prompts
from eval.config import EvalConfig
from eval.protocols import Prompt, Request, Verdict, digest_of

OBJECTS = "objects"  # the only question


@dataclass(frozen=True)
class DetectionBenchmark:
    """A benchmark of right and wrong images by GenEval's rule (see eval.protocols.Benchmark for the fields)."""

    name: str
    make_prompts: Callable[[EvalConfig], list[dict[str, Any]]]
    official_judges: Sequence[str]
    default_judge: str | None
    pooling: Literal["categories", "prompts"] = "categories"
    layout: Literal["folders", "grids"] = "folders"
    scale: float = 1.0
    has_official_code: bool = True

    def prompts(self, config: EvalConfig) -> list[dict[str, Any]]:
        return self.make_prompts(config)

    def questions(self, prompt: Prompt) -> list[str]:
        return [OBJECTS]

    def score(self, prompt: Prompt, answers: Mapping[str, Any]) -> Verdict:
        verdict = geneval.judge_image(answers[OBJECTS], prompt)
        return Verdict(float(verdict["correct"]), verdict["reason"])

    def summarise(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
        if not self.has_official_code:
            return {}
        judged = [
            {"tag": row["category"], "correct": row["score"] == 1, "metadata": row["prompt_id"]}
            for row in rows
            if row["score"] is not None
        ]
        summary = geneval.summarise(judged)
        tasks = {name: task["accuracy"] for name, task in summary["tasks"].items()}
        return {"official": {"overall": summary["overall"], "categories": tasks}}


def _shapes_prompts(config: EvalConfig) -> list[dict[str, Any]]:
    return make_prompts(config.prompts_per_task, seed=0 if config.prompt_set == "official" else 1)


def _geneval_prompts(config: EvalConfig) -> list[dict[str, Any]]:
    if config.prompt_set != "official":
        raise ValueError("geneval has no development prompts of its own: give another prompts_file to choose by")
    if config.prompts_file is None:
        raise ValueError(
            "benchmark 'geneval' needs its prompt file (evaluation_metadata.jsonl of github.com/djghosh13/geneval): set "
            "prompts_file"
        )
    prompts = [{**prompt, "id": f"{i:05d}"} for i, prompt in enumerate(geneval.load_prompts(config.prompts_file))]
    return first_of_each_category(prompts, config.prompts_per_task)


def first_of_each_category(prompts: Sequence[Mapping[str, Any]], number: int | None) -> list[dict[str, Any]]:
    """At most `number` prompts of each category, in their order; None keeps all."""
    counts: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        tag = prompt["tag"]
        counts[tag] = counts.get(tag, 0) + 1
        if number is None or counts[tag] <= number:
            kept.append(dict(prompt))
    return kept


SHAPES = DetectionBenchmark("shapes", _shapes_prompts, ("shapes-detector",), "shapes-detector", has_official_code=False)
# The official judge: mmdet's Mask2Former Swin-S with CLIP ViT-L/14 for colours.
GENEVAL = DetectionBenchmark("geneval", _geneval_prompts, ("mask2former-swin-s-mmdet+clip-vit-l-14",), None)


class ShapesDetector:
    """eval.benchmarks.shapes.detector as a judge."""

    name = "shapes-detector"
    spec: Mapping[str, Any] = {"class": "eval.benchmarks.shapes.detector.detect", "version": 1}
    revision = digest_of(spec)

    def answer(self, requests: Sequence[Request]) -> list[Any]:
        return [detect(image) for image, _ in requests]

    def selftest(self) -> None:
        from PIL import Image, ImageDraw

        from eval.benchmarks.shapes.vocabulary import COLORS

        image = Image.new("RGB", (64, 64), (250, 250, 250))
        ImageDraw.Draw(image).rectangle((20, 20, 43, 43), fill=COLORS["red"])
        objects = detect(image)
        found = [(name, item.get("color")) for name, items in objects.items() for item in items]
        if found != [("square", "red")]:
            raise ValueError(f"judge {self.name} takes a red square for {found}")


def shapes_detector() -> ShapesDetector:
    return ShapesDetector()
