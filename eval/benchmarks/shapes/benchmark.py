"""The `shapes` benchmark: GenEval's six tasks and decision rule on coloured shapes (see eval/benchmarks/shapes/vocabulary.py).

    image --shapes_detector.detect--> objects --geneval.judge_image(prompt)--> right or wrong

No model judges, so that a score takes milliseconds on a CPU and never drifts. The headline score is that of the
prompts with "split": "seen"; prompts with held-out combinations are scored separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval.benchmarks.base import Judged, Mode, Prompt, PromptSet
from eval.benchmarks.geneval import GenEval
from eval.benchmarks.shapes.prompts import make_prompts
from eval.benchmarks.shapes.vocabulary import SHAPES
from eval.geneval import judge_image

__all__ = ["BENCHMARK", "judge", "make_prompts"]


def judge(image: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an image shows what a prompt of `make_prompts` asks for.

    Returns:
        {"correct": bool, "reason": str, "found": {shape: count}, "objects": the detections}
    """
    from eval.benchmarks.shapes.detector import detect  # SciPy: the planner's image lacks it

    objects = detect(image)
    return {**judge_image(objects, metadata), "objects": objects}


class Shapes(GenEval):
    """See `eval.benchmarks.base.Benchmark`. The judge "detector" is `detect`, which names colours too."""

    name = "shapes"
    version = "1"
    prompt_count = 156
    images_per_prompt = 1
    judges: Mapping[str, str] = {"detector": "eval.benchmarks.shapes.detector:detect"}
    vocabulary: Mapping[str, str] = {"detector": "shapes"}
    default_judges: Mapping[str, str] = {"detector": "shapes-detector"}
    recommended_judges: Mapping[str, str] = {}
    packaged_judges: Mapping[str, str] = {}
    data = ""
    source = None
    published = ()
    classes = SHAPES

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """`make_prompts` with ids; or those of a file in the same form.

        Raises:
            ValueError: see `GenEval.prompts`.
        """
        if path is not None:
            return super().prompts(path)
        return [{"id": f"{index:05d}", **prompt} for index, prompt in enumerate(make_prompts())]

    def made_prompts(self, prompt_set: PromptSet, per_task: int | None) -> Sequence[Prompt]:
        return make_prompts(per_task, seed=0 if prompt_set == "official" else 1)

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        return {}

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """Summarises the prompts with "split": "seen"; "held_out" has the summary of the others, or None."""
        splits: dict[bool, list[Prompt]] = {False: [], True: []}
        for prompt in prompts:
            splits[prompt.get("split") == "held_out"].append(prompt)
        summaries = {}
        for held_out, chosen in splits.items():
            ids = {prompt["id"] for prompt in chosen}
            other = {prompt["id"] for prompt in splits[not held_out]}
            answers = {key: value for key, value in judged.items() if key in ids or key not in other}
            summaries[held_out] = super().summarise(chosen, answers, mode) if chosen else None
        if summaries[False] is None:
            raise ValueError("there are no seen prompts to summarise")
        return {**summaries[False], "held_out": summaries[True]}


BENCHMARK = Shapes()
