"""DPG-Bench's scoring, without any model.

    dpg_bench.csv --load_questions--> questions of each prompt, with their parents
    one picture per prompt, a grid --split_grid--> images --(a judge)--> answers
    answers --score_sample--> score of a prompt --summarise--> scores of the benchmark

An image's score is the share of its questions that score; a question scores if its answer is exactly "yes" and no
parent has the score 0 when it is visited, in the order of the CSV. So zeros cascade, but a parent further down has not
been visited yet. A prompt's score is the mean of its images.

Source: dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA at 3c228f1. `mode="official"` repeats these
bugs of the published numbers, `mode="fixed"` does not:

- the first row of the CSV is skipped: its prompt loses a question, and fails where another question depends on it;
- if rows of a prompt are not adjacent in the CSV, the last run of rows replaces the earlier ones;
- category scores come from the answers of the last image only, without the parents;
- a file that fails is dropped, as if it did not exist.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from eval.modes import Mode, check_mode

if TYPE_CHECKING:
    from PIL import Image

Question = dict[str, dict[int, Any]]  # qid2tuple, qid2dependency, qid2question
YES = "yes"
IMAGES = 4
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


def load_questions(path_or_text_file: str | os.PathLike[str] | TextIO, mode: Mode = "official") -> dict[str, Question]:
    """The questions of each prompt, in the order of the CSV.

    Args:
        path_or_text_file: dpg_bench.csv, or an open text file of it (opened with newline="").
        mode: see the top of this file.

    Returns:
        {item_id: {"qid2tuple": {qid: str}, "qid2dependency": {qid: [parent's qid, 0 for none]}, "qid2question":
        {qid: str}}}; item ids are strings, digits or not.

    Raises:
        ValueError: no such file, a missing column, a truncated row, or an invalid number; names the line.
    """
    check_mode(mode)
    questions: dict[str, Question] = {}
    previous = ""
    with _opened(path_or_text_file) as (file, name):
        for index, (line, row) in enumerate(_rows(file, name)):
            if index == 0 and mode == "official":
                continue
            item, qid = row["item_id"], _number(row["proposition_id"], "proposition_id", name, line)
            parents = [_number(part, "dependency", name, line) for part in row["dependency"].split(",")]
            if item not in questions or (mode == "official" and item != previous):
                questions[item] = {"qid2tuple": {}, "qid2dependency": {}, "qid2question": {}}
            group = questions[item]
            group["qid2tuple"][qid] = row["tuple"]
            group["qid2dependency"][qid] = parents
            group["qid2question"][qid] = row["question_natural_language"]
            previous = item
    return questions


def load_prompts(path_or_text_file: str | os.PathLike[str] | TextIO) -> dict[str, str]:
    """{item_id: prompt} of dpg_bench.csv's column "text", in its order.

    Raises:
        ValueError: see `load_questions`, or two texts for one item.
    """
    prompts: dict[str, str] = {}
    with _opened(path_or_text_file) as (file, name):
        for line, row in _rows(file, name, (*COLUMNS, "text")):
            if prompts.setdefault(row["item_id"], row["text"]) != row["text"]:
                raise ValueError(f"{name}, line {line}: prompt {row['item_id']!r} has another text above")
    return prompts


@contextlib.contextmanager
def _opened(path_or_text_file) -> Iterator[tuple[TextIO, str]]:
    if not isinstance(path_or_text_file, (str, os.PathLike)):
        yield path_or_text_file, getattr(path_or_text_file, "name", "the CSV")
        return
    path = Path(path_or_text_file)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; it must be dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA")
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield file, str(path)


def _rows(file: TextIO, name: str, columns: Sequence[str] = COLUMNS) -> Iterator[tuple[int, dict[str, str]]]:
    """(line of the row's end, row) for each row that is not blank."""
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = fields
                absent = [column for column in columns if column not in header]
                if absent:
                    raise ValueError(f"{name} has no column {', '.join(absent)}; its header is {', '.join(header)}")
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{name}, line {reader.line_num}: {len(fields)} fields, not {len(header)}; is the file cut short?"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; is the file cut short?") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    if not header:
        raise ValueError(f"{name} is empty")


def _number(text: str, column: str, name: str, line: int) -> int:
    try:
        return int(text.strip())
    except ValueError:
        raise ValueError(f"{name}, line {line}: {column} {text!r} must be a whole number") from None


def score_sample(
    answers: Mapping[int, Sequence[str]], dependency: Mapping[int, Sequence[int]], images: int | None = None
) -> dict[str, Any]:
    """The score of one prompt.

    Args:
        answers: {qid: one answer per image}; only exactly "yes" scores.
        dependency: {qid: parents}, 0 for none, of the same questions, in the order in which they are visited.
        images: number of images that count, from the first; None: all.

    Returns:
        {"score": mean of the images, "per_image": [share of questions that score], "raw": {qid: 1.0 or 0.0 for the
        last image, whatever its parents say}}

    Raises:
        ValueError: no questions or images, unequal numbers of answers, an answer that is not text, or a parent that is
            not a question (looked up only if no earlier parent scores 0, as in the official code).
    """
    count, raw, kept = _visit(answers, dependency, images)
    per_image = [sum(scores.values()) / len(scores) for scores in kept]
    return {"score": sum(per_image) / count, "per_image": per_image, "raw": raw[-1]}


def _visit(answers, dependency, images) -> tuple[int, list[dict[int, float]], list[dict[int, float]]]:
    """(number of images, each image's scores without the parents, and with them)."""
    if not answers:
        raise ValueError("there are no answers; a prompt needs at least one question")
    if answers.keys() != dependency.keys():
        odd = sorted(answers.keys() ^ dependency.keys())
        raise ValueError(f"questions {odd} must have both answers and a list of parents ([0] for none)")
    lengths = {len(texts) for texts in answers.values()}
    count = max(lengths) if images is None else images
    if count < 1:
        raise ValueError(f"{count} images; a prompt needs at least one")
    short = [qid for qid, texts in answers.items() if len(texts) < count]
    if short:
        raise ValueError(f"questions {short} have fewer than {count} answers; each needs one per image")
    raw, kept = [], []
    for image in range(count):
        scores = {}
        for qid, texts in answers.items():
            if not isinstance(texts[image], str):
                raise ValueError(f"answer {reprlib.repr(texts[image])} to question {qid} must be text")
            scores[qid] = float(texts[image] == YES)
        raw.append(dict(scores))
        for qid, parents in dependency.items():
            for parent in parents:
                if parent == 0:
                    continue
                if parent not in scores:
                    raise ValueError(f"question {qid} depends on question {parent}, which does not exist")
                if scores[parent] == 0:
                    scores[qid] = 0.0
                    break
        kept.append(scores)
    return count, raw, kept


def grid_boxes(resolution: int, images: int = IMAGES) -> list[tuple[int, int, int, int]]:
    """The boxes (x0, y0, x1, y1) of the first `images` of a 2 x 2 grid: top left, top right, bottom left, bottom right.

    Args:
        resolution: side of one image in pixels.
        images: at most 4; more are not in the official grid.

    Raises:
        ValueError: a resolution or number below 1.
    """
    if resolution < 1 or images < 1:
        raise ValueError(f"resolution={resolution} and images={images} must be at least 1")
    r = resolution
    return [(0, 0, r, r), (r, 0, 2 * r, r), (0, r, r, 2 * r), (r, r, 2 * r, 2 * r)][:images]


def split_grid(
    image: Image.Image, resolution: int | None = None, images: int = IMAGES, mode: Mode = "official"
) -> list[Image.Image]:
    """Cuts a picture into its images, in the order of `grid_boxes`.

    Args:
        image: the picture of a prompt.
        resolution: side of one image in pixels; None is half the picture's width, or all of it if images=1.
        images: number of images to cut.
        mode: "official" cuts wherever `resolution` says, and gives black outside the picture; "fixed" refuses a picture
            that is not the grid.

    Raises:
        ValueError: see `grid_boxes`; mode="fixed" and another size than the grid's.
    """
    check_mode(mode)
    resolution = image.width // (1 if images == 1 else 2) if resolution is None else resolution
    if mode == "fixed":
        r = resolution
        sizes = [(2 * r, 2 * r), (r, r)] if images == 1 else [(2 * r, 2 * r)]
        if image.size not in sizes or images > IMAGES:
            raise ValueError(
                f"a picture of {image.width} x {image.height} px is not a grid of {images} images of {r} px; it must be "
                f"{2 * r} x {2 * r}"
            )
    return [image.crop(box) for box in grid_boxes(resolution, images)]


def item_of(filename: str | os.PathLike[str]) -> str:
    """The item id of a picture: its name up to the first dot."""
    return os.path.basename(filename).split(".")[0]


def result_line(filename: str, per_image: Sequence[float], score: float) -> str:
    """One line of the official results file, with its newline: name, score of each image, score of the prompt."""
    return ", ".join([filename, *map(str, per_image), str(score)]) + "\n"


def detail_line(filename: str, crop: Sequence[int], question: str, answer: str) -> str:
    """One line of the official details file, without its newline: name, box, question, answer."""
    return f"{filename}, {tuple(crop)}, {question}, {answer}"


def read_results(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Reads an official results file up to its summary: {item_id: {"score", "per_image"}}.

    Raises:
        ValueError: the file is missing, or a line before the summary is not a result; names the line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a results file of DPG-Bench")
    results: dict[str, dict[str, Any]] = {}
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("Model: "):
                break
            parts = line.rstrip("\n").split(", ")
            scores: list[float] = []
            with contextlib.suppress(ValueError):  # ends at the name, which may contain ", "
                while parts:
                    scores.insert(0, float(parts[-1]))
                    parts.pop()
            if not parts or len(scores) < 2:
                raise ValueError(f"{path}, line {number}: {line.rstrip()!r} is not a result (name, scores)")
            results[item_of(", ".join(parts))] = {"score": scores[-1], "per_image": scores[:-1]}
    return results


_DETAIL = re.compile(r"(.*?), (\(\d+, \d+, \d+, \d+\)), (.*)", re.S)


def read_details(path: str | os.PathLike[str], questions: Mapping[str, Question]) -> dict[str, dict[int, list[str]]]:
    """Reads an official details file: the answers of each prompt, for `summarise`.

    The official code appends a line for each image and question, and appends again when it is run again: the last
    answer counts. A line without a box continues the answer before it.

    Args:
        questions: see `load_questions`, of the mode in which the file was written.

    Returns:
        {item_id: {qid: one answer per image, in the order of the file}}

    Raises:
        ValueError: the file is missing, a line is about another prompt or question than those of `questions`, or an
            answer is missing; names the line or the prompt.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a details file of DPG-Bench (..._detail.txt)")
    answers: dict[str, dict[str, dict[int, str]]] = {}  # item, box, qid
    for number, name, box, text in _details(path):
        item = item_of(name)
        group = questions.get(item)
        if group is None:
            raise ValueError(f"{path}, line {number}: {item!r} is not a prompt of the benchmark")
        texts = group["qid2question"]
        # The longest, since a question may begin with another one and a comma.
        asked = max((question for question in texts.values() if text.startswith(f"{question}, ")), key=len, default="")
        if not asked:
            raise ValueError(f"{path}, line {number}: {text!r} does not begin with a question of prompt {item!r}")
        of_image = answers.setdefault(item, {}).setdefault(box, {})
        qids = [qid for qid, question in texts.items() if question == asked]
        # Questions of one text are asked in their order; a second run answers the first of them again.
        qid = next((qid for qid in qids if qid not in of_image), None)
        if qid is None:
            for repeated in qids:
                of_image.pop(repeated)
            qid = qids[0]
        of_image[qid] = text[len(asked) + 2 :]
    result: dict[str, dict[int, list[str]]] = {}
    for item, boxes in answers.items():
        qids = list(questions[item]["qid2question"])
        absent = [(box, qid) for box, of_image in boxes.items() for qid in qids if qid not in of_image]
        if absent:
            raise ValueError(f"{path}: prompt {item!r} has no answer to question {absent[0][1]} about {absent[0][0]}")
        result[item] = {qid: [of_image[qid] for of_image in boxes.values()] for qid in qids}
    return result


def _details(path: str | os.PathLike[str]) -> list[tuple[int, str, str, str]]:
    """(line number, name, box, question and answer) of each image and question of a details file."""
    rows: list[tuple[int, str, str, str]] = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\n")
            match = _DETAIL.fullmatch(line)
            if match:
                rows.append((number, *match.groups()))
            elif rows:
                rows[-1] = (*rows[-1][:3], f"{rows[-1][3]}\n{line}")
            else:
                raise ValueError(f"{path}, line 1: {line!r} is not an answer (name, box, question, answer)")
    return rows


def summarise(
    answers: Mapping[str, Mapping[int, Sequence[str]]],
    questions: Mapping[str, Question],
    mode: Mode = "official",
    images: int = IMAGES,
) -> dict[str, Any]:
    """The scores of the benchmark, in 0..100; the order of `answers` does not matter.

    Args:
        answers: {item_id: {qid: one answer per image}}; answers to questions that `questions` lacks are not read.
        questions: see `load_questions`, of the same mode.
        mode: "official" drops what fails. "fixed" counts a prompt of `questions` without complete answers as 0, and
            scores categories over all images, with the parents; a parent that is not a question is ignored.
        images: images per prompt.

    Returns:
        {"score", "categories": both levels, such as "entity" and "entity - whole", "l1", "l2": each level alone,
        "failed": item ids without a score, sorted; "errors": {item_id: why}; "missing": item ids of
        `questions` without answers; "scored": number of prompts scored; "prompts": {item_id: {"score" and
        "per_image" in 0..1}}}

    Raises:
        ValueError: nothing could be scored.
    """
    check_mode(mode)
    prompts: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    l1: dict[str, list[float]] = {}
    l2: dict[str, list[float]] = {}
    items = answers if mode == "official" else questions
    for item in items:
        category_scores: list[dict[int, float]] = []
        group = questions.get(item)
        try:
            if group is None:
                raise ValueError("it is not a prompt of the benchmark")
            if item not in answers:
                raise ValueError("it has no answers")
            count, raw, kept = _visit(*answers_of(answers[item], group, mode), images)
            per_image = [sum(scores.values()) / len(scores) for scores in kept]
            prompts[item] = {"score": sum(per_image) / count, "per_image": per_image}
            category_scores = raw[-1:] if mode == "official" else kept
        except ValueError as error:
            errors[item] = str(error)
            if mode == "official":
                continue
            prompts[item] = {"score": 0.0, "per_image": [0.0] * images}
            category_scores = [dict.fromkeys(group["qid2tuple"], 0.0)] * images
        for qid, text in group["qid2tuple"].items():
            category = text.split("(")[0].strip()
            values = [scores[qid] for scores in category_scores]
            l2.setdefault(category, []).extend(values)
            l1.setdefault(category.split("-")[0].strip(), []).extend(values)
    if mode == "fixed":
        errors |= {item: "it is not a prompt of the benchmark" for item in answers if item not in questions}
    if not prompts or len(prompts) == len(set(prompts) & set(errors)):
        example = next(iter(errors.items()), ("", "there are no answers"))
        raise ValueError(f"no prompt could be scored; {example[0]!r}: {example[1]}")
    broad = {name: 100 * math.fsum(values) / len(values) for name, values in sorted(l1.items())}
    narrow = {name: 100 * math.fsum(values) / len(values) for name, values in sorted(l2.items())}
    return {
        "score": 100 * math.fsum(p["score"] for p in prompts.values()) / len(prompts),
        "categories": {**narrow, **broad},
        "l1": broad,
        "l2": narrow,
        "failed": sorted(errors),
        "errors": errors,
        "missing": sorted(item for item in questions if item not in answers),
        "scored": len(prompts.keys() - errors.keys()),
        "prompts": prompts,
    }


def answers_of(
    answers: Mapping[int, Sequence[str]], group: Question, mode: Mode = "official"
) -> tuple[dict[int, Sequence[str]], dict[int, list[int]]]:
    """(answers, dependency) of one prompt for `score_sample`: those of its questions; mode="fixed" leaves out parents
    that are not questions.

    Raises:
        ValueError: a question has no answers.
    """
    absent = [qid for qid in group["qid2question"] if qid not in answers]
    if absent:
        raise ValueError(f"it has no answers to questions {absent}")
    dependency = group["qid2dependency"]
    if mode == "fixed":
        dependency = {qid: [p for p in parents if p in dependency] for qid, parents in dependency.items()}
    return {qid: answers[qid] for qid in group["qid2question"]}, dependency


def summary_text(summary: Mapping[str, Any], model: str, image_path: str, results_path: str) -> str:
    """The summary that the official code appends to its results file; first-level categories are sorted here, and in
    no fixed order there."""
    out = io.StringIO()
    out.write(f"Model: {model}\nL1 category scores:\n")
    out.writelines(f"\t{name}: {score}\n" for name, score in summary["l1"].items())
    out.write("L2 category scores:\n")
    out.writelines(f"\t{name}: {score}\n" for name, score in summary["l2"].items())
    out.write(f"Image path: {image_path}\nSave results to: {results_path}\nDPG-Bench score: {summary['score']}\n")
    return out.getvalue()
