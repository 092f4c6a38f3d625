"""GenEval 2's scoring (Soft-TIFA), without any model.

    geneval2_data.jsonl: questions and answers of each prompt --(a judge: probability of the expected answers)-->
    scores of a prompt --soft_tifa--> arithmetic and geometric mean --summarise--> scores of the benchmark

The judge is asked "<question> Answer in one word."; the score of a question is the sum, over `expected_answers`, of the
probability that the first token of the reply is the first token of the answer. Two answers with the same first token
count it twice, so that a score may be above 1.

Source: evaluation.py and soft_tifa_analysis.py of github.com/facebookresearch/GenEval2 at c088ab7 (arXiv 2512.16853).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import read_json_lines

SKILLS = ("object", "attribute", "count", "position", "verb")
ATOMICITIES = range(3, 11)
YES = ("Yes", "yes", " yes", " Yes")
NUMERALS = {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}


def question_text(question: str) -> str:
    """The question to the judge."""
    return f"{question} Answer in one word."


def expected_answers(question: str, answer: str) -> list[str]:
    """The replies whose probabilities are summed: for "How many ..." the spellings of the number, otherwise "Yes",
    whatever `answer` is.

    A number beyond ten has the numeral "other", as in the official code.
    """
    if not question.startswith("How many"):
        return list(YES)
    numeral = NUMERALS.get(answer, "other")
    return [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", numeral, f" {numeral}"]


def soft_tifa(scores: Sequence[float]) -> dict[str, float]:
    """{"am": arithmetic, "gm": geometric mean} of the scores of one prompt's questions.

    Raises:
        ValueError: no scores, or one that is negative or not finite.
    """
    if not len(scores):
        raise ValueError("there are no scores; a prompt needs at least one question")
    odd = [score for score in scores if not 0 <= score < math.inf]
    if odd:
        raise ValueError(f"score {odd[0]!r} must be a probability")
    geometric = 0.0 if min(scores) == 0 else math.exp(math.fsum(map(math.log, scores)) / len(scores))
    return {"am": sum(scores) / len(scores), "gm": geometric}


def summarise(scores: Sequence[Sequence[float]], data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of the benchmark, in percent.

    Args:
        scores: the scores of each prompt's questions, in the order of `data`: the official score_lists.json.
        data: rows of geneval2_data.jsonl: "skills" (one per question) and "atom_count".

    Returns:
        {"am", "gm": means over prompts, "skills": {skill: mean over its questions}, "atomicity": {atom_count: mean of
        the geometric means of its prompts}}; only skills and counts that occur.

    Raises:
        ValueError: no prompts, lists that do not fit, an unknown skill or count; names the prompt.
    """
    if len(scores) != len(data) or not len(data):
        raise ValueError(f"{len(scores)} lists of scores and {len(data)} prompts; each prompt needs one")
    means = []
    skills: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    atomicity: dict[int, list[float]] = {count: [] for count in ATOMICITIES}
    for index, (values, row) in enumerate(zip(scores, data, strict=True)):
        if len(values) != len(row["skills"]):
            raise ValueError(f"prompt {index} has {len(values)} scores for {len(row['skills'])} questions")
        unknown = [skill for skill in row["skills"] if skill not in skills]
        if unknown:
            raise ValueError(f"prompt {index} has the skill {unknown[0]!r}; it must be one of {', '.join(SKILLS)}")
        if row["atom_count"] not in atomicity:
            raise ValueError(f"prompt {index} has atom_count={row['atom_count']!r}; it must be 3 to 10")
        try:
            mean = soft_tifa(values)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        means.append(mean)
        atomicity[row["atom_count"]].append(mean["gm"])
        for skill, value in zip(row["skills"], values, strict=True):
            skills[skill].append(value)
    return {
        "am": _percent([mean["am"] for mean in means]),
        "gm": _percent([mean["gm"] for mean in means]),
        "skills": {skill: _percent(values) for skill, values in skills.items() if values},
        "atomicity": {count: _percent(values) for count, values in atomicity.items() if values},
    }


def _percent(values: Sequence[float]) -> float:
    return 100 * math.fsum(values) / len(values)


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Reads geneval2_data.jsonl.

    Raises:
        ValueError: the file is absent or empty, or a line is not a prompt; names the line.
    """
    rows = []
    for number, row in read_json_lines(path):
        if not isinstance(row, dict) or not {"prompt", "atom_count", "vqa_list", "skills"} <= row.keys():
            raise ValueError(f"{path}, line {number}: a prompt needs 'prompt', 'atom_count', 'vqa_list' and 'skills'")
        _check_row(row, f"{path}, line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return rows


def _check_row(row: Mapping[str, Any], where: str) -> None:
    questions, skills = row["vqa_list"], row["skills"]
    if not isinstance(questions, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in questions
    ):
        raise ValueError(f"{where}: 'vqa_list' must be a list of [question, answer], not {questions!r}")
    if not isinstance(skills, list) or len(questions) != len(skills):
        raise ValueError(f"{where}: {len(questions)} questions for the skills {skills!r}; each needs one")
    unknown = [skill for skill in skills if skill not in SKILLS]
    if unknown:
        raise ValueError(f"{where}: unknown skill {unknown[0]!r}; it must be one of {', '.join(SKILLS)}")
    if row["atom_count"] not in ATOMICITIES:
        raise ValueError(f"{where}: atom_count={row['atom_count']!r}; it must be 3 to 10")


def read_scores(path: str | Path) -> list[list[float]]:
    """Reads a score_lists.json, ours or the official one, for `summarise`.

    Raises:
        ValueError: the file is absent, or is not a list with a list of probabilities per prompt; names the prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file of scores (score_lists.json)")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(lists, list):
        raise ValueError(f"{path} must be a list with a list of scores per prompt")
    for number, values in enumerate(lists):
        if not isinstance(values, list) or not all(_is_score(value) for value in values):
            raise ValueError(f"{path}, prompt {number}: {values!r} must be a list of probabilities")
    return [[float(value) for value in values] for values in lists]


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def scores_text(scores: Sequence[Sequence[float]]) -> str:
    """The official score_lists.json, for soft_tifa_analysis.py."""
    return json.dumps([[float(value) for value in values] for values in scores])
