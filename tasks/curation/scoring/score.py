r"""Scoring: computes the columns of a shard. Every record is decoded once, and nothing is decided.

    shard --read--> Record --measure--> scores.parquet      one row per record, in the order of the shard
                        |               thumbnails.parquet  small pictures of records that decode
                        |               account.json        counts of read and skipped files
                        \--scorers-----> columns.parquet     one for each scorer: a row for each record that decodes

`score_shard` makes the missing ones in one read of the shard, so that a new scorer runs alone. `join` adds the columns
of all scorers to the measured ones. Thresholds can change without new scores; `formats`, `max_pixels`, `thumbnail_px`
and scorers cannot. Memory is bounded by a batch of records, not by the shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from tasks.curation.captions import clean_captions, count_words
from tasks.curation.config import CurationConfig
from tasks.curation.decisions import dedup
from tasks.curation.scorers import COLUMNS, SCALARS, Chosen, Sample, Scorer, build_scorer, revision
from tasks.curation.scorers.base import check_range
from tasks.curation.scoring import decoding, filters
from tasks.curation.scoring.decode_memory import WORKER_BYTES
from tasks.curation.scoring.hashes import HASHES, picture_hashes
from tasks.curation.scoring.workers import CrashError, Workers
from tasks.curation.sources.base import Account, Record, Shard

SCORES_TABLE, THUMBNAILS_TABLE, ACCOUNT = "scores.parquet", "thumbnails.parquet", "account.json"
COLUMNS_TABLE = "columns.parquet"
BATCH = 256  # records in memory at a time, reduced
LARGE_PIXELS = 4_000_000  # of images that may not fit next to what others left in a worker's memory
SCORER_PX = 384  # shorter side of a model scorer's input
SCORER_RATIO = 4  # its longer side is at most that many times as long, so that a batch of long strips fits in memory
HEADER = ("format", "mode", "animated", "width", "height", "orientation")
NUMBERS = ("bytes_per_pixel", "entropy_bits", "single_color_fraction", "border_fraction")
MEASURED = pa.schema(
    [
        ("key", pa.string()),
        ("record_id", pa.string()),  # SHA-256 of the bytes
        ("row", pa.int64()),  # in the shard
        ("ext", pa.string()),
        ("num_bytes", pa.int64()),
        ("source", pa.string()),
        ("synthetic", pa.bool_()),
        ("locator", pa.string()),  # the user's own file, member or row
        ("captions", pa.list_(pa.string())),  # cleaned, of any length
        ("words", pa.list_(pa.int32())),  # of each caption
        ("problem", pa.string()),  # a rule of the source, such as unreadable_caption
        ("problem_detail", pa.string()),
        ("error_rule", pa.string()),
        ("error", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("animated", pa.bool_()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("orientation", pa.int64()),
        *((name, pa.float64()) for name in NUMBERS),
        *((name, pa.int64()) for name in HASHES),
        ("hash_margin", pa.float64()),
        ("coarse", pa.binary()),
    ]
)
SCORES = pa.schema([*MEASURED, *((name, pa.float64()) for name in SCALARS)])  # NaN: not scored
THUMBNAILS = pa.schema([("row", pa.int64()), ("height", pa.int32()), ("width", pa.int32()), ("rgb", pa.binary())])
ROW_GROUP, THUMBNAIL_GROUP = 4096, 256


def score_shard(
    corpus,
    shard: Shard,
    config: CurationConfig,
    measured_dir: Path | None,
    scorers: Mapping[Path, Chosen],
) -> dict[Path, int]:
    """Reads a shard once, and fills empty directories with its measured columns and with those of scorers.

    Args:
        corpus: see sources.base.open_corpus.
        measured_dir: for passes 1 and 2; None if their part exists.
        scorers: directory -> the scorer whose columns are written there; no scorer that needs an embedding.

    Returns:
        the number of rows of each directory.

    Raises:
        ValueError: the shard cannot be read, is not the one that was scanned, or a scorer's weights are missing.
    """
    running = [(one, build_scorer(one)) for one in scorers.values()]
    _load_libraries()
    account = Account()
    rows = dict.fromkeys([*scorers, *([measured_dir] if measured_dir else [])], 0)
    with ExitStack() as stack:
        whole = any("image" in one.spec.needs for one in scorers.values())
        work = functools.partial(measure, config=config, whole=whole)
        workers = stack.enter_context(Workers(work, memory_bytes=WORKER_BYTES, failed=_may_lack_memory))
        measured = thumbnails = None
        if measured_dir:
            measured = stack.enter_context(_Writer(measured_dir / SCORES_TABLE, MEASURED, ROW_GROUP))
            thumbnails = stack.enter_context(_Writer(measured_dir / THUMBNAILS_TABLE, THUMBNAILS, THUMBNAIL_GROUP))
        writers = [stack.enter_context(columns_writer(out_dir, one)) for out_dir, one in scorers.items()]
        for batch in _batches(_measured(corpus.read(shard, account), workers)):
            samples = [(row["row"], sample) for row, sample, _ in batch if sample is not None]
            run_scorers(running, writers, samples)
            if measured is None:
                continue
            for row, _, thumbnail in batch:
                measured.add(row)
                if thumbnail is not None:
                    thumbnails.add(_thumbnail_row(row["row"], thumbnail))
            rows[measured_dir] += len(batch)
        for out_dir, writer in zip(scorers, writers, strict=True):
            rows[out_dir] = writer.rows
    if measured_dir:
        _write_account(account, measured_dir)
    return rows


def describe_shard(corpus, shard: Shard, out_dir: Path, measured_dir: Path, look: Callable[[dict], None]) -> None:
    """Writes what is known of each record before it is decoded: columns of `MEASURED` to `measured_dir`, null for those
    of the header, so that no rule applies to them; no thumbnail, and the account, to `out_dir`.

    Args:
        look: called with each row; what it raises ends the reading.
    """
    account = Account()
    with _Writer(measured_dir / SCORES_TABLE, MEASURED, ROW_GROUP) as writer:
        for record in corpus.read(shard, account):
            row = _described(record)
            look(row)
            writer.add(row | dict.fromkeys(HEADER))
    with _Writer(out_dir / THUMBNAILS_TABLE, THUMBNAILS, THUMBNAIL_GROUP):
        _write_account(account, out_dir)


def _write_account(account: Account, out_dir: Path) -> None:
    text = json.dumps(account.to_json(), sort_keys=True, ensure_ascii=False)
    (out_dir / ACCOUNT).write_text(text + "\n")


def score_columns(measured_dir: Path, one: Chosen, out_dir: Path, embeddings_dir: Path) -> int:
    """Computes the columns of a scorer that reads embeddings (from a columns part) and captions: no image is read."""
    scorer, vectors = [(one, build_scorer(one))], _Embeddings(embeddings_dir)
    blank, nothing = Image.new("RGB", (1, 1)), np.zeros((1, 1), np.uint8)
    with columns_writer(out_dir, one) as writer, pq.ParquetFile(measured_dir / SCORES_TABLE) as table:
        for batch in table.iter_batches(BATCH, columns=["row", "captions"]):
            samples = [
                (row["row"], Sample(blank, nothing, nothing, tuple(row["captions"]), vectors.of(row["row"])))
                for row in batch.to_pylist()
                if vectors.of(row["row"]) is not None  # it decodes
            ]
            run_scorers(scorer, [writer], samples)
    return writer.rows


def join(measured_dir: Path, columns: Mapping[Path, Chosen], out_dir: Path, embedding: bool = False) -> int:
    """Writes scores.parquet: the measured columns, and the scalar ones of all scorers, with their revisions as metadata.

    Args:
        embedding: also add the column `embedding`, float32 for every table engine; null if no scorer fills it.
    """
    scored: dict[str, tuple[pa.Array, pa.Array]] = {}
    wanted, revisions = {*SCALARS, *(("embedding",) if embedding else ())}, {}
    for directory, one in columns.items():
        table = pq.read_table(directory / COLUMNS_TABLE, columns=["row", *(c for c in one.columns if c in wanted)])
        for column in table.column_names[1:]:
            scored[column] = table["row"].combine_chunks(), table[column].combine_chunks()
        revisions |= dict.fromkeys(one.columns, revision(one))
    fields = [*SCORES, *([pa.field("embedding", pa.list_(pa.float32()))] if embedding else [])]
    schema = pa.schema(fields, {"revisions": json.dumps(revisions, sort_keys=True)})
    count = 0
    with (
        pq.ParquetFile(measured_dir / SCORES_TABLE) as table,
        pq.ParquetWriter(out_dir / SCORES_TABLE, schema, compression="zstd") as writer,
    ):
        for group in range(table.num_row_groups):
            measured = table.read_row_group(group)
            rows = measured["row"].combine_chunks()
            for field in fields[len(MEASURED) :]:
                if field.name in scored:
                    known, values = scored[field.name]
                    values = values.take(pc.index_in(rows, value_set=known)).cast(field.type)
                else:
                    values = pa.nulls(len(rows), field.type)
                if field.name in SCALARS:
                    values = pc.fill_null(values, float("nan"))
                measured = measured.append_column(field.name, values)
            writer.write_table(measured.cast(schema))
            count += len(rows)
    return count


class _Embeddings:
    """The vectors of a columns part, by row. A shard of 10,000 records takes about 20 MB."""

    def __init__(self, directory: Path) -> None:
        table = pq.read_table(directory / COLUMNS_TABLE, columns=["row", "embedding"])
        rows, lists = table["row"].to_pylist(), table["embedding"].combine_chunks()
        values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float16)
        self._vectors = dict(zip(rows, values.reshape(len(rows), -1) if rows else [], strict=True))

    def of(self, row: int) -> np.ndarray | None:
        return self._vectors.get(row)


@functools.cache
def _load_libraries() -> None:
    """Imports the libraries of `measure` before workers are forked, since each would import them again."""
    decoding.decodable()
    picture_hashes(Image.new("RGB", (32, 32)))


def _measured(records: Iterator[Record], workers: Workers) -> Iterator[tuple[dict, Sample | None, np.ndarray | None]]:
    """The row of each record, its scorer input, and its thumbnail. Its bytes are in memory only until they are
    measured."""
    # A record with a problem is rejected in any case.
    rows = ((_described(record), None if record.problem else record.data) for record in records)
    for row, measured in workers.map(rows):
        if isinstance(measured, CrashError):
            measured = Measured({"error_rule": "undecodable", "error": str(measured)})
        yield row, _sample(row, measured), measured.thumbnail if measured is not None else None


def score_record(record: Record, config: CurationConfig) -> tuple[dict, Sample | None]:
    """Computes the row of `MEASURED` of one record in this process, without the columns of scorers."""
    row = _described(record)
    return row, _sample(row, None if record.problem else measure(record.data, config))


def _described(record: Record) -> dict:
    captions = clean_captions(record.captions)
    return _blank() | {
        "key": record.key,
        "record_id": hashlib.sha256(record.data).hexdigest(),
        "row": record.row,
        "ext": record.ext,
        "num_bytes": len(record.data),
        "source": record.source,
        "synthetic": record.source == "scenes",
        "locator": record.locator,
        "captions": captions,
        "words": [count_words(text) for text in captions],
        "problem": record.problem,
        "problem_detail": record.detail,
    }


def _sample(row: dict, measured: Measured | None) -> Sample | None:
    """Writes the measured values into the row; returns the model scorers' sample, or None if the image does not
    decode."""
    if measured is None:
        return None
    row.update(measured.columns)
    if not measured.rgb:
        return None
    view = Image.frombytes("RGB", measured.size, measured.rgb)
    image = Image.frombytes("RGB", measured.image_size, measured.image) if measured.image else view
    return Sample(image, np.asarray(view), np.asarray(view.convert("L")), tuple(row["captions"]))


class Measured(NamedTuple):
    """The columns of passes 1 and 2 and of deduplication, and the image as scorers need it.

    size: (width, height), the longer at most `filters.ANALYSIS_PX`. rgb: its pixels; b"" if it does not decode.
    image_size, image: with a shorter side of at most `SCORER_PX` and a longer of at most `SCORER_RATIO` times that, if a
    scorer needs it.
    """

    columns: dict[str, Any]
    size: tuple[int, int] = (0, 0)
    rgb: bytes = b""
    image_size: tuple[int, int] = (0, 0)
    image: bytes = b""
    thumbnail: np.ndarray | None = None


def measure(data: bytes, config: CurationConfig, whole: bool = True) -> Measured:
    """Decodes and measures one image. `whole`: also returns it at the size that scorers need."""
    columns: dict[str, Any] = {}
    try:
        header, image = decoding.inspect_and_decode(data, config.filters.max_pixels, config.filters.formats, SCORER_PX)
    except (decoding.TooManyPixelsError, decoding.UndecodableError) as error:
        return _not_decoded(columns, error)
    columns |= {"format": header.format, "mode": header.mode, "animated": header.animated}
    columns |= {"width": header.width, "height": header.height, "orientation": header.orientation}
    columns["bytes_per_pixel"] = len(data) / max(1, header.width * header.height)
    if isinstance(image, ValueError):
        return _not_decoded(columns, image)
    if image is None:
        return Measured(columns)
    view = filters.reduced(image, filters.ANALYSIS_PX)
    pixels, gray = np.asarray(view), np.asarray(view.convert("L"))
    columns["entropy_bits"] = filters.entropy_bits(gray)
    columns["single_color_fraction"] = filters.single_color_fraction(pixels)
    columns["border_fraction"] = filters.border_fraction(pixels)
    columns |= picture_hashes(view)
    columns["coarse"] = np.asarray(view.resize((dedup.COARSE_PX,) * 2, Image.Resampling.BOX)).tobytes()
    thumbnail = dedup.thumbnail(image, config.dedup.thumbnail_px)
    if not whole:
        return Measured(columns, view.size, view.tobytes(), thumbnail=thumbnail)
    image = filters.shrunk(image, max(min(image.size), max(image.size) / SCORER_RATIO) / SCORER_PX)
    return Measured(columns, view.size, view.tobytes(), image.size, image.tobytes(), thumbnail)


def _not_decoded(columns: dict[str, Any], error: ValueError) -> Measured:
    rule = "too_many_pixels" if isinstance(error, decoding.TooManyPixelsError) else "undecodable"
    return Measured(columns | {"error_rule": rule, "error": str(error)})


def _may_lack_memory(measured: Measured) -> bool:
    """Whether a large image is broken, or a library reports so that it gets no memory."""
    columns = measured.columns
    large = columns.get("width", 0) * columns.get("height", 0) > LARGE_PIXELS
    return large and columns.get("error_rule") == "undecodable"


def run_scorers(
    scorers: Sequence[tuple[Chosen, Scorer]],
    writers: Sequence[_ColumnsWriter],
    samples: Sequence[tuple[int, Sample]],
) -> None:
    """Scores a batch of (row in the shard, sample), each scorer in its own batch size, and writes the columns."""
    for (one, scorer), writer in zip(scorers, writers, strict=True):
        for begin in range(0, len(samples), one.spec.batch):
            batch = samples[begin : begin + one.spec.batch]
            values = scorer([sample for _, sample in batch])
            for column in one.columns:
                assert len(values[column]) == len(batch), (one.spec.name, column)
                check_range(one.spec.name, COLUMNS[column], np.asarray(values[column], np.float32))
            for i, (row, _) in enumerate(batch):
                writer.add({"row": row} | {column: values[column][i] for column in one.columns})


def columns_writer(out_dir: Path, one: Chosen) -> _ColumnsWriter:
    """A writer of columns.parquet: `row` and the scorer's columns; the schema has types, units, ranges and the
    revision."""
    fields = [pa.field("row", pa.int64()), *(COLUMNS[column].field for column in one.columns)]
    schema = pa.schema(fields, {"revision": revision(one), "dtype": one.dtype})
    return _ColumnsWriter(out_dir / COLUMNS_TABLE, schema, ROW_GROUP)


def _blank() -> dict:
    """Every column, with the values of an unmeasured image."""
    return {
        **{"error_rule": "", "error": "", "format": "", "mode": "", "animated": False},
        **{"width": 0, "height": 0, "orientation": 1},
        **dict.fromkeys(NUMBERS, float("nan")),
        **dict.fromkeys(HASHES, 0),
        **{"hash_margin": float("nan"), "coarse": b""},
    }


def _thumbnail_row(row: int, pixels: np.ndarray) -> dict:
    return {"row": row, "height": pixels.shape[0], "width": pixels.shape[1], "rgb": pixels.tobytes()}


def _batches(rows: Iterator[tuple]) -> Iterator[list[tuple]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


class _Writer:
    """Writes rows to a Parquet file in row groups of a fixed size, so that equal rows give equal bytes."""

    def __init__(self, path: Path, schema: pa.Schema, group: int) -> None:
        self._writer, self._schema, self._group = pq.ParquetWriter(path, schema, compression="zstd"), schema, group
        self._rows: list[dict] = []

    def add(self, row: dict) -> None:
        self._rows.append(row)
        if len(self._rows) == self._group:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._rows:
            self._flush()
        self._writer.close()


class _ColumnsWriter(_Writer):
    """Counts its rows; `rows` is final after the block."""

    rows = 0

    def add(self, row: dict) -> None:
        self.rows += 1
        super().add(row)
