"""A task's memory depends on its group, not on the corpus: 40 shards take as much as 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import write_tar

from tasks.curation.scoring import score
from tasks.curation.scoring.hashes import HASHES
from tasks.store import LOCATIONS, Part, make_sealed, write_index

pytestmark = pytest.mark.slow

ROWS = 800  # of a shard
ALLOWED_KIB = 24 * 1024  # 40 shards have 30,000 rows more than 2: some 45 MB of pandas objects
STEPS = """
import json, resource, sys
from pathlib import Path
from tasks.curation import flow
from tasks.curation.config import *
from tasks.curation.sources.base import Account
from tasks.manifest import seal
from tasks.store import Part, make_part, read_index, fetch_part
step, shards, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
config = CurationConfig(dedup=DedupConfig(max_hamming_distance=2))
if step == "list":
    (place / "corpus").mkdir()
    flow.write_corpus(SourceConfig(), str(place / "source"), [], place / "corpus")
elif step == "score":
    (part,) = flow.score_group(place / "corpus", config, 1, shards)
    assert not part.error, part
elif step == "select":
    from tasks.manifest import load_manifest
    decision = Part("decisions", "decisions", load_manifest(place / "decision").digest, str(place / "decision"))
    (part,) = flow.select_group(decision, config, 1, shards)
    assert part.rows > 700 and not part.error, part
else:
    from tasks.curation.decisions import decide, engines
    # Fixed bounds, at the size of the test.
    engines.MEMORY, engines.BATCH_ROWS, decide.ROW_GROUP = "48MB", 1000, 1000
    parts = list(read_index(place / "index"))
    assert len(parts) == shards
    (place / "decision").mkdir()
    kept = decide.decide(parts, Account(), config, place / "decision", groups=shards)["kept"]
    assert kept > 0.9 * sum(part.rows for part in parts)
    seal(place / "decision", "decisions", logs=decide.LOGS)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(step: str, shards: int, place: Path) -> int:
    environment = os.environ | {"NUCLEUS_HOME": str(place / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STEPS, step, str(shards), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def write_scores(place: Path, shards: int) -> None:
    """Writes score parts of `ROWS` records without duplicates, without images."""
    rng = np.random.default_rng(0)
    parts = []
    for shard in range(shards):

        def make(out: Path, shard: int = shard) -> int:
            hashes = rng.integers(0, 2**63, (ROWS, len(HASHES)))
            coarse = rng.integers(0, 256, (ROWS, 48), dtype=np.uint8)
            rows = [
                score._blank()
                | {
                    "key": f"k{shard}-{i}",
                    "record_id": f"{shard:032x}{i:032x}",
                    "row": i,
                    "ext": "png",
                    "num_bytes": 1000,
                }
                | {
                    "source": "user",
                    "synthetic": False,
                    "locator": f"{shard}.tar:{i}.png",
                    "captions": [f"caption {i}"],
                }
                | {"words": [2], "problem": "", "problem_detail": "", "format": "PNG", "mode": "RGB", "width": 512}
                | {"height": 512, "bytes_per_pixel": 1.0, "entropy_bits": 5.0, "single_color_fraction": 0.1}
                | {"hash_margin": 100.0, "coarse": coarse[i].tobytes(), "border_fraction": 0.0}
                | dict(zip(HASHES, hashes[i].tolist()))
                for i in range(ROWS)
            ]
            pq.write_table(pa.Table.from_pylist(rows, score.SCORES), out / score.SCORES_TABLE)
            pq.write_table(score.THUMBNAILS.empty_table(), out / score.THUMBNAILS_TABLE)
            (out / score.ACCOUNT).write_text('{"seen": 0, "used": 0, "records": 0, "skipped": {}}')
            return ROWS

        path, manifest, _ = make_sealed("scores", make)
        parts.append(Part(f"{shard:016x}", "scores", manifest.digest, str(path), ROWS))
    (place / "index").mkdir()
    write_index(place / "index", parts)
    assert (place / "index" / LOCATIONS).is_file()


@pytest.mark.parametrize("step", ["list", "score"])
def test_listing_and_scoring_take_the_same_memory_with_forty_shards_as_with_two(step, tmp_path):
    peaks = []
    for shards in (2, 40):
        place = tmp_path / str(shards)
        for i in range(shards):
            write_tar(place / "source" / f"{i:02d}.tar", range(12 * i, 12 * i + 12))
        peak = peak_kib("list", shards, place)
        peaks.append(peak_kib("score", shards, place) if step == "score" else peak)
    assert peaks[1] - peaks[0] < ALLOWED_KIB, peaks


def test_deciding_and_selecting_take_the_same_memory_with_forty_shards_as_with_two(tmp_path, monkeypatch):
    peaks = {"decide": [], "select": []}
    for shards in (2, 40):
        place = tmp_path / str(shards)
        place.mkdir()
        monkeypatch.setenv("NUCLEUS_HOME", str(place / "home"))
        write_scores(place, shards)
        for step in peaks:
            peaks[step].append(peak_kib(step, shards, place))
    assert all(many - few < ALLOWED_KIB for few, many in peaks.values()), peaks
