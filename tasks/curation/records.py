"""Sources to records: rendered scenes and digits, or a user's own images, as shards that are made independently.

    plan_shards(config) -> [spec] --make_shard, each by itself--> shard directories --gather--> records directory
    make_records(config, out_dir) does all of it in one process, and gives the same bytes

A records directory holds shards/00000.tar ... (tasks/curation/shards.py), records.parquet with one row per record,
report.json, and, where scenes were drawn, truth.parquet: which defect was planted in which record, for tests only.

Every made record depends on (seed, its number) alone, not on its shard: a duplicate finds its original in any shard,
and another number of shards gives the same corpus.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.config import SourceConfig
from tasks.curation.shards import RECORDS_SCHEMA, Record, ShardWriter, read_records, read_shard, shard_name
from tasks.curation.sources import user_source
from tasks.curation.sources.made import defects, digits, scenes

__all__ = [
    "Record",
    "ShardSpec",
    "ShardWriter",
    "gather",
    "make_records",
    "make_shard",
    "plan_shards",
    "read_records",
    "read_shard",
]

JPEG_SHARE = 0.1  # of scenes; the others are PNG
PROGRESS_S = 5.0
TRUTH_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("defect", pa.string()),  # "" or one of defects.KINDS
        ("detail", pa.string()),
        ("original", pa.string()),  # the key that a duplicate repeats
        ("scene", pa.string()),  # JSON of scenes.Scene, "" where none is shown
    ]
)
_SCENES, _DEFECTS = 0, 1  # streams of randomness; digits.chosen uses 2


@dataclass(frozen=True)
class ShardSpec:
    """What one shard holds: half-open ranges of the corpus's scenes, defects, digits and units of a user's source."""

    shard: int
    scenes: tuple[int, int] = (0, 0)
    defects: tuple[int, int] = (0, 0)
    digits: tuple[int, int] = (0, 0)
    items: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in (self.scenes, self.defects, self.digits, self.items))


def plan_shards(config: SourceConfig) -> list[ShardSpec]:
    """How the corpus divides over `config.shards` shards, evenly and always alike. A small corpus leaves some empty.

    Raises:
        ValueError: there would be no record, too many digits are asked for, or `path` holds no image.
    """
    return _plan(config, user_source.scan(config.path) if config.path else None)


def _plan(config: SourceConfig, user: user_source.UserSource | None) -> list[ShardSpec]:
    if user is not None:
        return [ShardSpec(i, items=_part(user.count, i, config.shards)) for i in range(config.shards)]
    digits.chosen(config.digits, config.seed)
    if not config.scenes and not config.digits:
        raise ValueError("the source is empty: set source.scenes or source.digits above 0, or source.path")
    return [
        ShardSpec(
            i,
            scenes=_part(config.scenes, i, config.shards),
            defects=_part(num_defects(config), i, config.shards),
            digits=_part(config.digits, i, config.shards),
        )
        for i in range(config.shards)
    ]


def _part(total: int, shard: int, shards: int) -> tuple[int, int]:
    return shard * total // shards, (shard + 1) * total // shards


def num_defects(config: SourceConfig) -> int:
    """Planted defects, beside the scenes: a fraction of them, but at least one of each kind."""
    if not config.scenes or not config.defect_fraction:
        return 0
    return max(round(config.defect_fraction * config.scenes), len(defects.KINDS))


def make_records(config: SourceConfig, out_dir: str | os.PathLike) -> dict[str, Any]:
    """Makes the whole corpus in an empty directory; returns the report that it also writes there.

    The report counts records, bytes, shards, sources, defects, records without a caption, and what was skipped.

    Raises:
        ValueError: see `plan_shards`.
    """
    user = user_source.scan(config.path) if config.path else None
    out_dir = Path(out_dir)
    parts = [_write_shard(config, spec, user, out_dir) for spec in _plan(config, user)]
    return _finish(out_dir, parts)


def make_shard(config: SourceConfig, shard_index: int, out_dir: str | os.PathLike) -> dict[str, Any]:
    """Makes one shard in an empty directory, laid out as a records directory of one shard; returns its report.

    Raises:
        ValueError: no such shard, or see `plan_shards`.
    """
    if not 0 <= shard_index < config.shards:
        raise ValueError(f"shard {shard_index} does not exist: source.shards={config.shards}")
    user = user_source.scan(config.path) if config.path else None
    spec = _plan(config, user)[shard_index]
    return _finish(Path(out_dir), [_write_shard(config, spec, user, Path(out_dir))])


def gather(shard_dirs: Sequence[str | os.PathLike], out_dir: str | os.PathLike) -> dict[str, Any]:
    """Merges what `make_shard` made into one records directory; returns its report.

    Raises:
        ValueError: nothing to merge, one shard given twice, or a directory that is none of ours.
    """
    if not shard_dirs:
        raise ValueError("there are no shards to gather")
    out_dir = Path(out_dir)
    (out_dir / "shards").mkdir(parents=True, exist_ok=True)
    parts = []
    for directory in map(Path, shard_dirs):
        tars = sorted((directory / "shards").glob("*.tar"))
        if not tars or not (directory / "report.json").is_file():
            raise ValueError(f"{directory} is not a records directory: it needs shards/*.tar and report.json")
        for tar in tars:
            target = out_dir / "shards" / tar.name
            if target.exists():
                raise ValueError(f"{directory} holds {tar.name}, which another shard directory holds too")
            shutil.copyfile(tar, target)
        truth = directory / "truth.parquet"
        parts.append(
            _Part(
                rows=pq.read_table(directory / "records.parquet", schema=RECORDS_SCHEMA),
                truth=pq.read_table(truth, schema=TRUTH_SCHEMA) if truth.is_file() else TRUTH_SCHEMA.empty_table(),
                skipped=Counter(json.loads((directory / "report.json").read_text())["skipped"]),
                first=int(tars[0].stem),
            )
        )
    return _finish(out_dir, sorted(parts, key=lambda part: part.first))


@dataclass(frozen=True)
class _Part:
    rows: pa.Table
    truth: pa.Table
    skipped: Counter
    first: int  # number of its first shard


def _write_shard(config: SourceConfig, spec: ShardSpec, user: user_source.UserSource | None, out_dir: Path) -> _Part:
    rows: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    # What the scan skipped belongs to the source as a whole: the first shard tells it, so that sums are right.
    skipped = Counter(user.skipped if user is not None and spec.shard == 0 else {})
    made = _user_records(user, spec, skipped) if user is not None else _made_records(config, spec, truth)
    total = f"/{spec.count}" if user is None or user.counts_images else ""
    told = time.monotonic()
    with ShardWriter(out_dir / shard_name(spec.shard)) as writer:
        for record in made:
            writer.add(record)
            rows.append(record.row(spec.shard))
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                print(f"records: shard {spec.shard}: {len(rows)}{total}", flush=True)
    print(f"records: shard {spec.shard}: {len(rows)}{total} done", flush=True)
    return _Part(
        pa.Table.from_pylist(rows, RECORDS_SCHEMA), pa.Table.from_pylist(truth, TRUTH_SCHEMA), skipped, spec.shard
    )


def _finish(out_dir: Path, parts: list[_Part]) -> dict[str, Any]:
    table = pa.concat_tables([part.rows for part in parts])
    truth = pa.concat_tables([part.truth for part in parts])
    assert len(set(table["key"].to_pylist())) == len(table), "keys repeat"
    pq.write_table(table, out_dir / "records.parquet")
    if len(truth):
        pq.write_table(truth, out_dir / "truth.parquet")
    report = {
        "records": len(table),
        "num_bytes": sum(table["num_bytes"].to_pylist()),
        "shards": len(list((out_dir / "shards").glob("*.tar"))),
        "sources": dict(sorted(Counter(table["source"].to_pylist()).items())),
        "without_caption": sum(not texts for texts in table["captions"].to_pylist()),
        "defects": {kind: n for kind, n in sorted(Counter(truth["defect"].to_pylist()).items()) if kind},
        "skipped": dict(sorted(sum((part.skipped for part in parts), Counter()).items())),
    }
    (out_dir / "report.json").write_text(json.dumps(report, indent=1))
    return report


# ---------------------------------------------------------------- made records


def _made_records(config: SourceConfig, spec: ShardSpec, truth: list[dict[str, Any]]) -> Iterator[Record]:
    for index in range(*spec.scenes):
        drawn = _draw(config, index)
        truth.append(_truth(drawn.key, drawn.scene))
        yield _record(drawn.key, drawn.ext, drawn.data, drawn.captions, "scenes")
    for index in range(*spec.defects):
        key = _scene_key(config.scenes + index)
        kind = defects.KINDS[index % len(defects.KINDS)]
        rng = np.random.default_rng([config.seed, _DEFECTS, index])
        of = int(rng.integers(config.scenes))
        planted = defects.plant(kind, rng, config.scene_size_px, lambda of=of: _draw(config, of))
        truth.append(_truth(key, planted.scene, kind, planted.detail, planted.original))
        yield _record(key, planted.ext, planted.data, planted.captions, "scenes")
    for index in digits.chosen(config.digits, config.seed)[slice(*spec.digits)]:
        scan = digits.digit(index, config.scene_size_px)
        yield _record(f"digits-{index:04d}", "png", defects.encode(scan.image, "png"), scan.captions, "digits")


def _draw(config: SourceConfig, index: int) -> defects.Drawn:
    """Scene `index` of the corpus, as a function of (seed, index)."""
    rng = np.random.default_rng([config.seed, _SCENES, index])
    scene = scenes.sample_scene(rng, config.scene_size_px)
    texts = scenes.captions(scene, rng)
    ext = "jpg" if rng.random() < JPEG_SHARE else "png"
    return defects.Drawn(_scene_key(index), ext, defects.encode(scenes.render(scene), ext), texts, scene)


def _scene_key(index: int) -> str:
    return f"scenes-{index:07d}"


def _record(key: str, ext: str, data: bytes, texts: list[str], source: str, meta: dict | None = None) -> Record:
    return Record(key, data, {"captions": texts, "source": source, "meta": meta or {}}, ext)


def _truth(
    key: str, scene: scenes.Scene | None, defect: str = "", detail: str = "", original: str = ""
) -> dict[str, str]:
    text = json.dumps(scene.to_dict()) if scene is not None else ""
    return {"key": key, "defect": defect, "detail": detail, "original": original, "scene": text}


# ---------------------------------------------------------------- a user's records


def _user_records(user: user_source.UserSource, spec: ShardSpec, skipped: Counter) -> Iterator[Record]:
    for item in user.read(*spec.items, skipped):
        yield _record(item.key, item.ext, item.data, item.captions, "user", {"path": item.locator})
