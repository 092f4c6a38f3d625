"""Scoring: a shard -> its columns. Every record is decoded once, and nothing is decided.

    shard --read--> Record --score_record--> scores.parquet      one row per record, in the order of the shard
                                             thumbnails.parquet  small pictures of those that decode
                                             account.json        what the reader saw and left out

A threshold can change without new scores; `formats`, `max_pixels`, `thumbnail_px` and the scorers cannot.
Memory is bounded by a batch of records, not by the shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.curation import decoding, dedup, filters
from tasks.curation.captions import clean_captions, count_words
from tasks.curation.config import CurationConfig
from tasks.curation.hashes import HASHES, picture_hashes
from tasks.curation.scorers import COLUMNS as MODEL_COLUMNS
from tasks.curation.scorers import Sample, Scorer, build_scorers, needs_image
from tasks.curation.sources.base import Account, Record, Shard
from tasks.curation.workers import CrashError, Workers

SCORES_TABLE, THUMBNAILS_TABLE, ACCOUNT = "scores.parquet", "thumbnails.parquet", "account.json"
BATCH = 64  # records that a scorer sees at once
SCORER_PX = 384  # shorter side of what a model scorer sees
BYTES_A_PIXEL = 24  # that decoding may take; twice what Pillow takes for RGBA
OWN_BYTES = 512 * 2**20  # that a worker may take besides
NUMBERS = ("bytes_per_pixel", "entropy_bits", "single_color_fraction", "border_fraction")
SCORES = pa.schema(
    [
        ("key", pa.string()),
        ("record_id", pa.string()),  # SHA-256 of the bytes
        ("row", pa.int64()),  # in the shard
        ("ext", pa.string()),
        ("num_bytes", pa.int64()),
        ("source", pa.string()),
        ("synthetic", pa.bool_()),
        ("locator", pa.string()),  # the user's own file, member or row
        ("captions", pa.list_(pa.string())),  # cleaned; none is left out for its length
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
        *((name, pa.float64()) for name in (*NUMBERS, *MODEL_COLUMNS)),
        *((name, pa.int64()) for name in HASHES),
        ("hash_margin", pa.float64()),
        ("coarse", pa.binary()),
    ]
)
THUMBNAILS = pa.schema([("row", pa.int64()), ("height", pa.int32()), ("width", pa.int32()), ("rgb", pa.binary())])
ROW_GROUP, THUMBNAIL_GROUP = 4096, 256


def score_shard(corpus, shard: Shard, config: CurationConfig, out_dir: str | os.PathLike) -> int:
    """Writes the scores of one shard into an empty directory; returns the number of records.

    Args:
        corpus: see sources.base.open_corpus.

    Raises:
        ValueError: the shard cannot be read, or is not the one that was scanned.
    """
    out_dir = Path(out_dir)
    scorers = build_scorers(config.scorers)
    _load_libraries()
    account = Account()
    count = 0
    with (
        _Writer(out_dir / SCORES_TABLE, SCORES, ROW_GROUP) as scores,
        _Writer(out_dir / THUMBNAILS_TABLE, THUMBNAILS, THUMBNAIL_GROUP) as thumbnails,
        Workers(
            functools.partial(measure, config=config),
            memory_bytes=OWN_BYTES + BYTES_A_PIXEL * config.filters.max_pixels,
        ) as workers,
    ):
        for batch in _batches(_measured(corpus.read(shard, account), workers)):
            run_scorers(scorers, [(row, sample) for row, sample, _ in batch if sample is not None])
            for row, _, thumbnail in batch:
                if thumbnail is not None:
                    thumbnails.add(_thumbnail_row(row["row"], thumbnail))
                scores.add(row)
            count += len(batch)
    (out_dir / ACCOUNT).write_text(json.dumps(account.to_json(), sort_keys=True, ensure_ascii=False) + "\n")
    return count


@functools.cache
def _load_libraries() -> None:
    """Imports what `measure` needs, once: workers are forked, and each would import it anew."""
    decoding.decodable()
    picture_hashes(Image.new("RGB", (32, 32)))


def _measured(records: Iterator[Record], workers: Workers) -> Iterator[tuple[dict, Sample | None, np.ndarray | None]]:
    """The row of each record, what the scorers are to see, and its thumbnail. Its bytes are in memory only until they are
    measured."""
    # A record with a problem is rejected, whatever the image is.
    rows = ((_described(record), None if record.problem else record.data) for record in records)
    for row, measured in workers.map(rows):
        if isinstance(measured, CrashError):
            measured = Measured({"error_rule": "undecodable", "error": str(measured)})
        yield row, _sample(row, measured), measured.thumbnail if measured is not None else None


def score_record(record: Record, config: CurationConfig) -> tuple[dict, Sample | None]:
    """The row of `SCORES` of one record, in this process; the columns of the model scorers are still empty."""
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
    """Enters what was measured into the row; what the model scorers are to see, if the image decodes."""
    if measured is None:
        return None
    row.update(measured.columns)
    if not measured.rgb:
        return None
    view = Image.frombytes("RGB", measured.size, measured.rgb)
    image = Image.frombytes("RGB", measured.image_size, measured.image) if measured.image else view
    return Sample(image, np.asarray(view), np.asarray(view.convert("L")), tuple(row["captions"]))


class Measured(NamedTuple):
    """The columns of passes 1 and 2 and of deduplication that are known, and the image as far as scorers need it.

    size: (width, height), the longer at most `filters.ANALYSIS_PX`. rgb: its pixels; b"" where it does not decode.
    image_size, image: with a shorter side of at most `SCORER_PX`, where a scorer needs that.
    """

    columns: dict[str, Any]
    size: tuple[int, int] = (0, 0)
    rgb: bytes = b""
    image_size: tuple[int, int] = (0, 0)
    image: bytes = b""
    thumbnail: np.ndarray | None = None


def measure(data: bytes, config: CurationConfig) -> Measured:
    """Decodes one image."""
    columns: dict[str, Any] = {}
    try:
        header, image = decoding.inspect_and_decode(data, config.filters.max_pixels, config.filters.formats, SCORER_PX)
        columns |= {"format": header.format, "mode": header.mode, "animated": header.animated}
        columns |= {"width": header.width, "height": header.height, "orientation": header.orientation}
        columns["bytes_per_pixel"] = len(data) / max(1, header.width * header.height)
        if isinstance(image, ValueError):
            raise image
    except decoding.TooManyPixelsError as error:
        return Measured(columns | {"error_rule": "too_many_pixels", "error": str(error)})
    except decoding.UndecodableError as error:
        return Measured(columns | {"error_rule": "undecodable", "error": str(error)})
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
    if not needs_image(config.scorers):
        return Measured(columns, view.size, view.tobytes(), thumbnail=thumbnail)
    image = filters.shrunk(image, min(image.size) / SCORER_PX)
    return Measured(columns, view.size, view.tobytes(), image.size, image.tobytes(), thumbnail)


def run_scorers(scorers: list[Scorer], samples: list[tuple[dict, Sample]]) -> None:
    """Fills the columns of the model scorers in the rows."""
    if not samples:
        return
    for scorer in scorers:
        values = scorer([sample for _, sample in samples])
        assert len(values) == len(samples), scorer.column
        for (row, _), value in zip(samples, values, strict=True):
            row[scorer.column] = float(value)


def _blank() -> dict:
    """Every column of an image of which nothing is known yet."""
    return {
        **{"error_rule": "", "error": "", "format": "", "mode": "", "animated": False},
        **{"width": 0, "height": 0, "orientation": 1},
        **dict.fromkeys((*NUMBERS, *MODEL_COLUMNS), float("nan")),
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
