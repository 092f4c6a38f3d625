r"""Deciding: the scores of all shards -> what becomes of each record. SQL over columns (engines.py): no image is read.

    scores of shard 0..n --rules, tiers--> records --dedup--> dropped --> fates
                                                                            |
    ledger.parquet            every record: kept, or the first rule that rejected it
    groups/00000.parquet ...  the kept records of the shards of a group, with tier, episode and captions of exact duplicates
    scores/00000/ ...         the index of their score parts, for the task that writes their selections
    report.json, report.html  counts, and the same as a page

Memory is bounded by the engine's, however many records there are: what is read in Python is read in the corpus's order, in
batches, apart from the made pictures that dedup.py compares.
"""

# ruff: noqa: S608 (SQL of our own names and numbers; texts are quoted by engines.quoted)
from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.logs import get_logger
from tasks.curation import ledger
from tasks.curation.captioning.run import CAPTIONS_TABLE
from tasks.curation.captions import count_words, merge_captions
from tasks.curation.config import CaptionConfig, CurationConfig
from tasks.curation.decisions import dedup, near, rules, semantic, tiers
from tasks.curation.decisions.engines import PART, Engine, open_engine, quoted, rows_of
from tasks.curation.reports import report
from tasks.curation.reports.summary import FATES, summarize
from tasks.curation.scoring.hashes import HASHES
from tasks.curation.scoring.score import ACCOUNT, SCORES, SCORES_TABLE, THUMBNAILS_TABLE
from tasks.curation.scoring.scored_shard import fetch_pictures
from tasks.curation.sources.base import Account
from tasks.store import Part, fetch_part, group_range, write_index

logger = get_logger(__name__)

GROUPS, SCORES_INDEX = "groups", "scores"
LOGS = ("scores/*/locations.parquet",)  # of a decision directory, see manifest.seal
KEPT = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("tier", pa.string()),
        ("bucket", pa.string()),  # the episode, under the name that stored tables have
        ("extra_captions", pa.list_(pa.string())),  # of exact duplicates: the same bytes, so they are this record's too
    ]
)
MERGED = pa.schema(
    [("position", pa.int64()), ("words", pa.list_(pa.int32())), ("extra_captions", pa.list_(pa.string()))]
)
PARTS = pa.schema([("part", pa.int64()), ("shard", pa.string()), ("file", pa.string()), ("error", pa.string())])
ROW_GROUP = 50_000
THUMBNAIL_GROUPS_IN_MEMORY = 64
FILES_OPEN = 16
FETCHERS = 8  # threads that download and verify parts


def decide(
    parts: Sequence[Part],
    scan: Account,
    config: CurationConfig,
    out_dir: str | os.PathLike,
    groups: int = 1,
    shard_names: dict[str, str] | None = None,
    engine: str = "duckdb",
) -> dict:
    """Writes a decision directory (see the module) and returns the content of its report.json.

    That no record is left is not an error here, so that ledger and report can be read: see `nothing_left`.

    Args:
        parts: the score parts in the order of the corpus's shards, named by shard; those that failed name the error.
        scan: what the scan of the source saw and left out.
        groups: of shards, see store.group_range.
        shard_names: of shards that failed, the user's own file.
        engine: of the tables, see engines.open_engine; the decisions do not depend on it.
    """
    out_dir = Path(out_dir)
    thumbnails = Thumbnails(parts)
    with (
        tempfile.TemporaryDirectory(dir=out_dir.parent) as work,
        contextlib.closing(open_engine(engine, work)) as tables,
    ):
        account = _scan_scores(tables, parts, scan, shard_names or {})
        cuts = decide_records(tables, config, thumbnails.at)
        write_tables(tables, parts, out_dir, groups)
        summary = summarize(tables, config, account, cuts, len(parts), thumbnails.at)
    content = summary.content()
    (out_dir / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (out_dir / "report.html").write_text(report.render(summary))
    return content


def fetch_columns(part: Part) -> Path:
    """A score or captions part without what decisions do not read: its pictures, which are fetched for the few shards whose
    pictures are compared or shown, and the captioner's answers, of which the scores have the captions."""
    return fetch_part(part, without=(THUMBNAILS_TABLE, CAPTIONS_TABLE))


def _scan_scores(engine: Engine, parts: Sequence[Part], scan: Account, shard_names: dict[str, str]) -> Account:
    """Tables `scores` and `parts`; returns the account of the scan and of all shards."""
    rows = [
        {"part": i, "shard": part.name, "file": shard_names.get(part.name, part.name), "error": part.error}
        for i, part in enumerate(parts)
    ]
    engine.load("parts", PARTS, rows)
    files, account = {}, scan
    there = [i for i, part in enumerate(parts) if not part.error]
    with ThreadPoolExecutor(FETCHERS) as pool:
        for i, directory in zip(there, pool.map(fetch_columns, (parts[i] for i in there)), strict=True):
            files[str(directory / SCORES_TABLE)] = i
            account += Account.from_json(json.loads((directory / ACCOUNT).read_text()))
    if files:
        engine.scan("scores", files)
    else:
        engine.load("scores", SCORES.append(pa.field("part", pa.int64())), [])
    return account


def decide_records(
    engine: Engine, config: CurationConfig, thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]]
) -> tuple[float, ...]:
    """Tables `records` (every row of `scores`), `dropped` (duplicates) and `merged` (captions of exact duplicates).

    Returns:
        the lowest score of each tier but the last.

    Raises:
        ValueError: the corpus is too large for the duplicates that the recipe asks for.
    """
    cuts = tiers.tier_cuts(engine, config)
    engine.create("records", records_sql(config, cuts))
    counts = (
        "SELECT count(*) AS records, coalesce(sum(CASE WHEN rule = '' THEN 1 ELSE 0 END), 0) AS passed FROM records"
    )
    ((records, passed),) = (row.values() for row in rows_of(engine, counts))
    logger.info(f"curation: {records} records, {passed} pass the filters")
    _drop_exact(engine)
    _drop_near(engine, config, thumbnails)
    engine.create(
        "dropped",
        "SELECT d.position, d.rule, CASE WHEN d.rule = 'exact_duplicate' THEN concat('same bytes as ', k.locator) "
        "WHEN d.how = 'thumbnails' THEN concat('thumbnail differs by ', number_text(round(d.measure, 1)), ' from ', k.locator) "
        "WHEN d.how = 'embedding' THEN concat('embedding has cosine ', number_text(d.measure), ' with ', k.locator) "
        "ELSE concat('pHash-256 differs in ', number_text(d.measure), ' of 256 bits from ', k.locator) END AS detail "
        "FROM (SELECT position, keeper, 'exact_duplicate' AS rule, 'bytes' AS how, CAST(0 AS DOUBLE) AS measure FROM exact "
        "UNION ALL SELECT position, keeper, 'near_duplicate' AS rule, how, measure FROM near) d "
        "JOIN records k ON d.keeper = k.position",
    )
    engine.load("merged", MERGED, _merged_captions(engine, config.captions))
    return cuts


def records_sql(config: CurationConfig, cuts: tuple[float, ...]) -> str:
    """Columns of each record alone: the rule that it breaks, its rank among duplicates, tier, episode."""
    made = ", ".join(quoted(name) for name in config.dedup.thumbnail_sources) or "''"
    return (
        "SELECT part, row, position, key, record_id, locator, source, synthetic, rule, "
        f"{rules.detail_sql(config)} AS detail, "
        "width, height, width * height AS pixels, "
        # In half points: a re-encoded copy must not win by a hair.
        "coalesce(TRY_CAST(floor(2 * aesthetic) AS BIGINT), 0) AS points, "
        f"{', '.join(HASHES)}, hash_margin, made, "
        # What is made has the order of its recipe.
        "CASE WHEN made THEN '' ELSE record_id END AS tie, CASE WHEN made THEN '' ELSE locator END AS name, "
        "CASE WHEN made THEN coarse END AS coarse, "
        "hex_to_int(substr(record_id, 1, 15)) AS short_id, hex_to_int(substr(record_id, 17, 8)) AS chance, "
        "CASE WHEN size(words) > 0 THEN array_min(words) END AS shortest, "
        f"words_up_to(words, {config.captions.max_words}) AS words, "
        f"{tiers.tier_sql(config.tiers, cuts)} AS tier, {tiers.episode_sql(config, cuts)} AS bucket, "
        f"{ledger.split_sql()} AS split "
        f"FROM (SELECT *, part * {PART} + row AS position, {rules.rule_sql(config)} AS rule, "
        f"source IN ({made}) AS made FROM scores) scored"
    )


def _drop_exact(engine: Engine) -> None:
    """Table `exact` (position, keeper) of the records whose bytes another one has."""
    engine.create(
        "exact",
        "SELECT position, keeper FROM (SELECT r.position, first_value(r.position) OVER "
        f"(PARTITION BY r.record_id ORDER BY {near.PREFERENCE}) AS keeper FROM records r JOIN "
        "(SELECT short_id FROM records WHERE rule = '' GROUP BY short_id HAVING count(*) > 1) t ON r.short_id = t.short_id "
        "WHERE r.rule = '') x WHERE position <> keeper",
    )


def _drop_near(
    engine: Engine, config: CurationConfig, thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]]
) -> None:
    """Table `near` (position, keeper, how, measure)."""
    engine.create(
        "compared",
        "SELECT r.position, r.pixels, r.points, r.tie, r.name, r.made, r.coarse, "
        "CAST(r.width AS DOUBLE) / r.height AS aspect, "
        f"(NOT r.made AND r.hash_margin >= {config.dedup.min_hash_margin!r}) AS by_hashes, "
        f"{', '.join(f'r.{name}' for name in HASHES)} "
        "FROM records r LEFT JOIN exact e ON r.position = e.position WHERE r.rule = '' AND e.position IS NULL",
    )
    near.match_by_hashes(engine, config.dedup)
    dedup.match_by_thumbnails(engine, config.dedup, thumbnails)
    engine.append("matched", "SELECT a, b, 'thumbnails' AS how, measure FROM thumbnail_pairs")
    if config.dedup.min_embedding_similarity is not None:
        engine.create(
            "embedded",
            "SELECT c.position, c.tie, s.embedding FROM compared c JOIN records r ON c.position = r.position "
            "JOIN scores s ON r.part = s.part AND r.row = s.row LEFT JOIN same l ON c.position = l.position "
            "WHERE s.embedding IS NOT NULL AND NOT c.made AND l.position IS NULL",
        )
        semantic.match_by_embeddings(engine, config.dedup.min_embedding_similarity)
        engine.append("matched", "SELECT a, b, 'embedding' AS how, measure FROM embedding_pairs")
    near.keep_stars(engine)


def _merged_captions(engine: Engine, config: CaptionConfig) -> Iterator[dict]:
    """Of each record with exact duplicates: their captions, and the words of all that may be kept, rising."""
    query = (
        "SELECT x.keeper, x.position, s.captions FROM (SELECT keeper, position FROM exact "
        "UNION SELECT keeper, keeper AS position FROM exact) x JOIN records r ON x.position = r.position "
        "JOIN scores s ON r.part = s.part AND r.row = s.row "
        "ORDER BY x.keeper, CASE WHEN x.position = x.keeper THEN 0 ELSE 1 END, r.name, x.position"
    )
    for keeper, rows in groupby(rows_of(engine, query), lambda row: row["keeper"]):
        own, *others = (row["captions"] for row in rows)
        extra = [text for captions in others for text in captions]
        words = [count_words(text) for text in merge_captions(own, extra, config)]
        yield {"position": keeper, "words": sorted(words), "extra_captions": extra}


class Thumbnails:
    """Thumbnails by position; the last `THUMBNAIL_GROUPS_IN_MEMORY` row groups stay in memory."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._rows: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray, list[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[dict]] = OrderedDict()

    def at(self, positions: np.ndarray) -> dict[int, np.ndarray]:
        """uint8 [h, w, 3] of each position that has one."""
        pictures = {position: self._one(*divmod(position, PART)) for position in positions.tolist()}
        return {position: pixels for position, pixels in pictures.items() if pixels is not None}

    def _one(self, index: int, row: int) -> np.ndarray | None:
        file, rows, group_starts = self._open(index)
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
            file = pq.ParquetFile(fetch_pictures(self._parts[index]) / THUMBNAILS_TABLE)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._rows[index] = (file, file.read(["row"])["row"].to_numpy(), [0, *accumulate(sizes)][:-1])
            if len(self._rows) > FILES_OPEN:
                self._rows.popitem(last=False)[1][0].close()
        self._rows.move_to_end(index)
        return self._rows[index]


def write_tables(engine: Engine, parts: Sequence[Part], out_dir: Path, groups: int) -> None:
    """The ledger, and the kept records and score parts of each group, each in the order of the corpus."""
    failed = (
        f"SELECT shard AS key, '' AS record_id, '{ledger.SHARD_FAILED}' AS rule, error AS detail, file, shard, "
        f"CAST(-1 AS BIGINT) AS row, part * {PART} AS position FROM parts WHERE error <> ''"
    )
    book = (
        "SELECT key, record_id, rule = '' AS kept, rule, detail, file, shard, row FROM ("
        "SELECT f.key, f.record_id, f.rule, f.detail, f.locator AS file, p.shard, f.row, f.position "
        f"FROM ({FATES}) f JOIN parts p ON f.part = p.part UNION ALL {failed}) x ORDER BY position"
    )
    with _TableWriter(out_dir / ledger.LEDGER_TABLE, ledger.LEDGER) as writer:
        for batch in engine.batches(book):
            batch = batch.cast(ledger.LEDGER)
            ledger.check(batch)
            writer.add(batch)
    (out_dir / GROUPS).mkdir()
    kept = (
        "SELECT f.part, p.shard, f.row, f.tier, f.bucket, m.extra_captions "
        f"FROM ({FATES}) f JOIN parts p ON f.part = p.part LEFT JOIN merged m ON f.position = m.position "
        "WHERE f.rule = '' ORDER BY f.position"
    )
    batches = engine.batches(kept)
    waiting = next(batches, None)
    for group in range(groups):
        members = group_range(group, groups, len(parts))
        (out_dir / SCORES_INDEX / f"{group:05d}").mkdir(parents=True)
        write_index(out_dir / SCORES_INDEX / f"{group:05d}", [parts[i] for i in members])
        with _TableWriter(out_dir / GROUPS / f"{group:05d}.parquet", KEPT) as writer:
            while waiting is not None:
                count = int(np.searchsorted(waiting["part"].to_numpy(), members.stop))
                writer.add(waiting.slice(0, count).select(KEPT.names).cast(KEPT))
                if count < len(waiting):
                    waiting = waiting.slice(count)
                    break
                waiting = next(batches, None)
    assert waiting is None


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
    if rule == rules.NO_CAPTION:
        return (
            "Captions are read from a .txt or .json file of the image's name, from metadata.csv, .tsv, .jsonl, .json or "
            ".parquet with file_name and text, or from a caption column; source.caption_columns names other columns, and "
            "source.captions_folder a folder of text files."
        )
    if rule == rules.CAPTION_TOO_LONG:
        low, high = content["too_long_words"]
        seen = f"{low} to {high}" if high > low else f"{low}"
        return (
            f"The shortest captions have {seen} words: raise curation.captions.max_words={config.captions.max_words}."
        )
    return "The limits are under curation.filters in the recipe." if rule in _FILTER_RULES else ""


_FILTER_RULES = {
    rule.name
    for rule in rules.RULES
    if rule.step not in (rules.SOURCE, rules.CAPTIONS, rules.DEDUP) and rule.name != "undecodable"
}


def digest_of_parts(parts: Sequence[Part]) -> str:
    """Of what the parts are, in their order; a failed part counts by its error."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name} {part.digest or part.error}\n".encode())
    return digest.hexdigest()


def digest_of_table(table: pa.Table) -> str:
    """Of the values, however the table is cut into chunks."""
    return hashlib.sha256(json.dumps(table.to_pydict(), ensure_ascii=False).encode()).hexdigest()


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
