r"""Deciding: the scores of all shards -> what becomes of each record. A pure function of columns: no image is read.

    scores of shard 0..n --filters, captions--> candidates --dedup--> rejected
                         \--------------------- tiers, captions <-----/
                                                    |
    ledger.parquet            every record: kept, or the first rule that rejected it
    groups/00000.parquet ...  the kept records of the shards of a group, with tier and captions
    scores/00000/ ...         the index of their score parts, for the task that writes their selections
    report.json, report.html  counts, and the same as a page

The scores are streamed twice, one shard at a time; what must be compared over the whole corpus is in DuckDB, on disk.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation import dedup, filters, ledger, report, tiers
from tasks.curation.captions import choose_captions, clean_captions, count_words
from tasks.curation.config import CurationConfig
from tasks.curation.score import ACCOUNT, SCORES_TABLE, THUMBNAILS_TABLE
from tasks.curation.sources.base import Account
from tasks.curation.summary import Summary
from tasks.manifest import load_manifest
from tasks.store import Part, fetch_part, group_range, write_index

GROUPS, SCORES_INDEX = "groups", "scores"
LOGS = ("scores/*/locations.parquet",)  # of a decision directory, see manifest.seal
KEPT = pa.schema(
    [("shard", pa.string()), ("row", pa.int64()), ("tier", pa.string()), ("captions", pa.list_(pa.string()))]
)
ROW_GROUP = 50_000
THUMBNAIL_GROUPS_IN_MEMORY = 64


def decide(
    parts: Sequence[Part],
    scan: Account,
    config: CurationConfig,
    out_dir: str | os.PathLike,
    groups: int = 1,
    shard_names: dict[str, str] | None = None,
) -> dict:
    """Writes a decision directory (see the module) and returns the content of its report.json.

    That no record is left is not an error here, so that ledger and report can be read: see `nothing_left`.

    Args:
        parts: the score parts in the order of the corpus's shards, named by shard; those that failed name the error.
        scan: what the scan of the source saw and left out.
        groups: of shards, see store.group_range.
        shard_names: of shards that failed, the user's own file.
    """
    out_dir = Path(out_dir)
    starts = [0, *accumulate(part.rows for part in parts)]
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as work:
        rejections = _Rejections(work)
        search = dedup.DuplicateSearch(work, config.dedup)
        for part, start in zip(parts, starts, strict=False):
            if not part.error:
                scores = read_scores(fetch_columns(part))
                rule, detail = judge(scores, config)
                rejections.add(start, rule, detail)
                alive = np.flatnonzero(rule == "")
                search.add(start + alive, scores.iloc[alive])
        print(f"curation: {starts[-1]} records, {starts[-1] - rejections.count} pass the filters", flush=True)
        extra = _drop_duplicates(search, rejections, parts, starts)
        search.close()
        summary = _write(parts, starts, rejections, extra, scan, config, out_dir, groups, shard_names or {})
        rejections.close()
    content = summary.content()
    (out_dir / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (out_dir / "report.html").write_text(report.render(summary, config))
    return content


def fetch_columns(part: Part) -> Path:
    """A score part without its pictures: they are fetched for the few shards whose pictures are compared or shown."""
    return fetch_part(part, without=(THUMBNAILS_TABLE,))


def pictures_of(part: Part) -> Path:
    """The directory with the pictures of a score part; those of a captions part are in the scores that it was made from."""
    directory = fetch_columns(part)
    while THUMBNAILS_TABLE not in load_manifest(directory).files:
        (scores,) = load_manifest(directory).parents
        part = Part(part.name, scores.kind, scores.digest, scores.uri)
        directory = fetch_columns(part)
    return fetch_part(part)


def read_scores(directory: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """The scores of one shard, in its order."""
    return pq.read_table(directory / SCORES_TABLE, columns=columns).to_pandas()


def judge(scores: pd.DataFrame, config: CurationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first rule that each record breaks by itself ("" if none), and one sentence about it; object arrays [N]."""
    rule, detail = filters.decide(scores, config.filters)
    limit = config.captions.max_words
    for i in np.flatnonzero(rule == ""):
        words, problem = scores["words"].iloc[i], scores["problem"].iloc[i]
        if problem in ledger.STEPS[ledger.DEDUP]:  # found before captions were written for the others
            rule[i], detail[i] = problem, scores["problem_detail"].iloc[i]
        elif not len(words):
            if config.captions.required:
                rule[i], detail[i] = ledger.NO_CAPTION, scores["problem_detail"].iloc[i] or "no caption"
        elif min(words) > limit:
            rule[i] = ledger.CAPTION_TOO_LONG
            detail[i] = f"every caption is over max_words {limit} (the shortest has {min(words)})"
    return rule, detail


class _Rejections:
    """position -> (rule, detail), on disk, read back in the order of positions."""

    def __init__(self, work_dir: str) -> None:
        import duckdb

        settings = {"memory_limit": dedup.MEMORY, "temp_directory": str(Path(work_dir) / "spill-rejected")}
        self._db = duckdb.connect(str(Path(work_dir) / "rejected.duckdb"), config=settings)
        self._db.execute("CREATE TABLE rejected (position BIGINT, rule VARCHAR, detail VARCHAR)")
        self._db.execute("CREATE TABLE extra (keeper BIGINT, position BIGINT, captions VARCHAR[])")
        self.count = 0

    def add(self, start: int, rule: np.ndarray, detail: np.ndarray) -> None:
        hit = np.flatnonzero(rule != "")
        self.add_rows([(start + int(i), rule[i], detail[i]) for i in hit])

    def add_rows(self, rows: list[tuple[int, str, str]]) -> None:
        self._insert("rejected", [("position", pa.int64()), ("rule", pa.string()), ("detail", pa.string())], rows)
        self.count += len(rows)

    def add_captions(self, rows: list[tuple[int, int, list[str]]]) -> None:
        """Captions of exact duplicates (keeper, position, captions): the same bytes, so they are the keeper's too."""
        fields = [("keeper", pa.int64()), ("position", pa.int64()), ("captions", pa.list_(pa.string()))]
        self._insert("extra", fields, rows)

    def _insert(self, table: str, fields: list, rows: list[tuple]) -> None:
        if rows:
            names = [name for name, _ in fields]
            batch = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], pa.schema(fields))
            self._db.register("batch", batch)
            self._db.execute(f"INSERT INTO {table} SELECT * FROM batch")  # noqa: S608 (one of ours)
            self._db.unregister("batch")

    def between(self, start: int, stop: int) -> list[tuple[int, str, str]]:
        query = "SELECT position, rule, detail FROM rejected WHERE position >= ? AND position < ? ORDER BY position"
        return self._db.execute(query, [start, stop]).fetchall()

    def captions_between(self, start: int, stop: int) -> dict[int, list[str]]:
        query = "SELECT keeper, captions FROM extra WHERE keeper >= ? AND keeper < ? ORDER BY keeper, position"
        found: dict[int, list[str]] = {}
        for keeper, captions in self._db.execute(query, [start, stop]).fetchall():
            found.setdefault(keeper, []).extend(captions)
        return found

    def close(self) -> None:
        self._db.close()


def _drop_duplicates(
    search: dedup.DuplicateSearch, rejections: _Rejections, parts: Sequence[Part], starts: list[int]
) -> int:
    """Rejects exact and near duplicates, and gives the captions of exact ones to the record that is kept."""
    names = _Column("locator", parts, starts)
    texts = _Column("captions", parts, starts)
    count = 0
    for batch in _batches(search.exact_duplicates()):
        rejections.add_rows([(p, "exact_duplicate", f"same bytes as {names[keeper]}") for p, keeper in batch])
        rejections.add_captions([(keeper, p, list(texts[p])) for p, keeper in batch])
        count += len(batch)
    thumbnails = Thumbnails(parts, starts)
    for batch in _batches(search.near_duplicates(thumbnails.at)):
        rejections.add_rows(
            [(p, "near_duplicate", f"thumbnail differs by {d:.1f} from {names[keeper]}") for p, keeper, d in batch]
        )
        count += len(batch)
    return count


class _Column:
    """A column of the scores by position; the values of the last few shards stay in memory."""

    SHARDS = 16

    def __init__(self, name: str, parts: Sequence[Part], starts: list[int]) -> None:
        self._name, self._parts, self._starts = name, parts, starts
        self._known: OrderedDict[int, list] = OrderedDict()

    def __getitem__(self, position: int):
        index = bisect.bisect_right(self._starts, position) - 1
        if index not in self._known:
            table = pq.read_table(fetch_columns(self._parts[index]) / SCORES_TABLE, columns=[self._name])
            self._known[index] = table[self._name].to_pylist()
            if len(self._known) > self.SHARDS:
                self._known.popitem(last=False)
        self._known.move_to_end(index)
        return self._known[index][position - self._starts[index]]


class Thumbnails:
    """Thumbnails by position; the last `THUMBNAIL_GROUPS_IN_MEMORY` row groups stay in memory."""

    def __init__(self, parts: Sequence[Part], starts: list[int]) -> None:
        self._parts, self._starts = parts, starts
        self._rows: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray, list[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[dict]] = OrderedDict()

    def at(self, positions: np.ndarray) -> dict[int, np.ndarray]:
        """uint8 [h, w, 3] of each position that has one."""
        found = {}
        for position in positions.tolist():
            pixels = self._one(position)
            if pixels is not None:
                found[position] = pixels
        return found

    def _one(self, position: int) -> np.ndarray | None:
        index = bisect.bisect_right(self._starts, position) - 1
        file, rows, group_starts = self._open(index)
        row = position - self._starts[index]
        place = int(np.searchsorted(rows, row))
        if place == len(rows) or rows[place] != row:
            return None
        group = bisect.bisect_right(group_starts, place) - 1
        if (index, group) not in self._groups:
            self._groups[index, group] = file.read_row_group(group, ["height", "width", "rgb"]).to_pylist()
            if len(self._groups) > THUMBNAIL_GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
        self._groups.move_to_end((index, group))
        item = self._groups[index, group][place - group_starts[group]]
        return np.frombuffer(item["rgb"], np.uint8).reshape(item["height"], item["width"], 3)

    def _open(self, index: int) -> tuple[pq.ParquetFile, np.ndarray, list[int]]:
        if index not in self._rows:
            file = pq.ParquetFile(pictures_of(self._parts[index]) / THUMBNAILS_TABLE)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._rows[index] = (file, file.read(["row"])["row"].to_numpy(), [0, *accumulate(sizes)][:-1])
            if len(self._rows) > _Column.SHARDS:
                self._rows.popitem(last=False)[1][0].close()
        self._rows.move_to_end(index)
        return self._rows[index]


def _write(
    parts: Sequence[Part],
    starts: list[int],
    rejections: _Rejections,
    duplicates: int,
    scan: Account,
    config: CurationConfig,
    out_dir: Path,
    groups: int,
    shard_names: dict[str, str],
) -> Summary:
    """The second reading of the scores: ledger, kept records of each group, and the counts of the report."""
    summary = Summary(scan)
    thumbnails = Thumbnails(parts, starts)
    (out_dir / GROUPS).mkdir()
    with _TableWriter(out_dir / ledger.LEDGER_TABLE, ledger.LEDGER) as book:
        for group in range(groups):
            members = group_range(group, groups, len(parts))
            (out_dir / SCORES_INDEX / f"{group:05d}").mkdir(parents=True)
            write_index(out_dir / SCORES_INDEX / f"{group:05d}", [parts[i] for i in members])
            with _TableWriter(out_dir / GROUPS / f"{group:05d}.parquet", KEPT) as chosen:
                for index in members:
                    part = parts[index]
                    if part.error:
                        file = shard_names.get(part.name, part.name)
                        book.add(_failed_row(part, file))
                        summary.add_failed(part, file)
                        continue
                    start, stop = starts[index], starts[index + 1]
                    directory = fetch_columns(part)
                    scores = read_scores(directory)
                    assert len(scores) == part.rows, part
                    rows = _ledger_rows(scores, part, start, rejections.between(start, stop))
                    book.add(rows)
                    kept = _kept_rows(scores, rows, rejections.captions_between(start, stop), start, part, config)
                    chosen.add(pa.Table.from_pandas(kept[KEPT.names], KEPT, preserve_index=False))
                    summary.add(scores, rows, kept, lambda rows, start=start: thumbnails.at(start + rows))
                    summary.add_account(Account.from_json(json.loads((directory / ACCOUNT).read_text())))
    return summary


def _ledger_rows(scores: pd.DataFrame, part: Part, start: int, rejected: list[tuple[int, str, str]]) -> pa.Table:
    rule, detail = np.full(len(scores), "", object), np.full(len(scores), "", object)
    for position, name, sentence in rejected:
        assert rule[position - start] == "", f"{part.name}: row {position - start} is rejected twice"
        rule[position - start], detail[position - start] = name, sentence
    table = pa.table(
        {
            "key": pa.array(scores["key"], pa.string()),
            "record_id": pa.array(scores["record_id"], pa.string()),
            "kept": pa.array(rule == "", pa.bool_()),
            "rule": pa.array(rule, pa.string()),
            "detail": pa.array(detail, pa.string()),
            "file": pa.array(scores["locator"], pa.string()),
            "shard": pa.array([part.name] * len(scores), pa.string()),
            "row": pa.array(scores["row"], pa.int64()),
        },
        schema=ledger.LEDGER,
    )
    ledger.check(table)
    return table


def _failed_row(part: Part, file: str) -> pa.Table:
    row = {"key": part.name, "record_id": "", "kept": False, "rule": ledger.SHARD_FAILED, "detail": part.error}
    return pa.Table.from_pylist([row | {"file": file, "shard": part.name, "row": -1}], ledger.LEDGER)


def _kept_rows(
    scores: pd.DataFrame, rows: pa.Table, extra: dict[int, list[str]], start: int, part: Part, config: CurationConfig
) -> pd.DataFrame:
    """The kept records: their scores with shard, tier, bucket, captions and split."""
    at = np.flatnonzero(rows["kept"].to_numpy(zero_copy_only=False))
    kept = scores.iloc[at].reset_index(drop=True)
    kept["shard"] = part.name
    kept["tier"] = tiers.assign_tiers(kept["aesthetic"], kept["synthetic"], config.tiers)
    chosen = []
    for i, captions, words, tier, record_id in zip(
        at.tolist(), kept["captions"], kept["words"], kept["tier"], kept["record_id"], strict=True
    ):
        usable = [text for text, n in zip(captions, words, strict=True) if n <= config.captions.max_words]
        if start + i in extra:
            more = clean_captions([*usable, *extra[start + i]])
            usable = [text for text in more if count_words(text) <= config.captions.max_words]
        chosen.append(choose_captions(usable, tier, record_id, config.captions))
    kept["captions"] = pd.Series(chosen, dtype=object)
    kept["bucket"] = tiers.assign_buckets(kept["source"], kept["record_id"], config.tiers)
    kept["split"] = [ledger.split(record_id) for record_id in kept["record_id"]]
    return kept


def nothing_left(content: dict, config: CurationConfig) -> str:
    """Why no record is kept, as one sentence: the largest causes, an example of each, and the remedy."""
    causes = sorted(content["rejected"].items(), key=lambda item: -item[1])[:3]
    text = [
        f"{rule} {count} (such as {content['examples'][rule]['file']}: {content['examples'][rule]['detail']})"
        for rule, count in causes
        if count
    ]
    remedies = list(dict.fromkeys(filter(None, (_remedy(rule, content, config) for rule, n in causes if n))))
    left_out = content["account"]["left_out"]
    return (
        f"curation kept none of {content['input']} records: {'; '.join(text) or 'the source has no record'}"
        + (f". Left out: {left_out}" if left_out else "")
        + (f". {' '.join(remedies)}" if remedies else "")
    )


def _remedy(rule: str, content: dict, config: CurationConfig) -> str:
    if rule == ledger.NO_CAPTION:
        return (
            "Captions are read from a .txt or .json file of the image's name, from metadata.csv, .tsv, .jsonl, .json or "
            ".parquet with file_name and text, or from a caption column; source.caption_columns names others."
        )
    if rule == ledger.CAPTION_TOO_LONG:
        low, high = content["too_long_words"]
        seen = f"{low} to {high}" if high > low else f"{low}"
        return (
            f"The shortest captions have {seen} words: raise curation.captions.max_words={config.captions.max_words}."
        )
    return "The limits are under curation.filters in the recipe." if rule in _FILTER_RULES else ""


_FILTER_RULES = {rule.name for rule in filters.RULES if rule.step != filters.SOURCE and rule.name != "undecodable"}


def digest_of_parts(parts: Sequence[Part]) -> str:
    """Of what the parts are, in their order; a failed part counts by its error."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name} {part.digest or part.error}\n".encode())
    return digest.hexdigest()


def digest_of_table(table: pa.Table) -> str:
    """Of the values, however the table is cut into chunks."""
    return hashlib.sha256(json.dumps(table.to_pydict(), ensure_ascii=False).encode()).hexdigest()


def _batches(items: Iterator) -> Iterator[list]:
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == dedup.BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


class _TableWriter:
    """Writes tables to one Parquet file in row groups of `ROW_GROUP`, however they are cut."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer, self._schema = pq.ParquetWriter(path, schema, compression="zstd"), schema
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += len(table)
        if self._rows >= ROW_GROUP:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table()
        whole = len(table) if last else len(table) // ROW_GROUP * ROW_GROUP
        if whole:
            self._writer.write_table(table.slice(0, whole).combine_chunks(), row_group_size=ROW_GROUP)
        self._waiting = [table.slice(whole)]
        self._rows = len(table) - whole

    def __enter__(self) -> _TableWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush(last=True)
        self._writer.close()
