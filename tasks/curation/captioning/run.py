"""Captions one shard: its kept images -> the captioner's answers, and the scores with these captions.

    scores.parquet, kept rows with tier --decode, ask, check, ask again--> captions.parquet   every caption, kept or not
                                        \\                                                     and the owners'
                                         ----------------------------------> scores.parquet   captions and words replaced

Every answer goes to a journal first (journal.py), so that after a kill only questions without an answer are asked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.curation.captioning import checks
from tasks.curation.captioning.base import Answer, Captioner, Request
from tasks.curation.captions import clean_captions, count_words
from tasks.curation.config import CaptionerConfig
from tasks.curation.journal import Journal
from tasks.curation.scoring import decoding
from tasks.curation.scoring.decode_memory import WORKER_BYTES
from tasks.curation.scoring.score import ACCOUNT, ROW_GROUP, SCORES, SCORES_TABLE
from tasks.curation.scoring.workers import CrashError, Workers
from tasks.curation.sources.base import Account, Shard

CAPTIONS_TABLE, REPORT = "captions.parquet", "captions.json"
ORIGINAL = "original"
UNDECODABLE = "undecodable"
CAPTIONS = pa.schema(
    [
        ("row", pa.int64()),  # in the shard
        ("record_id", pa.string()),
        ("tier", pa.string()),
        ("length", pa.string()),  # the length class; "original" for the owner's
        ("text", pa.string()),
        ("words", pa.int32()),
        ("status", pa.string()),  # one of checks.STATUSES; "ok" are captions
        ("attempts", pa.int32()),  # number of attempts; 0 for the owner's
        ("captioner", pa.string()),  # see captioning.identity; "" for the owner's
    ]
)
# Kept records and duplicates of a shard, as decided before captioning.
KEPT_COLUMNS, DUPLICATE_COLUMNS = ("row", "tier", "extra_captions"), ("row", "rule", "detail")


class Asked(NamedTuple):
    """An image of the shard to caption."""

    row: int
    record_id: str
    key: str
    tier: str
    originals: list[str]


def caption_shard(
    corpus,
    shard: Shard,
    scores_dir: Path,
    kept: pa.Table,
    duplicates: pa.Table,
    config: CaptionerConfig,
    captioner: Captioner,
    name: str,
    max_pixels: int,
    journal: Journal,
    out_dir: str | os.PathLike,
) -> int:
    """Writes captions.parquet, captions.json and the scores with new captions; returns the rows of the scores.

    Args:
        scores_dir: the shard's score part.
        kept: row and tier of the images to describe, and the captions of their exact duplicates (KEPT_COLUMNS).
        duplicates: row, rule and detail of the records that deduplication rejected (DUPLICATE_COLUMNS).
        name: the captioner and its model, written next to each caption.

    Raises:
        ConnectionError: the captioner is temporarily unreachable.
        ValueError: a permanent error of the captioner, or the source has changed since it was scored.
    """
    out_dir = Path(out_dir)
    table = pq.read_table(scores_dir / SCORES_TABLE)
    wanted = _wanted(table, kept)
    rows: list[dict[str, Any]] = []
    answered = _Answered(journal, (name, config.temperature, config.dtype))
    shown = corpus.scenes(shard) if captioner.reads_scenes else {}
    lengths = {tier: names for tier, names in config.per_tier.items() if names}
    for chunk in _chunks(_images(corpus, shard, wanted, shown, config, max_pixels), captioner.window):
        rows += _caption(chunk, lengths, config, captioner, name, answered)
    rows += _originals(wanted.values())
    rows.sort(key=lambda row: (row["row"], row["length"] != ORIGINAL))
    captions = pa.Table.from_pylist(rows, CAPTIONS)
    pq.write_table(captions, out_dir / CAPTIONS_TABLE, compression="zstd")
    _write_scores(table, rows, duplicates, config, out_dir)
    shutil.copyfile(scores_dir / ACCOUNT, out_dir / ACCOUNT)
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        of_length = counts.setdefault(row["length"], {})
        of_length[row["status"]] = of_length.get(row["status"], 0) + 1
    (out_dir / REPORT).write_text(json.dumps({"images": len(wanted), "captions": counts}, sort_keys=True) + "\n")
    return len(table)


def _wanted(table: pa.Table, kept: pa.Table) -> dict[str, Asked]:
    """Key -> image, of the kept rows."""
    at = pa.compute.index_in(kept["row"], value_set=table["row"])
    assert at.null_count == 0, "a decision about a row that has no scores"
    chosen = table.select(["row", "record_id", "key", "captions"]).take(at).to_pylist()
    return {
        row["key"]: Asked(
            row["row"], row["record_id"], row["key"], tier, clean_captions([*row["captions"], *(more or ())])
        )
        for row, tier, more in zip(chosen, kept["tier"].to_pylist(), kept["extra_captions"].to_pylist(), strict=True)
    }


def _images(
    corpus, shard: Shard, wanted: dict[str, Asked], shown: dict[str, dict], config: CaptionerConfig, max_pixels: int
) -> Iterator[tuple[Asked, Image.Image | None, dict | None]]:
    """Each wanted image, reduced, or None if it no longer decodes; and the content of a rendered scene."""
    left = dict(wanted)

    def records() -> Iterator[tuple[Asked, bytes]]:
        for record in corpus.read(shard, Account()):
            asked = left.pop(record.key, None)
            if asked is None or not config.per_tier[asked.tier]:
                continue
            if hashlib.sha256(record.data).hexdigest() != asked.record_id:
                raise ValueError(f"{record.locator} has changed since it was scored: run the curation again")
            yield asked, record.data

    work = functools.partial(_reduced, image_px=config.image_px, max_pixels=max_pixels)
    with Workers(work, memory_bytes=WORKER_BYTES) as workers:
        for asked, result in workers.map(records()):
            image = None if isinstance(result, CrashError) else Image.frombytes("RGB", *result)
            yield asked, image, shown.get(asked.key)
    if left:
        missing = next(iter(left.values()))
        raise ValueError(f"row {missing.row} of shard {shard.shard_id} is gone since it was scored: run it again")


def _reduced(data: bytes, image_px: int, max_pixels: int) -> tuple[tuple[int, int], bytes]:
    image = decoding.decode(data, max_pixels)
    scale = max(image.size) / image_px
    if scale > 1:
        size = tuple(max(1, round(side / scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image.size, image.tobytes()


def _chunks(items: Iterator, window: int) -> Iterator[list]:
    while chunk := list(islice(items, window)):
        yield chunk


class _Answered:
    """The answers of the journal, by question, and new answers."""

    def __init__(self, journal: Journal, who: tuple) -> None:
        self._journal, self._who = journal, who
        self._known: dict[str, Answer] = {}
        for row in journal.rows:
            self._known.setdefault(
                str(row.get("question")), Answer(str(row.get("text")), str(row.get("finish_reason")))
            )

    def get(self, request: Request) -> Answer | None:
        return self._known.get(self._question(request))

    def add(self, request: Request, answer: Answer) -> None:
        question = self._question(request)
        if question not in self._known:
            self._known[question] = answer
            about = {"record_id": request.record_id, "length": request.length, "attempt": request.attempt}
            self._journal.add({"question": question, **about, **answer._asdict()})

    def _question(self, request: Request) -> str:
        """The key of a question: image, prompt, attempt and captioner."""
        asked = [request.record_id, request.image.size, request.prompt, request.max_tokens, request.seed]
        asked = [*self._who, *asked]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _caption(
    chunk: list[tuple[Asked, Image.Image | None, dict | None]],
    lengths: dict[str, tuple[str, ...]],
    config: CaptionerConfig,
    captioner: Captioner,
    name: str,
    answered: _Answered,
) -> list[dict[str, Any]]:
    """The captions of some images. Answers that are not kept are asked again, up to `attempts` times in total."""
    asked = {image.record_id: image for image, _, _ in chunk}
    todo: list[Request] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for image, pixels, scene in chunk:
        for length in lengths.get(image.tier, ()):
            if pixels is None:
                rows[image.record_id, length] = _row(image, length, "", UNDECODABLE, 0, name)
                continue
            prompt, limit = config.prompt(image.tier, length), config.lengths[length].max_tokens
            todo.append(Request(image.record_id, length, 1, pixels, prompt, limit, _seed(image, length, 1), scene))
    while todo:
        known = [(request, answer) for request in todo if (answer := answered.get(request)) is not None]
        unknown = [request for request in todo if answered.get(request) is None]
        todo = []
        for request, answer in _both(known, captioner.answers(unknown) if unknown else ()):
            answered.add(request, answer)
            image = asked[request.record_id]
            text, status = checks.judge(answer, config.lengths[request.length], config.language)
            rows[image.record_id, request.length] = _row(image, request.length, text, status, request.attempt, name)
            if status not in (checks.OK, checks.REJECTED) and request.attempt < config.attempts:
                attempt = request.attempt + 1
                todo.append(request._replace(attempt=attempt, seed=_seed(image, request.length, attempt)))
    return list(rows.values())


def _both(known, asked) -> Iterator[tuple[Request, Answer]]:
    yield from known
    yield from asked


def _seed(image: Asked, length: str, attempt: int) -> int:
    digest = hashlib.sha256(f"{image.record_id} {length} {attempt}".encode()).hexdigest()
    return int(digest[:7], 16)


def _row(image: Asked, length: str, text: str, status: str, attempts: int, name: str) -> dict[str, Any]:
    about = {"row": image.row, "record_id": image.record_id, "tier": image.tier, "length": length}
    return about | {
        "text": text, "words": count_words(text), "status": status, "attempts": attempts, "captioner": name,
    }  # fmt: skip


def _originals(images) -> list[dict[str, Any]]:
    return [_row(image, ORIGINAL, text, checks.OK, 0, "") for image in images for text in image.originals]


def _write_scores(
    table: pa.Table, rows: list[dict[str, Any]], duplicates: pa.Table, config: CaptionerConfig, out_dir: Path
) -> None:
    """The scores with the captions of the images that were described, and with the fate of duplicates, so that these do
    not count as images without a caption."""
    by_row: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_row.setdefault(row["row"], []).append(row)
    fates = {
        row: (rule, detail)
        for row, rule, detail in zip(*(duplicates[name].to_pylist() for name in DUPLICATE_COLUMNS), strict=True)
    }
    captions, words, problems, details = [], [], [], []
    for row, before, problem, detail in zip(
        *(table[name].to_pylist() for name in ("row", "captions", "problem", "problem_detail")), strict=True
    ):
        texts = list(before)
        if row in by_row:
            texts, reason = _chosen(by_row[row], config)
            detail = detail or reason
        elif row in fates and not problem:
            problem, detail = fates[row]
        captions.append(texts)
        words.append([count_words(text) for text in texts])
        problems.append(problem)
        details.append(detail)
    columns = {"captions": captions, "words": words, "problem": problems, "problem_detail": details}
    replaced = {name: pa.array(values, SCORES.field(name).type) for name, values in columns.items()}
    table = pa.table({name: replaced.get(name, table[name]) for name in table.schema.names})
    pq.write_table(table.combine_chunks(), out_dir / SCORES_TABLE, compression="zstd", row_group_size=ROW_GROUP)


def _chosen(rows: list[dict[str, Any]], config: CaptionerConfig) -> tuple[list[str], str]:
    """The captions of one image, or the reason why it has none."""
    originals = [row["text"] for row in rows if row["length"] == ORIGINAL]
    new = [row["text"] for row in rows if row["length"] != ORIGINAL and row["status"] == checks.OK]
    texts = clean_captions([*originals, *new] if config.use_originals or not new else new)
    failed = [f"{row['length']}: {row['status']} ({row['text'][:80]})" for row in rows if row["status"] != checks.OK]
    return texts, "" if texts else f"no caption; the captioner's answers: {'; '.join(failed) or 'none was asked'}"
