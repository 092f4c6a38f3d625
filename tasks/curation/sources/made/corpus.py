"""The made corpus: rendered scenes, planted defects, and the sources of registry.py, in tars that are made
independently.

    write_made_shard(config, i, part_i), each by itself --made_corpus--> shards.parquet over the parts

Every record depends on (seed, its number) alone, not on its shard: a duplicate finds its original in any shard, and
another number of shards gives the same records. The same records give the same bytes on every machine.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import file_sha256
from model import storage
from model.logs import get_logger
from model.storage import is_remote, join
from tasks.curation.config import SourceConfig
from tasks.curation.sources import tar_format
from tasks.curation.sources.base import TRUTH_TABLE, Account, Options, Record, Shard, shard_id, visible
from tasks.curation.sources.file_trees import FileTree
from tasks.curation.sources.made import defects, registry, scenes
from tasks.curation.sources.made.registry import Made

logger = get_logger(__name__)

JPEG_SHARE = 0.1  # share of scenes; the others are PNG
PROGRESS_S = 5.0
TRUTH = pa.schema(
    [
        ("key", pa.string()),
        ("defect", pa.string()),  # "" or one of defects.KINDS
        ("detail", pa.string()),
        ("original", pa.string()),  # the key that a duplicate repeats
        ("scene", pa.string()),  # JSON of scenes.Scene, "" for other records
    ]
)
_SCENES, _DEFECTS = 0, 1  # random streams; digits.py uses 2


def check(config: SourceConfig) -> None:
    """
    Raises:
        ValueError: a corpus without records, an unknown source, or more records than a source has.
    """
    registry.check_made(config)
    if not config.is_made:
        raise ValueError("the source is empty: set source.scenes, source.digits or source.made, or source.path")


def num_defects(config: SourceConfig) -> int:
    """Number of planted defects in addition to the scenes: a fraction of their number, but at least one of each
    kind."""
    if not config.scenes or not config.defect_fraction:
        return 0
    return max(round(config.defect_fraction * config.scenes), len(defects.KINDS))


def write_made_shard(config: SourceConfig, index: int, out_dir: str | os.PathLike) -> dict[str, Any]:
    """See base.write_made_shard."""
    from tasks.curation.sources.scan import TableWriter

    check(config)
    if not 0 <= index < config.shards:
        raise ValueError(f"shard {index} does not exist: source.shards={config.shards}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    name = f"{index:05d}.tar"
    truth: list[dict[str, str]] = []
    sources: Counter = Counter()
    without = reported = 0
    total = sum(stop - start for start, stop in _ranges(config, index))
    begun = time.monotonic()
    with tarfile.open(out_dir / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for made in _records(config, index, truth):
            _add(tar, made)
            sources[made.source] += 1
            without += not made.captions
            if time.monotonic() - begun > PROGRESS_S * (reported + 1):
                reported += 1
                logger.info(f"source: shard {index}: {sources.total()}/{total}")
    logger.info(f"source: shard {index}: {total} records")
    assert sources.total() == total
    if truth:
        pq.write_table(pa.Table.from_pylist(truth, TRUTH), out_dir / TRUTH_TABLE)
    digest = file_sha256(out_dir / name)
    with TableWriter(out_dir) as table:
        size, source = (
            (out_dir / name).stat().st_size,
            "scenes" if config.scenes else next(iter(registry.counts(config))),
        )
        table.add(Shard(shard_id("tar", name, 0, digest, Options()), "tar", name, 0, total, size, digest, source))
    planted = Counter(row["defect"] for row in truth if row["defect"])
    return table.report(
        Account(),
        Options(),
        "",
        sources=dict(sorted(sources.items())),
        defects=dict(sorted(planted.items())),
        without_caption=without,
    )


def made_corpus(
    parts: Sequence[str | os.PathLike], out_dir: str | os.PathLike, uris: Sequence[str] | None = None
) -> dict[str, Any]:
    """See base.made_corpus."""
    from tasks.curation.sources.corpus import Corpus
    from tasks.curation.sources.scan import TableWriter

    assert uris is None or len(uris) == len(parts)
    totals: dict[str, Counter] = {"sources": Counter(), "defects": Counter()}
    without = 0
    rows = []
    for part, uri in zip(parts, uris or [os.path.abspath(part) for part in parts], strict=True):
        corpus = Corpus(part)
        rows += [shard._replace(uri=join(uri, shard.uri)) for shard in corpus.shards()]
        without += corpus.report["without_caption"]
        for name, total in totals.items():
            total.update(corpus.report[name])
    rows.sort(key=lambda shard: shard.uri.rpartition("/")[2])
    names = [shard.uri.rpartition("/")[2] for shard in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"a made shard is given twice: {', '.join(names)}")
    with TableWriter(Path(out_dir)) as table:
        for shard in rows:
            table.add(shard)
    sums = {name: dict(sorted(total.items())) for name, total in totals.items()}
    return table.report(Account(), Options(), "", **sums, without_caption=without)


def read(place: FileTree, name: str, shard: Shard, account: Account) -> Iterator[Record]:
    """The records of a tar that `write_made_shard` wrote.

    Raises:
        ValueError: it is not such a tar, or is cut off.
    """
    shown = place.shown(name)
    try:
        if not is_remote(shard.uri) and place.digest(name) != shard.digest:
            raise ValueError(f"{shown} is not what it was when it was made")
        with place.local_copy(name) as file:
            stream = tar_format.Forward(file)
            image: tuple[str, str, bytes] | None = None
            for member in tar_format.members(stream):
                key, _, ext = member.name.partition(".")
                data = stream.read(member.size)
                account.use()
                if ext != "json":
                    if image is not None:
                        raise ValueError(f"{shown}: record {image[0]!r} has no {image[0]}.json")
                    image = key, ext, data
                    continue
                if image is None or image[0] != key:
                    raise ValueError(f"{shown}: {visible(member.name)!r} does not follow its image")
                sidecar = json.loads(data)
                account.records += 1
                at = f"{name}:{key}.{image[1]}"
                yield Record(key, image[2], image[1], sidecar["captions"], sidecar["source"], at, 0)
                image = None
            if image is not None:
                raise ValueError(f"{shown}: record {image[0]!r} has no {image[0]}.json")
    except (tar_format.TarError, OSError) as error:
        raise ValueError(f"{shown} is not a readable record shard: {visible(str(error))}") from error


def read_scenes(uri: str) -> dict[str, dict]:
    """Key -> scene, for records of the tar at `uri` that show one, from the table next to it."""
    filesystem, path = storage.filesystem(join(uri.rpartition("/")[0], TRUTH_TABLE))
    if not filesystem.exists(path):
        return {}
    with filesystem.open(path, "rb") as file:
        table = pq.read_table(file, columns=["key", "scene"])
    rows = zip(table["key"].to_pylist(), table["scene"].to_pylist(), strict=True)
    return {key: json.loads(scene) for key, scene in rows if scene}


def _add(tar: tarfile.TarFile, made: Made) -> None:
    assert "." not in made.key and "/" not in made.key, made.key
    sidecar = {"captions": made.captions, "source": made.source, "meta": {}}
    for name, data in (
        (f"{made.key}.{made.ext}", made.data),
        (f"{made.key}.json", json.dumps(sidecar, sort_keys=True).encode()),
    ):
        info = tarfile.TarInfo(name)  # mtime 0, mode 0644, uid 0: bytes depend on records only
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


# ---------------------------------------------------------------- the records


def _ranges(config: SourceConfig, index: int) -> list[tuple[int, int]]:
    """The shard's half-open ranges of scenes, defects, and records of each other source."""
    totals = (config.scenes, num_defects(config), *registry.counts(config).values())
    return [(index * total // config.shards, (index + 1) * total // config.shards) for total in totals]


def _records(config: SourceConfig, shard: int, truth: list[dict[str, str]]) -> Iterator[Made]:
    drawn_range, defect_range, *ranges = _ranges(config, shard)
    for index in range(*drawn_range):
        drawn = _draw(config, index)
        truth.append(_truth(drawn.key, drawn.scene))
        yield Made(drawn.key, drawn.ext, drawn.data, drawn.captions, "scenes")
    for index in range(*defect_range):
        key = _scene_key(config.scenes + index)
        kind = defects.KINDS[index % len(defects.KINDS)]
        rng = np.random.default_rng([config.seed, _DEFECTS, index])
        of = int(rng.integers(config.scenes))
        planted = defects.plant(kind, rng, config.scene_size_px, lambda of=of: _draw(config, of))
        truth.append(_truth(key, planted.scene, kind, planted.detail, planted.original))
        yield Made(key, planted.ext, planted.data, planted.captions, "scenes")
    for name, indices in zip(registry.counts(config), ranges, strict=True):
        source = registry.load(name)
        for index in range(*indices):
            yield source.record(config, index)


def _draw(config: SourceConfig, index: int) -> defects.Drawn:
    """Scene `index` of the corpus, a function of (seed, index)."""
    rng = np.random.default_rng([config.seed, _SCENES, index])
    scene = scenes.sample_scene(rng, config.scene_size_px)
    texts = scenes.captions(scene, rng)
    ext = "jpg" if rng.random() < JPEG_SHARE else "png"
    return defects.Drawn(_scene_key(index), ext, defects.encode(scenes.render(scene), ext), texts, scene)


def _scene_key(index: int) -> str:
    return f"scenes-{index:07d}"


def _truth(
    key: str, scene: scenes.Scene | None, defect: str = "", detail: str = "", original: str = ""
) -> dict[str, str]:
    text = json.dumps(scene.to_dict()) if scene is not None else ""
    return {"key": key, "defect": defect, "detail": detail, "original": original, "scene": text}
