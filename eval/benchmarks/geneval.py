"""The benchmark `geneval`: a detector finds objects, and a colour judge names the colours that a prompt asks about.

image --detector--> {"objects": {class: [{"box", "score", ...}]}} --color--> {"color/car": ["red"]} --> right or wrong
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import geneval as rule
from eval.benchmarks import base
from eval.benchmarks.base import (
    AnswerType,
    Benchmark,
    Judged,
    Mode,
    Pooling,
    Prompt,
    PromptSet,
    Published,
    Question,
    Source,
)
from eval.benchmarks.published import NUCLEUS, QWEN, printed_in
from eval.official.geneval_files import result_lines

PROMPTS = "prompts/evaluation_metadata.jsonl"
GENEVAL = "GenEval, arXiv 2310.11513"
# COCO's classes in the order of evaluation/object_names.txt, with GenEval's own names for three of them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class GenEval(Benchmark):
    """See `eval.benchmarks.base.Benchmark`; the rule is `eval.geneval`'s."""

    name = "geneval"
    version = "djghosh13/geneval@af4902f"
    tasks = rule.TASKS
    prompt_count = 553
    images_per_prompt = 4
    judges: Mapping[str, str] = {
        "detector": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (mmdet 2)",
        "color": "ViT-L-14, openai (open_clip)",
    }
    recommended_judges: Mapping[str, str] = {"detector": "mask2former-clip", "color": "mask2former-clip"}
    packaged_judges: Mapping[str, str] = {"detector": "ssd-mobilenet-v2", "color": "ssd-mobilenet-v2"}
    answer_types: Mapping[str, AnswerType] = {"detector": "objects", "color": "texts"}
    vocabulary: Mapping[str, str] = {"detector": "COCO classes"}
    pooling: Pooling = "categories"
    prompt_sets: tuple[PromptSet, ...] = ("official", "development")
    data = "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval (553 prompts)"
    source: Source | None = Source(
        "djghosh13/geneval",
        "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        {PROMPTS: "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"},
        prompts=PROMPTS,
    )
    published: Sequence[Published] = (
        *printed_in(NUCLEUS, {"Nucleus-Image": {"overall": 0.87, "position": 0.85}}),
        *printed_in(
            QWEN,
            {
                "Qwen-Image": {"overall": 0.87, "position": 0.76},
                "GPT Image 1 (high)": 0.84,
                "Seedream 3.0": 0.84,
                "HiDream-I1-Full": 0.83,
                "FLUX.1-dev": 0.66,
            },
        ),
        *printed_in(GENEVAL, {"SDXL": 0.55}),
    )
    classes: tuple[str, ...] = CLASSES

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """The prompts of a file in the official form; an id is the name of the prompt's folder.

        Raises:
            ValueError: no such file, a malformed line, or a class or colour that no judge knows.
        """
        prompts = rule.load_prompts(base.required(path, self))
        for number, prompt in enumerate(prompts, start=1):
            for clause in [*prompt["include"], *prompt.get("exclude", ())]:
                self._check("class", clause.get("class"), self.classes, f"{path}, prompt {number}")
                if "color" in clause:
                    self._check("color", clause["color"], rule.COLORS, f"{path}, prompt {number}")
        return [{"id": f"{index:05d}", **prompt} for index, prompt in enumerate(prompts)]

    def made_prompts(self, prompt_set: PromptSet, per_task: int | None) -> Sequence[Prompt] | None:
        if prompt_set == "official":
            return None
        from eval.benchmarks.geneval_prompts import make_prompts

        return make_prompts(self.classes, per_task)

    @staticmethod
    def _check(what: str, value: Any, valid: Sequence[str], where: str) -> None:
        if value not in valid:
            raise ValueError(f"{where}: unknown {what} {value!r}; it must be one of {', '.join(valid)}")

    def picture_path(self, prompt: Prompt, image: int, model: str) -> str:
        return f"{prompt['id']}/samples/{image:04d}.png"

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """First the objects; then the colours of those that the rule uses.

        A "color" question's options are {"class", "boxes", "indices"}: the objects' boxes, and their indices in the
        detector's list of the class (for their masks). Its answer is one colour per box.
        """
        if "objects" not in answers:
            return [Question("detector", "objects")]
        open_questions = {}
        for clause in prompt["include"]:
            name, count = clause["class"], clause["count"]
            detections = self._looked_at(prompt, answers["objects"], name)
            key = f"color/{name}"
            if "color" not in clause or key in answers or len(detections) < count:
                continue
            # Clauses of one class use the first objects of one list: ask about the longest.
            count = max(c["count"] for c in prompt["include"] if c["class"] == name and "color" in c)
            options = {
                "class": name,
                "boxes": [list(map(float, d["box"][:4])) for d in detections[:count]],
                "indices": [d["index"] for d in detections[:count]],
            }
            open_questions[key] = Question("color", key, options=options)
        return list(open_questions.values())

    def _looked_at(self, prompt: Prompt, objects: rule.Objects, name: str) -> list[dict[str, Any]]:
        limit = rule.COUNTING_THRESHOLD if prompt["tag"] == "counting" else rule.THRESHOLD
        listed = [{**rule.as_object(d), "index": i} for i, d in enumerate(objects.get(name, ()))]
        return rule.kept_detections(listed, limit)

    def judge(self, prompt: Prompt, answers: Mapping[str, Any]) -> dict[str, Any]:
        """`eval.geneval.judge_image` of one image's answers.

        Raises:
            ValueError: an object of an unknown class, or an answer is missing.
        """
        if "objects" not in answers:
            raise ValueError(f"prompt {prompt['id']!r} has no answer 'objects'")
        for name in answers["objects"]:
            self._check("class", name, self.classes, f"objects of prompt {prompt['id']!r}")

        def colors(name: str, detections: list[dict[str, Any]]) -> list[str]:
            key = f"color/{name}"
            if key in answers:
                return list(answers[key])[: len(detections)]
            named = [d.get("color") for d in detections]
            if None in named:
                raise ValueError(f"prompt {prompt['id']!r} has no answer {key!r}")
            return named

        return rule.judge_image(answers["objects"], prompt, classify_colors=colors)

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float, str]:
        verdict = self.judge(prompt, answers)
        return float(verdict["correct"]), verdict["reason"]

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        """results.jsonl, with a row for each judged image; metadata are the official ones, without our additions."""
        rows = []
        for prompt in prompts:
            metadata = {key: value for key, value in prompt.items() if key not in ("id", "rewritten")}
            images = judged[prompt["id"]].images if prompt["id"] in judged else ()
            rows += [
                rule.result_row(
                    self.picture_path(prompt, i, ""), answers["objects"], metadata, self.judge(prompt, answers)
                )
                for i, answers in enumerate(images)
                if answers is not None
            ]
        return {"results.jsonl": "".join(result_lines(rows))}

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """See `Benchmark.summarise`; also "tasks", "image_accuracy" and so on of `eval.geneval.summarise`. An image
        that was not judged is left out ("official") or wrong ("fixed")."""
        base.check_known(prompts, judged)
        rows: list[dict[str, Any]] = []
        images: list[float | None] = []
        whole = base.complete(prompts, judged)
        for prompt in prompts:
            scores = self.score(prompt, whole[prompt["id"]]).images
            images += scores
            rows += [
                {"tag": prompt["tag"], "metadata": prompt["id"], "correct": bool(score)}
                for score in scores
                if mode == "fixed" or score is not None
            ]
        failed = images.count(None)
        if failed == len(images):
            raise ValueError(f"none of {len(images)} images was judged")
        summary = rule.summarise(rows)
        return {
            **summary,
            "score": summary["overall"],
            "categories": {tag: task["accuracy"] for tag, task in summary["tasks"].items()},
            "expected": len(images),
            "scored": len(images) - failed,
            "failed": failed,
        }


BENCHMARK = GenEval()
