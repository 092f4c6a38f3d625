"""Images and questions to answers: the only step that runs a judge.

images --index_images--> rows with digests --judge_images--> answers.jsonl / .parquet
                                 |--------------score_rows(answers)--> rows with scores
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval.answers import Answers, Key
from eval.config import EvalConfig
from eval.generate import replacing
from eval.geneval import expected_images, walk_layout
from eval.images import open_png
from eval.protocols import Benchmark, Judge, Prompt, category_of

INDEX, JUDGE = "images.parquet", "judge.json"
Row = dict[str, Any]


def index_images(images_dir: str | Path, prompts: Sequence[Prompt], config: EvalConfig) -> list[Row]:
    """One row per image of a run: seed, prompt_index, prompt_id, image_index, category, split, prompt, file (relative
    to `images_dir`), sha256, error ("" or why it cannot be read).

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
                open_png(data)
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
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "error": error,
                }
            )
    return rows


def expected_count(prompts: Sequence[Prompt], config: EvalConfig) -> int:
    return len(config.seeds) * sum(expected_images(p, config.images_per_prompt) for p in prompts)


def judge_images(
    rows: Sequence[Row],
    images_dir: str | Path,
    prompts: Sequence[Prompt],
    benchmark: Benchmark,
    judge: Judge,
    answers: Answers,
    *,
    batch_size: int = 64,
    shard: int = 0,
    shards: int = 1,
    log: Callable[[str], None] = print,
) -> dict[str, int]:
    """Asks the judge what `answers` does not have yet. Each batch is on disk before the next begins.

    Args:
        rows: of `index_images`; unreadable ones are passed over.
        answers: opened for writing.
        batch_size: questions per call of the judge.
        shard, shards: asks about every image whose number leaves the remainder `shard`.

    Returns:
        {"asked", "known": numbers of questions}

    Raises:
        ValueError: the judge fails its self-test, stops with an error, or returns too few answers. Answers up to then
            are kept.
    """
    images_dir = Path(images_dir)
    todo: list[tuple[Row, str]] = []
    wanted: set[Key] = set()
    known = 0
    for row in [row for row in rows if not row["error"]][shard::shards]:
        for question in benchmark.questions(prompts[row["prompt_index"]]):
            key = (row["sha256"], question, judge.revision)
            if key in answers:
                known += 1
            elif key not in wanted:  # equal images are asked about once
                wanted.add(key)
                todo.append((row, question))
    if todo:
        judge.selftest()
    last_line, started = 0.0, time.monotonic()
    for i in range(0, len(todo), batch_size):
        batch = todo[i : i + batch_size]
        opened: dict[str, Image.Image] = {}
        for row, _ in batch:
            if row["file"] not in opened:
                opened[row["file"]] = _read(images_dir / row["file"], row["sha256"])
        try:
            replies = judge.answer([(opened[row["file"]], question) for row, question in batch])
        except Exception as error:  # judges are models of many libraries, whose errors are of many types
            first = batch[0][0]["file"]
            raise ValueError(
                f"judge {judge.name} stopped at {first} and the {len(batch) - 1} questions after it: "
                f"{type(error).__name__}: {error}; {i} answers are kept, and judging again resumes there"
            ) from error
        if len(replies) != len(batch):
            raise ValueError(f"judge {judge.name} gave {len(replies)} answers to {len(batch)} questions")
        keys = [(row["sha256"], question, judge.revision) for row, question in batch]
        answers.add(zip(keys, replies, strict=True))
        elapsed = time.monotonic() - started
        if elapsed - last_line >= 5:
            last_line = elapsed
            log(f"answers: {i + len(batch)}/{len(todo)}")
    log(f"answers: {len(todo)} asked, {known} known")
    return {"asked": len(todo), "known": known}


def _read(path: Path, sha256: str) -> Image.Image:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} changed since it was indexed; judge the run again")
    return open_png(data)


def score_rows(
    rows: Sequence[Row], prompts: Sequence[Prompt], benchmark: Benchmark, answers: Answers, revision: str
) -> list[Row]:
    """The rows with "score" (None where an image could not be read), "reason" and "answers" (JSON).

    Raises:
        ValueError: an answer is missing: the run was not judged, or not by this revision of the judge.
    """
    scored = []
    for row in rows:
        prompt = prompts[row["prompt_index"]]
        if row["error"]:
            scored.append({**row, "score": None, "reason": "", "answers": ""})
            continue
        replies = {}
        for question in benchmark.questions(prompt):
            key = (row["sha256"], question, revision)
            if key not in answers:
                raise ValueError(
                    f"{row['file']} has no answer to {question!r} by revision {revision[:12]}: judge the run first"
                )
            replies[question] = answers[key]
        verdict = benchmark.score(prompt, replies)
        if not 0 <= verdict.score <= 1:
            raise ValueError(f"{benchmark.name} gives {row['file']} the score {verdict.score}, which is not in [0, 1]")
        scored.append({**row, "score": verdict.score, "reason": verdict.reason, "answers": json.dumps(replies)})
    return scored


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Rows as Parquet: the same rows give the same bytes, whatever their order."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    ordered = sorted(rows, key=lambda row: (row["seed"], row["prompt_index"], row["image_index"]))
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ordered), buffer, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


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


def write_judge(judge: Judge, folder: Path) -> None:
    """Records who answers, beside the answers: scoring needs no judge."""
    record = {"name": judge.name, "revision": judge.revision, "spec": dict(judge.spec)}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / JUDGE) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + os.linesep, encoding="utf-8")


def read_judge(folder: Path) -> Mapping[str, Any]:
    """
    Raises:
        ValueError: nothing was judged there.
    """
    path = folder / JUDGE
    if not path.is_file():
        raise ValueError(f"{folder} has no {JUDGE}: judge the run first")
    return json.loads(path.read_text(encoding="utf-8"))
