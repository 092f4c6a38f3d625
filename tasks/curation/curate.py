"""Curation: a records directory -> a curated directory.

    records/shards/*.tar --score_shard (one per shard)--> scores.parquet, thumbnails.parquet
                                                              |
    decide (pure) -> captions -> deduplicate -> tiers <--- curate (gathers all)
          |
          +--> shards/*.tar (kept, bytes untouched), records.parquet, ledger.parquet, report.json, report.html

Scoring decodes every record once and decides nothing; deciding reads columns and decodes nothing. So a new
threshold needs no new scoring; a new hash_size, thumbnail_px or scorer does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from tasks.curation import dedup, filters, ledger, report, tiers
from tasks.curation.captions import choose_captions, usable_captions
from tasks.curation.config import CurationConfig
from tasks.curation.scorers import COLUMNS as MODEL_COLUMNS
from tasks.curation.scorers import Sample, Scorer, build_scorers
from tasks.curation.shards import ShardWriter, read_shard, shard_name

BATCH = 64  # records that a scorer sees at once
SCORER_PX = 384  # shorter side of what a model scorer sees
NUMBERS = ("bytes_per_pixel", "entropy_bits", "single_color_fraction", "border_fraction")
CARRIED = ("key", "record_id", "shard", "ext", "num_bytes", "source", "synthetic")
DECIDED = ("tier", "bucket", "captions", "split")

# --- scoring ---------------------------------------------------------------------------------------------------


def score_shard(records_dir: str | os.PathLike, shard: int, config: CurationConfig, out_dir: str | os.PathLike) -> dict:
    """Scores the records of one shard: scores.parquet and thumbnails.parquet, one row per record, in table order.

    Raises:
        ValueError: no such shard, or it does not hold what records.parquet says.
    """
    records_dir, out_dir = Path(records_dir), Path(out_dir)
    table = _read_records(records_dir)
    rows = table[table["shard"] == shard]
    path = records_dir / shard_name(shard)
    if not path.is_file():
        raise ValueError(f"{records_dir} has no shard {shard}; it has {_few(sorted(set(table['shard'])))}")
    scorers = build_scorers(config.scorers)
    scored: dict[str, dict] = {}
    pending: list[tuple[dict, Sample]] = []
    small: dict[str, np.ndarray] = {}
    expected = dict(zip(rows["key"], rows["record_id"], strict=True))
    for record in tqdm(read_shard(path), total=len(rows), desc=f"score shard {shard}", mininterval=2, unit="record"):
        if expected.get(record.key) != hashlib.sha256(record.data).hexdigest():
            raise ValueError(f"{path}: the bytes of {record.key!r} are not those that records.parquet names")
        columns, sample = score_record(record.data, record.sidecar.get("captions", []), config)
        scored[record.key] = columns
        if sample is None:
            continue
        small[record.key] = dedup.thumbnail(sample.image, config.dedup.thumbnail_px)
        pending.append((columns, sample))
        if len(pending) == BATCH:
            _run_scorers(scorers, pending)
    _run_scorers(scorers, pending)
    missing = [key for key in expected if key not in scored]
    if missing:
        raise ValueError(f"{path} lacks {_few(missing)}")
    keys = list(rows["key"])
    # A small corpus leaves shards empty; their tables have the same columns.
    found = pd.DataFrame([scored[key] for key in keys], columns=list(_blank()))
    scores = pd.concat([rows[list(CARRIED)].reset_index(drop=True), found], axis=1)
    _write_table(scores, out_dir / "scores.parquet")
    _write_table(
        pd.DataFrame(
            {
                "key": keys,
                "height": [small[key].shape[0] if key in small else 0 for key in keys],
                "width": [small[key].shape[1] if key in small else 0 for key in keys],
                "rgb": [small[key].tobytes() if key in small else b"" for key in keys],
            }
        ),
        out_dir / "thumbnails.parquet",
    )
    return {"shard": shard, "records": len(keys), "decoded": len(small)}


def score_record(data: bytes, captions: list[str], config: CurationConfig) -> tuple[dict, Sample | None]:
    """The columns of passes 1 and 2 and of deduplication, those of pass 3 still empty; and what pass 3 is to see."""
    columns = _blank()
    try:
        header, image = filters.inspect_and_decode(data, config.filters.max_pixels)
        columns |= {"format": header.format, "mode": header.mode, "animated": header.animated}
        columns |= {"width": header.width, "height": header.height, "orientation": header.orientation}
        columns["bytes_per_pixel"] = len(data) / max(1, header.width * header.height)
        if isinstance(image, ValueError):
            raise image
    except filters.TooManyPixelsError as error:
        return columns | {"error_rule": "too_many_pixels", "error": str(error)}, None
    except filters.UndecodableError as error:
        return columns | {"error_rule": "undecodable", "error": str(error)}, None
    columns["width"], columns["height"] = image.size
    scale = min(image.size) / SCORER_PX
    if scale > 1:
        size = tuple(max(1, round(side / scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    view = filters.reduced(image, filters.ANALYSIS_PX)
    pixels, gray = np.asarray(view), np.asarray(view.convert("L"))
    columns["entropy_bits"] = filters.entropy_bits(gray)
    columns["single_color_fraction"] = filters.single_color_fraction(pixels)
    columns["border_fraction"] = filters.border_fraction(pixels)
    columns["phash"] = str(imagehash.phash(view, hash_size=config.dedup.hash_size))
    columns["coarse"] = np.asarray(view.resize((dedup.COARSE_PX,) * 2, Image.Resampling.BOX)).tobytes()
    return columns, Sample(image, pixels, gray, tuple(captions))


def _blank() -> dict:
    """Every column of a record of which nothing is known yet."""
    return {
        **{"error_rule": "", "error": "", "format": "", "mode": "", "animated": False},
        **{"width": 0, "height": 0, "orientation": 1},
        **dict.fromkeys((*NUMBERS, *MODEL_COLUMNS), np.nan),
        **{"phash": "", "coarse": b""},
    }


def _run_scorers(scorers: list[Scorer], pending: list[tuple[dict, Sample]]) -> None:
    """Fills the model columns of the waiting records, and empties the queue."""
    if not pending:
        return
    samples = [sample for _, sample in pending]
    for scorer in scorers:
        values = scorer(samples)
        assert len(values) == len(samples), scorer.column
        for (columns, _), value in zip(pending, values, strict=True):
            columns[scorer.column] = float(value)
    pending.clear()


# --- deciding --------------------------------------------------------------------------------------------------


def decide(scores: pd.DataFrame, config: CurationConfig) -> pd.DataFrame:
    """Ledger rows by the filters' rules alone: a pure function of columns (filters.decide)."""
    return filters.decide(scores, config.filters)


def curate(
    records_dir: str | os.PathLike,
    score_dirs: list[str | os.PathLike],
    config: CurationConfig,
    out_dir: str | os.PathLike,
) -> dict:
    """Gathers the scores of all shards and writes the curated directory; see the module.

    Raises:
        ValueError: scores that do not cover the records exactly once, or nothing left to train on.
    """
    records_dir, out_dir = Path(records_dir), Path(out_dir)
    table = _read_records(records_dir)
    scores = _gather_scores(table, [Path(path) for path in score_dirs])
    print(f"curate: {len(scores)} records scored", flush=True)

    book = decide(scores, config)
    usable = [usable_captions(captions, config.captions) for captions in table["captions"]]
    bare = [i for i in np.flatnonzero(book["kept"]) if not usable[i]]
    told = [_why_no_caption(table["captions"].iloc[i], config.captions.max_words) for i in bare]
    book = ledger.reject(book, bare, "no_caption", told)
    print(f"curate: {int(book['kept'].sum())} pass the filters; looking for duplicates", flush=True)
    alive = np.flatnonzero(book["kept"])
    found = dedup.find_duplicates(
        scores.iloc[alive],
        config.dedup,
        lambda rows: _thumbnails(score_dirs, dict(zip(scores["key"].to_numpy()[alive[rows]], rows, strict=True))),
    )
    for rule, part in found.groupby("rule"):
        book = ledger.reject(book, alive[part["position"].to_numpy(int)], rule, part["detail"])
    ledger.check(book, table["key"])
    exact = found[found["rule"] == "exact_duplicate"]
    for copy, keeper in zip(alive[exact["position"].to_numpy(int)], alive[exact["keeper"].to_numpy(int)], strict=True):
        # Tables with a row for each caption repeat the image: the captions of the same bytes are all the keeper's.
        usable[keeper] = usable_captions([*usable[keeper], *usable[copy]], config.captions)

    kept = np.flatnonzero(book["kept"])
    if not len(kept):
        worst = sorted(ledger.counts(book).items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{rule} {count}" for rule, count in worst if count)
        raise ValueError(
            f"curation kept none of {len(book)} records ({reasons}); see filters and captions under curation in the recipe"
        )
    curated = scores.iloc[kept].drop(columns=["error_rule", "error", "coarse", "animated"]).reset_index(drop=True)
    curated["tier"] = tiers.assign_tiers(curated["aesthetic"], curated["synthetic"], config.tiers)
    curated["bucket"] = tiers.assign_buckets(curated["source"], curated["record_id"], config.tiers)
    curated["captions"] = [
        choose_captions(usable[i], tier, record_id, config.captions)
        for i, tier, record_id in zip(kept, curated["tier"], curated["record_id"], strict=True)
    ]
    curated["split"] = [ledger.split(record_id) for record_id in curated["record_id"]]

    _write_table(curated, out_dir / "records.parquet")
    _write_table(book, out_dir / "ledger.parquet")
    gallery = _write_shards(records_dir, table, book, curated, config, out_dir)
    summary = summarise(book, curated)
    assert summary["input"] == len(table) == summary["kept"] + sum(summary["rejected"].values())
    (out_dir / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out_dir / "report.html").write_text(report.render(summary, scores, book, curated, gallery, config))
    print(f"curate: kept {summary['kept']} of {summary['input']}", flush=True)
    return summary


def _why_no_caption(captions: Iterable[str] | None, max_words: int) -> str:
    """Of a record whose captions are all unusable."""
    words = [len(text.split()) for text in captions if text] if captions is not None else []
    if max(words, default=0) > max_words:
        return f"every caption is over max_words {max_words} (the shortest has {min(filter(None, words))})"
    return "no caption is left"


def summarise(book: pd.DataFrame, curated: pd.DataFrame) -> dict:
    """The counts of report.json; a function of the tables, without times, so that equal input gives equal bytes."""
    lengths = [len(text.split()) for captions in curated["captions"] for text in captions]
    return {
        "input": len(book),
        "kept": int(book["kept"].sum()),
        "rejected": ledger.counts(book),
        "retention": ledger.retention(book),
        "tiers": {tier: int((curated["tier"] == tier).sum()) for tier in tiers.TIERS},
        "buckets": {str(k): int(v) for k, v in curated["bucket"].value_counts().sort_index().items()},
        "sources": {str(k): int(v) for k, v in curated["source"].value_counts().sort_index().items()},
        "splits": {name: int((curated["split"] == name).sum()) for name in ("train", "val")},
        "shards": int(curated["shard"].nunique()),
        "captions": len(lengths),
        "caption_words": {"min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)},
    }


# --- files -----------------------------------------------------------------------------------------------------


def _read_records(records_dir: Path) -> pd.DataFrame:
    path = records_dir / "records.parquet"
    if not path.is_file():
        raise ValueError(f"{records_dir} is not a records directory: it has no records.parquet")
    table = pq.read_table(path).to_pandas()
    if table.empty:
        raise ValueError(f"{records_dir} holds no record")
    repeated = table["key"][table["key"].duplicated()]
    if len(repeated):
        raise ValueError(f"{path} has the key {repeated.iloc[0]!r} more than once")
    return table.reset_index(drop=True)


def _gather_scores(table: pd.DataFrame, score_dirs: list[Path]) -> pd.DataFrame:
    """The scores in the order of the records table."""
    parts = [pq.read_table(path / "scores.parquet").to_pandas() for path in score_dirs]
    scores = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"key": [], "record_id": []})
    repeated = scores["key"][scores["key"].duplicated()]
    if len(repeated):
        raise ValueError(f"the record {repeated.iloc[0]!r} was scored more than once; give each shard's scores once")
    lacking = set(table["key"]) - set(scores["key"])
    if lacking:
        shards = sorted(set(table.loc[table["key"].isin(lacking), "shard"]))
        raise ValueError(f"{len(lacking)} of {len(table)} records have no scores: score shards {_few(shards)} first")
    extra = set(scores["key"]) - set(table["key"])
    if extra:
        raise ValueError(f"the scores know {_few(sorted(extra))}, which the records do not: they are of other records")
    scores = scores.set_index("key", drop=False).loc[table["key"]].reset_index(drop=True)
    if list(scores["record_id"]) != list(table["record_id"]):
        raise ValueError("the scores are of other bytes under the same keys: score the shards again")
    return scores


def _thumbnails(score_dirs: list, rows: dict[str, int]) -> dict[int, np.ndarray]:
    """The thumbnails of these keys, under the row numbers that go with them."""
    found: dict[int, np.ndarray] = {}
    keys = pa.array(list(rows))
    for path in score_dirs:
        part = pq.read_table(Path(path) / "thumbnails.parquet", filters=pa.compute.field("key").isin(keys))
        for item in part.to_pylist():
            pixels = np.frombuffer(item["rgb"], np.uint8)
            found[rows[item["key"]]] = pixels.reshape(item["height"], item["width"], 3)
    assert len(found) == len(rows)
    return found


def _write_shards(
    records_dir: Path,
    table: pd.DataFrame,
    book: pd.DataFrame,
    curated: pd.DataFrame,
    config: CurationConfig,
    out_dir: Path,
) -> dict[str, list[dict]]:
    """Copies the kept records shard by shard; returns a few pictures of each rule's rejects for the report.

    A kept record keeps its shard number. Its .json sidecar has the chosen captions, tier, bucket and split;
    its image is the same bytes. Shards that lose every record are not written.
    """
    kept = {row.key: row for row in curated[["key", *DECIDED]].itertuples()}
    wanted = report.pick_examples(book)
    gallery: dict[str, list[dict]] = {rule: [] for rule in wanted}
    shown = {item["key"]: (rule, item) for rule, items in wanted.items() for item in items}
    written = 0
    with_records = table.groupby("shard", sort=True)["key"]
    for shard, keys in tqdm(with_records, total=with_records.ngroups, desc="write shards", mininterval=2):
        if not any(key in kept or key in shown for key in keys):
            continue
        with contextlib.ExitStack() as stack:
            writer = None
            for record in read_shard(records_dir / shard_name(shard)):
                if record.key in shown:
                    rule, item = shown[record.key]
                    gallery[rule].append({**item, "picture": report.picture(record.data, config.filters.max_pixels)})
                if record.key in kept:
                    row = kept[record.key]
                    writer = writer or stack.enter_context(ShardWriter(out_dir / shard_name(shard)))
                    says = {"captions": list(row.captions), "tier": row.tier, "bucket": row.bucket, "split": row.split}
                    writer.add(record._replace(sidecar=record.sidecar | says))
                    written += 1
    assert written == len(kept), f"wrote {written} of {len(kept)} records"
    return gallery


def _write_table(frame: pd.DataFrame, path: Path) -> None:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, compression="zstd")


def _few(items: list) -> str:
    text = ", ".join(str(item) for item in items[:5])
    return f"{text} and {len(items) - 5} more" if len(items) > 5 else text
