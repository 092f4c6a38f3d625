"""The benchmark `dpg`: a visual question answering model says yes or no to the questions of long prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import dpg as rule
from eval.benchmarks import base
from eval.benchmarks.base import AnswerType, Benchmark, Judged, Mode, Prompt, Question, Source
from eval.benchmarks.published import NUCLEUS, QWEN, printed_in

PROMPTS = "dpg_bench/dpg_bench.csv"
# As the official code names them, without the time.
RESULTS, DETAILS = "dpg-bench_results.txt", "dpg-bench_results_detail.txt"


class DPG(Benchmark):
    """See `eval.benchmarks.base.Benchmark`; the rule is `eval.dpg`'s."""

    name = "dpg"
    version = "TencentQQGYLab/ELLA@3c228f1"
    scale = 100.0
    tasks = ("dpg",)
    prompt_count = 1065
    images_per_prompt = rule.IMAGES
    grid = (2, 2)
    judges: Mapping[str, str] = {"vqa": "damo/mplug_visual-question-answering_coco_large_en (modelscope)"}
    # Not the official mPLUG, whose weights no hub keeps by commit: the score is dpg[qwen2.5-vl-7b-yes-no].
    recommended_judges: Mapping[str, str] = {"vqa": "qwen2.5-vl-7b-yes-no"}
    answer_types: Mapping[str, AnswerType] = {"vqa": "text"}
    vocabulary: Mapping[str, str] = {"vqa": rule.YES}
    data = "dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA (1,065 prompts)"
    source = Source("TencentQQGYLab/ELLA", "3c228f1dc6c4d3cad0a47493816151a419f14db3", {PROMPTS: None}, prompts=PROMPTS)
    published = (
        *printed_in(
            NUCLEUS, {"Nucleus-Image": {"overall": 88.79, "entity": 93.08, "attribute": 92.20, "other": 93.62}}
        ),
        *printed_in(
            QWEN,
            {
                "Qwen-Image": 88.32,
                "Seedream 3.0": 88.27,
                "HiDream-I1-Full": 85.89,
                "GPT Image 1 (high)": 85.15,
                "FLUX.1-dev": 83.84,
            },
        ),
    )

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """The prompts of the official CSV; an id is an item id.

        "questions" and, where the official code reads others, "official_questions" are lists of [qid, tuple, parents,
        question]; "official_questions" is None where the official code knows no question of the prompt.

        Raises:
            ValueError: see `eval.dpg.load_questions`.
        """
        path = base.required(path, self)
        texts = rule.load_prompts(path)
        fixed, official = rule.load_questions(path, "fixed"), rule.load_questions(path, "official")
        prompts = []
        for item, text in texts.items():
            prompt = {"id": item, "prompt": text, "tag": "dpg", "questions": _rows(fixed[item])}
            theirs = _rows(official[item]) if item in official else None
            prompts.append(prompt if theirs == prompt["questions"] else {**prompt, "official_questions": theirs})
        return prompts

    def picture_path(self, prompt: Prompt, image: int, model: str) -> str:
        return f"{prompt['id']}.png"

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """One for each question; the answer is the judge's text, unchanged."""
        return [Question("vqa", str(q[0]), q[3]) for q in prompt["questions"] if str(q[0]) not in answers]

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float, str]:
        """Official and fixed scores are equal, except for the prompt whose first question is skipped."""
        try:
            chosen = rule.answers_of(_answers([answers]), _group(prompt["questions"]), "fixed")
            score = rule.score_sample(*chosen)["score"]
        except ValueError as error:
            raise ValueError(f"prompt {prompt['id']!r}: {error}") from None
        return score, "\n".join(text for qid, _, _, text in prompt["questions"] if answers[str(qid)] != rule.YES)

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        """The results file, with its summary, and the file of details."""
        summary = self.summarise(prompts, judged, "official")
        lines, details = [], []
        for prompt in prompts:
            scored = summary["prompts"].get(prompt["id"])
            if scored is None:  # the official code drops it
                continue
            name, images = self.picture_path(prompt, 0, ""), judged[prompt["id"]].images
            lines.append(rule.result_line(name, scored["per_image"], scored["score"]))
            for box, answers in zip(rule.grid_boxes(image_size_px, len(images)), images):
                for qid, _, _, question in _questions(prompt, "official") or ():
                    details.append(rule.detail_line(name, box, question, answers[str(qid)]) + "\n")
        lines.append(rule.summary_text(summary, label, ".", RESULTS))
        return {RESULTS: "".join(lines), DETAILS: "".join(details)}

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """See `Benchmark.summarise`; also what `eval.dpg.summarise` returns. It counts prompts: one that misses an
        image is left out ("official") or has the score 0 ("fixed")."""
        base.check_known(prompts, judged)
        questions = {prompt["id"]: _group(rows) for prompt in prompts if (rows := _questions(prompt, mode)) is not None}
        answers = {
            key: _answers(value.images) for key, value in judged.items() if value.images and None not in value.images
        }
        images = max(len(value.images) for value in base.complete(prompts, judged).values())
        summary = rule.summarise(answers, questions, mode, images)
        counts = {"expected": len(prompts), "scored": summary["scored"], "failed": len(prompts) - summary["scored"]}
        return {**summary, **counts, "failed_items": sorted({*summary["failed"], *summary["missing"]})}


def _questions(prompt: Prompt, mode: Mode) -> list[list[Any]] | None:
    return prompt.get("official_questions", prompt["questions"]) if mode == "official" else prompt["questions"]


def _rows(group: rule.Question) -> list[list[Any]]:
    return [
        [qid, group["qid2tuple"][qid], group["qid2dependency"][qid], text]
        for qid, text in group["qid2question"].items()
    ]


def _group(rows: Sequence[Sequence[Any]]) -> rule.Question:
    return {
        "qid2tuple": {qid: text for qid, text, _, _ in rows},
        "qid2dependency": {qid: parents for qid, _, parents, _ in rows},
        "qid2question": {qid: question for qid, _, _, question in rows},
    }


def _answers(images: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Per question, as `eval.dpg` takes them; a question that an image lacks is left out."""
    shared = [key for key in images[0] if all(key in answers for answers in images)]
    return {int(key): [answers[key] for answers in images] for key in shared}


BENCHMARK = DPG()
