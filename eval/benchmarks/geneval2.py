"""The benchmark `geneval2`: a vision-language model says how probable the expected answer of each question is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval import geneval2 as rule
from eval.benchmarks import base
from eval.benchmarks.base import AnswerType, Benchmark, Judged, Mode, Prompt, Question, Scored, Source
from eval.benchmarks.published import printed_in

PROMPTS = "geneval2_data.jsonl"


class GenEval2(Benchmark):
    """See `eval.benchmarks.base.Benchmark`; the rule is `eval.geneval2`'s. The headline is Soft-TIFA GM."""

    name = "geneval2"
    version = "facebookresearch/GenEval2@c088ab7"
    scale = 100.0
    tasks = tuple(str(count) for count in rule.ATOMICITIES)
    prompt_count = 800
    judges: Mapping[str, str] = {"soft_tifa": "Qwen/Qwen3-VL-8B-Instruct"}
    recommended_judges: Mapping[str, str] = {"soft_tifa": "qwen3-vl-8b"}
    answer_types: Mapping[str, AnswerType] = {"soft_tifa": "number"}
    data = "geneval2_data.jsonl of github.com/facebookresearch/GenEval2 (800 prompts)"
    source = Source(
        "facebookresearch/GenEval2", "c088ab7f65a38ce87f2c5d0ae28bf65bd5ba37b0", {PROMPTS: None}, prompts=PROMPTS
    )
    # Soft-TIFA GM. No figure of Nucleus-Image is published.
    published = printed_in(
        "GenEval 2, arXiv 2512.16853, table 4, by way of two works that quote it", {"Gemini 2.5 Flash Image": 44.6}
    )

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """The prompts of a file in the official form; the tag is the number of atoms.

        Raises:
            ValueError: no such file, or a malformed line.
        """
        rows = rule.load_prompts(base.required(path, self))
        return [{"id": f"{index:04d}", "tag": str(row["atom_count"]), **row} for index, row in enumerate(rows)]

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """One for each pair of "vqa_list"; options are {"answers": the replies whose probabilities are summed}, and the
        answer is their sum."""
        return [
            Question("soft_tifa", str(i), rule.question_text(text), {"answers": rule.expected_answers(text, answer)})
            for i, (text, answer) in enumerate(prompt["vqa_list"])
            if str(i) not in answers
        ]

    def _values(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[float]:
        absent = [i for i in range(len(prompt["vqa_list"])) if str(i) not in answers]
        if absent:
            raise ValueError(f"prompt {prompt['id']!r} has no answers to questions {absent}")
        return [float(answers[str(i)]) for i in range(len(prompt["vqa_list"]))]

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float, str]:
        """Soft-TIFA GM, and the question of the lowest value."""
        values = self._values(prompt, answers)
        low = min(range(len(values)), key=values.__getitem__)
        reason = f"{prompt['vqa_list'][low][0]} {values[low]:.2f}" if values[low] < 0.5 else ""
        return rule.soft_tifa(values)["gm"], reason

    def score(self, prompt: Prompt, judged: Judged) -> Scored:
        scored = super().score(prompt, judged)
        am = [rule.soft_tifa(self._values(prompt, a))["am"] for a in judged.images if a is not None]
        return replace(scored, subscores={"gm": scored.score, "am": base.mean(am)})

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        """score_lists.json; with several images per prompt, score_lists_0.json and so on, since the official file has
        one. Images that some prompt lacks have no file: the official code reads a list for every prompt."""
        whole = base.complete(prompts, judged)
        images = min(len(answers.images) for answers in whole.values())
        files = {}
        for i in range(images):
            of_number = [whole[prompt["id"]].images[i] for prompt in prompts]
            if None not in of_number:
                lists = [self._values(prompt, answers) for prompt, answers in zip(prompts, of_number, strict=True)]
                files["score_lists.json" if images == 1 else f"score_lists_{i}.json"] = rule.scores_text(lists)
        return files

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """See `Benchmark.summarise`; also "am", "gm", "skills" and "atomicity" of `eval.geneval2.summarise`. Several
        images of a prompt count as separate prompts. An image that was not judged is left out ("official": the official
        code stops there) or has the score 0 for each question ("fixed")."""
        base.check_known(prompts, judged)
        whole = base.complete(prompts, judged)
        scores: list[list[float]] = []
        rows: list[Prompt] = []
        failed = expected = 0
        for prompt in prompts:
            for answers in whole[prompt["id"]].images:
                expected += 1
                failed += answers is None
                if answers is None and mode == "official":
                    continue
                scores.append([0.0] * len(prompt["vqa_list"]) if answers is None else self._values(prompt, answers))
                rows.append(prompt)
        if failed == expected:
            raise ValueError(f"none of {expected} images was judged")
        summary = rule.summarise(scores, rows)
        categories = {**summary["skills"], **{f"{n} atoms": value for n, value in summary["atomicity"].items()}}
        counts = {"expected": expected, "scored": expected - failed, "failed": failed}
        return {**summary, "score": summary["gm"], "categories": categories, **counts}


BENCHMARK = GenEval2()
