"""Judges images (the only step that runs judges), and scores the answers.

images --index_images--> rows with digests --judge_images--> answers.jsonl / .parquet
                                 |--------------score_rows(answers)--> rows with scores
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval.benchmarks.base import Benchmark, Judged, Pooling, Prompt, Question
from eval.config import EvalConfig
from eval.files import write_bytes
from eval.geneval import expected_images, walk_layout
from eval.judging.answer_types import wrong_type
from eval.judging.answers import Answers, Key, SharedAnswers
from eval.judging.images import open_png
from eval.judging.protocols import Judge, Request, category_of, question_key
from eval.oneig import is_black, split_grid

INDEX, JUDGES = "images.parquet", "judges.json"
BLACK = "black, which stands for an image that could not be generated: left out"  # see Benchmark.jpeg_tiles
REFERENCE = -1  # instead of an image's number: the prompt's real image
Row = dict[str, Any]
Group = tuple[int, int]  # seed, prompt index: the images of one prompt that are judged together


def index_images(
    images_dir: str | Path, prompts: Sequence[Prompt], config: EvalConfig, leave_out_black: bool = False
) -> list[Row]:
    """One row per image of a run: seed, prompt_index, prompt_id, image_index, category, split, prompt, file (relative
    to `images_dir`), sha256, error ("" or why it is not judged: it cannot be read, or is `BLACK`).

    Raises:
        ValueError: missing or unreadable images, unless `config.missing` is "official".
    """
    images_dir = Path(images_dir)
    rows: list[Row] = []
    for seed in config.seeds:
        for item in walk_layout(images_dir / f"seed{seed}", prompts, config.images_per_prompt, config.missing):
            path, index = item["path"], int(item["folder"])
            prompt = prompts[index]
            data = path.read_bytes()
            error = ""
            try:
                image = open_png(data)
                if leave_out_black and is_black(image.convert("RGB")):
                    error = BLACK
            except ValueError as problem:
                error = str(problem).replace("the image", path.name, 1)
                if config.missing == "error":
                    raise ValueError(str(problem).replace("the image", str(path), 1)) from problem
            rows.append(
                {
                    "seed": seed,
                    "prompt_index": index,
                    "prompt_id": prompt["id"],
                    "image_index": int(path.name.partition(".")[0]),
                    "category": category_of(prompt),
                    "split": prompt.get("split", "seen"),
                    "prompt": prompt["prompt"],
                    "file": path.relative_to(images_dir).as_posix(),
                    "reference": prompt.get("reference", {}).get("file", ""),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "error": error,
                }
            )
    return rows


def expected_count(prompts: Sequence[Prompt], config: EvalConfig) -> int:
    return len(config.seeds) * sum(expected_images(p, config.images_per_prompt) for p in prompts)


def groups_of(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """The images of each prompt and seed that are judged, in order."""
    groups: dict[Group, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["seed"], r["prompt_index"], r["image_index"])):
        if not row["error"]:
            groups.setdefault((row["seed"], row["prompt_index"]), []).append(row)
    return groups


def _digest_of_all(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class _Reader:
    """Reads the answers so far and finds open questions; `judges`: {skill: revision}."""

    def __init__(self, benchmark: Benchmark, answers: Answers | Mapping[Key, Any], judges: Mapping[str, str]):
        self.benchmark, self.answers, self.judges = benchmark, answers, judges

    def key(self, question: Question, digest: str) -> Key:
        return digest, question_key(question), self.judges[question.judge]

    def questions(self, prompt: Prompt, known: Mapping[str, Any]) -> list[Question]:
        """The questions that can be asked now. Questions of a skill without a judge are left out."""
        return [q for q in self.benchmark.questions(prompt, known) if q.judge in self.judges]

    def read(
        self, prompt: Prompt, digests: Sequence[str]
    ) -> tuple[list[dict], dict, list[tuple[Question, int | None]]]:
        """(answers about each image, answers about all together and about the real image, open questions).

        An open question has the number of its image, None for all images, or `REFERENCE`.
        """
        whole = _digest_of_all(digests)
        together: dict[str, Any] = {}
        images: list[dict[str, Any]] = []
        open_questions: dict[tuple[str, int | None], tuple[Question, int | None]] = {}
        for number, digest in enumerate(digests):
            known: dict[str, Any] = {}
            while True:
                answered = False
                for question in self.questions(prompt, {**known, **together}):
                    place, about = number, digest
                    if question.together:
                        place, about = None, whole
                    elif question.reference:
                        place, about = REFERENCE, prompt["reference"]["sha256"]
                    key = self.key(question, about)
                    if key in self.answers:
                        answer = self.answers[key]
                        if problem := wrong_type(self.benchmark, question, answer):
                            raise ValueError(
                                f"{problem}: it was kept by an earlier version; judge the run again into another folder"
                            )
                        shared = question.together or question.reference
                        (together if shared else known)[question.key] = answer
                        answered = True
                    else:
                        open_questions[question.key, place] = (question, place)
                if not answered:  # an answer may lead to a further question
                    break
            images.append(known)
        return images, together, list(open_questions.values())


def judge_images(
    rows: Sequence[Row],
    images_dir: str | Path,
    prompts: Sequence[Prompt],
    benchmark: Benchmark,
    judges: Mapping[str, Judge],
    answers: Answers,
    *,
    batch_size: int = 64,
    shard: int = 0,
    shards: int = 1,
    shared: SharedAnswers | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, int]:
    """Asks the judges the questions that `answers` and `shared` lack. Each batch is on disk before the next begins.

    Args:
        rows: of `index_images`; those with an error are skipped.
        judges: {skill: judge}.
        answers: opened for writing.
        batch_size: questions per call of a judge.
        shard, shards: asks about every prompt and seed whose number modulo `shards` is `shard`.
        shared: answers of other runs to the same questions about the same images, which need not be asked again.

    Returns:
        {"asked", "prompts": of this shard}

    Raises:
        ValueError: a judge fails its self-test, stops with an error, or returns too few answers or one of a wrong type.
            Answers up to then are kept.
    """
    images_dir = Path(images_dir)
    reader = _Reader(benchmark, answers, {skill: judge.revision for skill, judge in judges.items()})
    groups = dict(list(groups_of(rows).items())[shard::shards])
    tested: set[str] = set()
    asked, last_line, started = 0, 0.0, time.monotonic()
    if shared is not None and len(answers):  # of an attempt that may have been killed before it shared them
        shared.add([(key, answers[key]) for key in answers])
    pending = dict(groups)
    while pending:
        todo: dict[Key, tuple[Question, list[Row]]] = {}
        for group, images in list(pending.items()):
            digests = [row["sha256"] for row in images]
            _, _, questions = reader.read(prompts[group[1]], digests)
            if not questions:
                del pending[group]
            for question, number in questions:
                if number == REFERENCE:
                    shown = [prompts[group[1]]["reference"]]
                else:
                    shown = images if number is None else [images[number]]
                digest = _digest_of_all(digests) if number is None else shown[0]["sha256"]
                todo[reader.key(question, digest)] = (question, shown)  # equal images are judged once
        if shared is not None:
            reused = dict(shared.find(todo))
            # Others may write there, too. An answer in the journal is final, and a wrong one would stop every attempt.
            wrong = [key for key, answer in reused.items() if wrong_type(benchmark, todo[key][0], answer)]
            if wrong:
                log(f"answers of other runs: {len(wrong)} are of a wrong type, and their questions are asked again")
                shared.reject(wrong)
                for key in wrong:
                    del reused[key]
            answers.add(reused.items())
            todo = {key: value for key, value in todo.items() if key not in reused}
        by_judge: dict[str, list[tuple[Key, Question, list[Row]]]] = {}
        for key, (question, shown) in todo.items():
            by_judge.setdefault(question.judge, []).append((key, question, shown))
        for skill, questions in by_judge.items():
            judge = judges[skill]
            if judge.revision not in tested:
                judge.selftest()
                tested.add(judge.revision)
            for i in range(0, len(questions), batch_size):
                batch = questions[i : i + batch_size]
                replies = _ask(judge, batch, images_dir, asked, benchmark)
                answered = list(zip([key for key, _, _ in batch], replies, strict=True))
                answers.add(answered)
                if shared is not None:
                    shared.add(answered)
                asked += len(batch)
                elapsed = time.monotonic() - started
                if elapsed - last_line >= 5:
                    last_line = elapsed
                    log(f"answers: {asked}, {len(pending)} of {len(groups)} prompts open")
    log(f"answers: {asked} asked, {len(answers)} known, {len(groups)} prompts")
    return {"asked": asked, "prompts": len(groups)}


def _ask(
    judge: Judge, batch: Sequence[tuple[Key, Question, list[Row]]], images_dir: Path, before: int, benchmark: Benchmark
) -> list[Any]:
    opened: dict[str, Image.Image] = {}
    for row in (row for _, _, shown in batch for row in shown):
        if row["file"] not in opened:
            image = _read(images_dir / row["file"], row["sha256"])
            opened[row["file"]] = through_jpeg(image) if benchmark.jpeg_tiles else image
    requests = [
        Request([opened[row["file"]] for row in shown], question.text, question.options) for _, question, shown in batch
    ]
    try:
        replies = judge.answer(requests)
    except Exception as error:  # judges use many libraries, with errors of many types
        raise ValueError(
            f"judge {judge.name} stopped at {batch[0][2][0]['file']} and the {len(batch) - 1} questions after it: "
            f"{type(error).__name__}: {error}; {before} answers are kept, and judging again resumes there"
        ) from error
    if len(replies) != len(batch):
        raise ValueError(f"judge {judge.name} gave {len(replies)} answers to {len(batch)} questions")
    for reply, (_, question, shown) in zip(replies, batch, strict=True):
        if problem := wrong_type(benchmark, question, reply):
            raise ValueError(f"judge {judge.name}, at {shown[0]['file']}: {problem}; {before} answers are kept")
    return replies


def through_jpeg(image: Image.Image) -> Image.Image:
    """The image with OneIG-Bench's JPEG compression. A black image, which the official code drops, is unchanged."""
    for tile in split_grid(image, (1, 1), "fixed"):
        image = Image.open(io.BytesIO(tile), formats=("JPEG",))
        image.load()
    return image


def _read(path: Path, sha256: str) -> Image.Image:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} changed since it was indexed; judge the run again")
    return open_png(data)


def judged_prompts(
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    config: EvalConfig,
    benchmark: Benchmark,
    answers: Answers | Mapping[Key, Any],
    judges: Mapping[str, str],
) -> dict[int, dict[str, Judged]]:
    """{seed: {prompt id: its answers}}, the input of a benchmark's scores.

    Args:
        judges: {skill: revision}.

    Raises:
        ValueError: an answer is missing: the run was not judged, or not by these revisions.
    """
    reader = _Reader(benchmark, answers, judges)
    groups = groups_of(rows)
    left_out = Counter((row["seed"], row["prompt_index"]) for row in rows if row["error"] == BLACK)
    result: dict[int, dict[str, Judged]] = {}
    for seed in config.seeds:
        for index, prompt in enumerate(prompts):
            images = groups.get((seed, index), [])
            by_image, together, missing = reader.read(prompt, [row["sha256"] for row in images])
            if missing:
                question, number = missing[0]
                what = prompt["reference"]["file"] if number == REFERENCE else images[number or 0]["file"]
                raise ValueError(
                    f"{what} has no answer to {question_key(question)!r} by revision {judges[question.judge][:12]}: "
                    "judge the run first, with all shards"
                )
            places: list[dict[str, Any] | None] = [None] * expected_images(prompt, config.images_per_prompt)
            for row, known in zip(images, by_image, strict=True):
                if row["image_index"] < len(places):
                    places[row["image_index"]] = known
            result.setdefault(seed, {})[prompt["id"]] = Judged(tuple(places), together, left_out[seed, index])
    return result


def score_rows(
    rows: Sequence[Row], prompts: Sequence[Prompt], benchmark: Benchmark, judged: Mapping[int, Mapping[str, Judged]]
) -> list[Row]:
    """The rows with "score" (None if an image was not judged), "reason", "answers" (JSON) and "parts" (JSON: named
    scores of the prompt and seed)."""
    results = {}
    for seed, judged_of_seed in judged.items():
        of_prompts = benchmark.score_all(prompts, judged_of_seed)
        for index, prompt in enumerate(prompts):
            results[seed, index] = of_prompts[prompt["id"]]
    scored = []
    for row in rows:
        result = results[row["seed"], row["prompt_index"]]
        image = row["image_index"]
        known = image < len(result.images) and not row["error"]
        score = result.images[image] if known else None
        replies = judged[row["seed"]][row["prompt_id"]].images[image] if known else None
        scored.append(
            {
                **row,
                # Sums of probabilities may exceed 1 by rounding.
                "score": None if score is None else min(max(float(score), 0.0), 1.0),
                "reason": result.reasons[image] if known else "",
                "answers": _shown(replies) if replies is not None else "",
                "parts": json.dumps(dict(result.subscores)) if result.subscores else "",
            }
        )
    return scored


def _shown(replies: Mapping[str, Any]) -> str:
    """The answers as JSON, without long vectors, which are in the table of answers."""
    return json.dumps({key: value for key, value in replies.items() if key != "features"})


def has_score(row: Row, pooling: Pooling) -> bool:
    """Whether the image, or (pooling "parts") a part of its prompt that was made from it, has a score."""
    if row["score"] is not None:
        return True
    parts = json.loads(row["parts"] or "{}") if pooling == "parts" and not row["error"] else {}
    return any(value is not None for value in parts.values())


def prompt_scores(rows: Sequence[Row], pooling: Pooling) -> dict[str, dict[str, list[float]]]:
    """category -> prompt id -> scores: of each image, or (pooling "parts") of the prompt's subscores for each seed."""
    units: dict[str, dict[str, list[float]]] = {}
    seen: set[tuple[int, str]] = set()
    for row in sorted(rows, key=lambda r: (r["seed"], r["prompt_index"], r["image_index"])):
        if pooling != "parts":
            if row["score"] is not None:
                units.setdefault(row["category"], {}).setdefault(row["prompt_id"], []).append(row["score"])
        elif not row["error"] and (row["seed"], row["prompt_id"]) not in seen:  # each image has all parts of its prompt
            seen.add((row["seed"], row["prompt_id"]))
            for name, value in json.loads(row["parts"] or "{}").items():
                if value is not None:
                    units.setdefault(name, {}).setdefault(row["prompt_id"], []).append(min(max(value, 0.0), 1.0))
    return units


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as Parquet: the same rows in any order give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    ordered = sorted(rows, key=lambda row: (row["seed"], row["prompt_index"], row["image_index"]))
    table = pa.Table.from_pylist(ordered)
    for name, kind in (("score", pa.float64()),):  # a column with only None has no type
        if name in table.column_names:
            i = table.column_names.index(name)
            table = table.set_column(i, name, table.column(name).cast(kind))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_rows(path: Path) -> list[Row]:
    """
    Raises:
        ValueError: no such table.
    """
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise ValueError(f"{path} is not a table of images")
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a table of images: {error}") from error


def write_judges(judges: Mapping[str, Judge], folder: Path) -> None:
    """Records the judges next to the answers, so that scoring needs no judge."""
    record = {
        skill: {"name": judge.name, "model": judge.model, "revision": judge.revision, "spec": dict(judge.spec)}
        for skill, judge in judges.items()
    }
    write_bytes(folder / JUDGES, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def read_judges(folder: Path) -> dict[str, dict[str, Any]]:
    """{skill: {"name", "model", "revision", "spec"}}.

    Raises:
        ValueError: nothing was judged there.
    """
    path = folder / JUDGES
    if not path.is_file():
        raise ValueError(f"{folder} has no {JUDGES}: judge the run first")
    return json.loads(path.read_text(encoding="utf-8"))
