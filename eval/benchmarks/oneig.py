"""The benchmarks `oneig` and `oneig-zh`: five dimensions, each with its own prompts and judges.

class            alignment  text  reasoning  style                diversity
anime            x                           prompts with a style  x
human, object    x                                                 x
multilingualism  x (Chinese only)                                  x
text                        x                                      x
reasoning                         x                                x
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from eval import oneig as rule
from eval.benchmarks import base
from eval.benchmarks.base import AnswerType, Benchmark, Judged, Mode, Pooling, Prompt, Question, Scored, Source
from eval.benchmarks.published import NUCLEUS, QWEN, printed_in

CLASS_OF = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
COMMIT = "41b49831e79e6dde5323618c164da1c4cf0f699d"
ALIGNED = ("anime", "human", "object")  # classes with a file of questions
PUBLISHED = {
    "oneig": (
        *printed_in(NUCLEUS, {"Nucleus-Image": {"overall": 0.522, "style": 0.430}}),
        *printed_in(
            QWEN,
            {
                "Qwen-Image": {"overall": 0.539, "style": 0.418},
                "GPT Image 1 (high)": {"overall": 0.533, "style": 0.462},
                "Seedream 3.0": 0.530,
                "Imagen 4": 0.515,
                "HiDream-I1-Full": 0.477,
                "SD3.5 Large": 0.462,
                "FLUX.1-dev": 0.434,
                "SDXL": 0.316,
            },
        ),
    ),
    "oneig-zh": printed_in(
        QWEN,
        {"Qwen-Image": 0.548, "Seedream 3.0": 0.528, "GPT Image 1 (high)": 0.474, "HiDream-I1-Full": 0.337},
    ),
    "oneig-text": printed_in(
        QWEN,
        {
            "Qwen-Image": 0.891,
            "Seedream 3.0": 0.865,
            "GPT Image 1 (high)": 0.857,
            "HiDream-I1-Full": 0.707,
            "FLUX.1-dev": 0.523,
            "SDXL": 0.029,
        },
    ),
    "oneig-text-zh": printed_in(
        QWEN,
        {"Qwen-Image": 0.963, "Seedream 3.0": 0.928, "GPT Image 1 (high)": 0.650, "HiDream-I1-Full": 0.205},
    ),
}
OCR_PROMPT = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating previously mentioned "
    "content. If no text is recognized, please reply with 'No text recognized'."
)


class OneIG(Benchmark):
    """See `eval.benchmarks.base.Benchmark`; the rule is `eval.oneig`'s."""

    version = "OneIG-Bench/OneIG-Benchmark@41b4983"
    images_per_prompt = 4
    grid = (2, 2)
    optional_judges = frozenset({"vqa", "ocr", "reasoning", "style", "diversity"})
    judges: Mapping[str, str] = {
        "vqa": "Qwen/Qwen2.5-VL-7B-Instruct",
        "ocr": "Qwen/Qwen2.5-VL-7B-Instruct",
        "reasoning": "microsoft/LLM2CLIP-Openai-L-14-336 with LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        "style": "CSD ViT-L and xingpng/OneIG-StyleEncoder",
        "diversity": "dreamsim 0.2.1, ensemble",
    }
    # The other three need a commit or a directory of weights: without them the score is oneig[qwen2.5-vl-7b].
    recommended_judges: Mapping[str, str] = {"vqa": "qwen2.5-vl-7b", "ocr": "qwen2.5-vl-7b"}
    answer_types: Mapping[str, AnswerType] = {
        "vqa": "text",
        "ocr": "text",
        "reasoning": "number",
        "style": "number",
        "diversity": "numbers",
    }
    vocabulary: Mapping[str, str] = {"vqa": rule.YES}
    pooling: Pooling = "parts"
    jpeg_tiles = True

    def __init__(self, language: Literal["EN", "ZH"]):
        chinese = language == "ZH"
        self.language: Literal["EN", "ZH"] = language
        self.name = "oneig-zh" if chinese else "oneig"
        self.tasks = tuple(CLASS_OF.values()) if chinese else tuple(CLASS_OF.values())[:-1]
        self._table, self._column = ("OneIG-Bench-ZH.csv", "prompt_cn") if chinese else ("OneIG-Bench.csv", "prompt_en")
        self._suffix = "_zh" if chinese else ""
        self.prompt_count = 1320 if chinese else 1120
        self.published = PUBLISHED[self.name]
        files = [self._table, f"scripts/text/text_content{self._suffix}.csv", "scripts/style/style.csv"]
        files += [f"scripts/reasoning/gt_answer{self._suffix}.json"]
        classes = (*ALIGNED, "multilingualism") if chinese else ALIGNED
        files += [f"scripts/alignment/Q_D/{name}{self._suffix}.json" for name in classes]
        self.source = Source("OneIG-Bench/OneIG-Benchmark", COMMIT, dict.fromkeys(files), prompts="")
        self.data = f"a checkout of github.com/OneIG-Bench/OneIG-Benchmark ({self._table}, scripts/; {self.prompt_count:,} prompts)"

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        """The prompts of a checkout; an id is "<class>_<id>".

        What the rule reads: "questions" ([qid, parents, question]), "text_content", "answer" and "style", each where
        the prompt has one.

        Raises:
            ValueError: a file of the checkout is absent or malformed, or has no row for a prompt.
        """
        root = base.required(path, self)
        texts = self._table_of(root, f"scripts/text/text_content{self._suffix}.csv", "id", "text_content")
        styles = self._table_of(root, "scripts/style/style.csv", "id", "class")
        answers = self._json(root, f"scripts/reasoning/gt_answer{self._suffix}.json")
        questions: dict[str, Any] = {}
        prompts = []
        for line, row in self._csv_rows(root / self._table, ("category", "id", self._column)):
            if row["category"] not in CLASS_OF:
                raise ValueError(
                    f"{root / self._table}, line {line}: category {row['category']!r} must be one of "
                    f"{', '.join(CLASS_OF)}"
                )
            tag, number = CLASS_OF[row["category"]], row["id"]
            prompt: dict[str, Any] = {"id": f"{tag}_{number}", "prompt": row[self._column], "tag": tag}
            if tag == "text":
                prompt["text_content"] = self._entry(texts, number, prompt)
            elif tag == "reasoning":
                prompt["answer"] = self._entry(answers, number, prompt)
            else:
                if tag not in questions:
                    questions[tag] = self._json(root, f"scripts/alignment/Q_D/{tag}{self._suffix}.json")
                prompt["questions"] = self._questions(self._entry(questions[tag], number, prompt), prompt)
                if tag == "anime" and (style := rule.style_name(self._entry(styles, number, prompt))):
                    prompt["style"] = style
            prompts.append(prompt)
        return prompts

    @staticmethod
    def _entry(table: Mapping[str, Any], number: str, prompt: Prompt) -> Any:
        if number not in table:
            raise ValueError(f"the checkout has no entry {number!r} for prompt {prompt['id']!r}")
        return table[number]

    @staticmethod
    def _questions(entry: Mapping[str, Any], prompt: Prompt) -> list[list[Any]]:
        try:
            question, dependency = (
                {int(qid): value for qid, value in (json.loads(part) if isinstance(part, str) else part).items()}
                for part in (entry["question"], entry["dependency"])
            )
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"the questions of prompt {prompt['id']!r} cannot be read: {error!r}") from None
        return [[qid, list(dependency.get(qid, ())), text] for qid, text in question.items()]

    @staticmethod
    def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; it belongs to github.com/OneIG-Bench/OneIG-Benchmark")
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [column for column in columns if column not in (reader.fieldnames or ())]
            if absent:
                raise ValueError(
                    f"{path} has no column {', '.join(absent)}; it has {', '.join(reader.fieldnames or ())}"
                )
            try:
                for row in reader:
                    if None in row or None in row.values():
                        raise ValueError(f"{path}, line {reader.line_num}: a row of another length; is it cut short?")
                    yield reader.line_num, row
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}; is the file cut short?") from error

    def _table_of(self, root: Path, name: str, key: str, value: str) -> dict[str, str]:
        return {row[key]: row[value] for _, row in self._csv_rows(root / name, (key, value))}

    @staticmethod
    def _json(root: Path, name: str) -> dict[str, Any]:
        path = root / name
        if not path.is_file():
            raise ValueError(f"{path} is not a file; it belongs to github.com/OneIG-Bench/OneIG-Benchmark")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error

    def picture_path(self, prompt: Prompt, image: int, model: str) -> str:
        tag, _, number = prompt["id"].rpartition("_")
        return f"{tag}/{model}/{number}.webp"

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        """The questions of each dimension of the prompt.

        Answers: "vqa" the judge's text as it is; "ocr" its text; "style" the tile's `eval.oneig.style_score` against
        the references of options["style"]; "reasoning" the cosine to the text; "diversity" (together) the distances of
        all pairs of tiles, (0, 1), (0, 2), ..., in the order of the tiles that are not black.
        """
        asked = [Question("diversity", "diversity", together=True)]
        for qid, _, text in prompt.get("questions", ()):
            asked.append(Question("vqa", str(qid), f"{text}. Please answer 'Yes' or 'No' only."))
        if "text_content" in prompt:
            tokens = rule.max_new_tokens(prompt["text_content"])
            asked.append(Question("ocr", "ocr", OCR_PROMPT, {"max_new_tokens": tokens}))
        if "answer" in prompt:
            asked.append(Question("reasoning", "reasoning", prompt["answer"]))
        if "style" in prompt:
            asked.append(Question("style", "style", options={"style": prompt["style"]}))
        return [question for question in asked if question.key not in answers]

    def score(self, prompt: Prompt, judged: Judged) -> Scored:
        """`subscores` has a score for each dimension that has a judge; `score` is that of alignment, text or reasoning. A text image's score
        is the text formula on that image alone: a unit for error bars, not part of the official score."""
        images = [answers for answers in judged.images if answers is not None]
        scored = super().score(prompt, judged)
        subscores: dict[str, float | None] = {self.dimension(prompt): scored.score}
        if "style" in prompt:
            subscores["style"] = base.mean([answers.get("style") for answers in images])
        if len(images) > 1 and "diversity" in judged.together:
            subscores["diversity"] = rule.diversity_score(judged.together["diversity"])
        return replace(scored, subscores=subscores)

    @staticmethod
    def dimension(prompt: Prompt) -> str:
        return prompt["tag"] if prompt["tag"] in ("text", "reasoning") else "alignment"

    @staticmethod
    def _answer(prompt: Prompt, answers: Mapping[str, Any], key: str) -> Any:
        if key not in answers:
            raise ValueError(f"prompt {prompt['id']!r} has no answer {key!r}")
        return answers[key]

    def score_image(self, prompt: Prompt, answers: Mapping[str, Any]) -> tuple[float | None, str]:
        """No score if its dimension has no judge; a single missing answer is an error."""
        keys = ["ocr"] if "text_content" in prompt else ["reasoning"] if "answer" in prompt else []
        if not answers.keys() & {*keys, *(str(question[0]) for question in prompt.get("questions", ()))}:
            return None, "not judged"
        if "text_content" in prompt:
            text = self._answer(prompt, answers, "ocr")
            edits, exact, ratio = rule.compare_text(prompt["text_content"], text)
            return rule.text_score(edits, exact, ratio, self.language), "" if exact else f"read {text!r}"
        if "answer" in prompt:
            return self._answer(prompt, answers, "reasoning"), ""
        replies = {qid: [self._answer(prompt, answers, str(qid))] for qid, _, _ in prompt["questions"]}
        score = rule.alignment_score(replies, {qid: parents for qid, parents, _ in prompt["questions"]})
        no = [text for qid, _, text in prompt["questions"] if replies[qid][0] != rule.YES]
        return score, "\n".join(no)

    def official_files(
        self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], image_size_px: int, label: str = "model"
    ) -> dict[str, str]:
        """The CSVs of each dimension that was judged."""
        dimensions = self.summarise(prompts, judged, "official")["dimensions"]
        files: dict[str, str] = {}
        for name, summary in dimensions.items():
            files |= rule.official_files(name, summary, label, self.language)
        return files

    def summarise(self, prompts: Sequence[Prompt], judged: Mapping[str, Judged], mode: Mode) -> dict[str, Any]:
        """See `Benchmark.summarise`; "dimensions" has what the `eval.oneig.summarise_...` return, and "categories"
        their scores. "score" is the mean of the dimensions that were scored; "missing_dimensions" names the others.

        The dimensions leave out images that were not judged in both modes, as black tiles are; `failed` counts them.

        Where the official script of text stops, since the first picture that it reads is all black, the official text and
        "score" are None and "notes" says why.
        """
        base.check_known(prompts, judged)
        whole = base.complete(prompts, judged)
        scores: dict[str, dict[str, float | None]] = {
            name: {} for name in ("alignment", "reasoning", "style", "diversity")
        }
        contents: dict[str, str] = {}
        ocr: dict[str, list[str] | None] = {}
        styles: dict[str, str] = {}
        expected = failed = 0
        for prompt in prompts:
            answers = whole[prompt["id"]]
            expected += len(answers.images)
            failed += sum(image is None for image in answers.images)
            key, number = prompt["id"], prompt["id"].rpartition("_")[2]
            subscores = self.score(prompt, answers).subscores
            scores["diversity"][key] = subscores.get("diversity")
            dimension = self.dimension(prompt)
            if dimension == "text":
                contents[number] = prompt["text_content"]
                texts = [image["ocr"] for image in answers.images if image is not None and "ocr" in image]
                # An all-black picture has no texts; a prompt without a picture has None.
                read = key in judged and (texts or all(image is None for image in answers.images))
                ocr[number] = texts if read else None
            else:
                scores[dimension][key if dimension == "alignment" else number] = subscores[dimension]
            if "style" in prompt:
                styles[number], scores["style"][number] = prompt["style"], subscores["style"]
        dimensions: dict[str, dict[str, Any]] = {}
        categories: dict[str, float | None] = {}
        notes = []
        classes = [task for task in self.tasks if any(prompt["tag"] == task for prompt in prompts)]
        for name, summarise in (
            ("alignment", lambda: rule.summarise_alignment(scores["alignment"])),
            ("text", lambda: rule.summarise_text(contents, ocr, self.language, mode)),
            ("reasoning", lambda: rule.summarise_reasoning(scores["reasoning"])),
            ("style", lambda: rule.summarise_style(styles, scores["style"])),
            ("diversity", lambda: rule.summarise_diversity(scores["diversity"], classes)),
        ):
            if not (any(ocr.values()) if name == "text" else any(v is not None for v in scores[name].values())):
                continue
            if name == "text" and mode == "official" and next(v for v in ocr.values() if v is not None) == []:
                categories[name] = None
                notes.append(
                    "no official score of text: its script stops where the first picture that it reads is all black"
                )
                continue
            dimensions[name] = summarise()
            categories[name] = dimensions[name]["score"]
        if not categories:
            raise ValueError(f"none of {len(prompts)} prompts has an image that was judged")
        missing = [name for name in rule.DIMENSIONS if name not in categories]
        return {
            "score": None if None in categories.values() else base.mean(list(categories.values())),
            "notes": notes,
            "categories": categories,
            "dimensions": dimensions,
            "missing_dimensions": missing,
            "expected": expected,
            "scored": expected - failed,
            "failed": failed,
        }


class OneIGText(OneIG):
    """The text dimension alone: its prompts, and only the judge of text."""

    judges: Mapping[str, str] = {"ocr": OneIG.judges["ocr"]}
    recommended_judges: Mapping[str, str] = {"ocr": "qwen2.5-vl-7b"}
    packaged_judges: Mapping[str, str] = {"ocr": "pp-ocr"}

    def __init__(self, language: Literal["EN", "ZH"]):
        super().__init__(language)
        self.name = self.name.replace("oneig", "oneig-text")
        self.published = PUBLISHED[self.name]
        self.tasks = ("text",)
        self.prompt_count = 200

    def prompts(self, path: str | Path | None = None) -> list[dict[str, Any]]:
        return [prompt for prompt in super().prompts(path) if prompt["tag"] == "text"]

    def questions(self, prompt: Prompt, answers: Mapping[str, Any]) -> list[Question]:
        return [question for question in super().questions(prompt, answers) if question.judge in self.judges]

    def score(self, prompt: Prompt, judged: Judged) -> Scored:
        scored = super().score(prompt, Judged(judged.images, {"diversity": ()}))
        return replace(scored, subscores={"text": scored.subscores["text"]})


ENGLISH = OneIG("EN")
CHINESE = OneIG("ZH")
ENGLISH_TEXT = OneIGText("EN")
CHINESE_TEXT = OneIGText("ZH")
