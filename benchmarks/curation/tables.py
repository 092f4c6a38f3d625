"""Time, memory and disk of curation's decisions on tables (tasks/curation/decisions/decide.py): rules, tiers, duplicates,
ledger, report.

    python benchmarks/curation/tables.py                     100k and 10M records
    python benchmarks/curation/tables.py --counts 100000 --engine spark
    python benchmarks/curation/tables.py --counts 1000000 --memory 128MB     what is spilled counts as disk

Scores are made up: 10,000 rows a shard, two captions each, uniform hashes, 1% exact and 1% near duplicates, a tenth of the
records under a limit. Making them is not timed. No image and no thumbnail is read. Times are attributed to the tables
that steps make.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.config import CurationConfig
from tasks.curation.decisions import decide, engines
from tasks.curation.decisions.engines import open_engine
from tasks.curation.reports import report
from tasks.curation.reports.summary import summarize
from tasks.curation.scoring import score
from tasks.curation.scoring.hashes import HASHES
from tasks.curation.sources.base import Account
from tasks.store import Part

SHARD = 10_000
TARGETS = {100_000: (5, None), 10_000_000: (300, 2.5)}  # records: (s, GiB)
CONSTANT = {
    **{"ext": "jpg", "source": "user", "synthetic": False, "problem": "", "problem_detail": "", "error_rule": ""},
    **{"error": "", "format": "JPEG", "mode": "RGB", "animated": False, "orientation": 1, "coarse": bytes(48)},
}


def make_shard(index: int, rows: int, path: Path) -> None:
    rng = np.random.default_rng(index)
    digests = rng.bytes(32 * rows).hex()
    ids = [digests[64 * i : 64 * i + 64] for i in range(rows)]
    copies = rows // 100
    hashes = {name: rng.integers(-(2**63), 2**63, rows, dtype=np.int64) for name in HASHES}
    ids[:copies] = ids[copies : 2 * copies]
    for name in HASHES:
        hashes[name][: 2 * copies] = np.roll(hashes[name][: 2 * copies], copies)
        hashes[name][:copies] = hashes[name][copies : 2 * copies]
        hashes[name][2 * copies : 3 * copies] = hashes[name][3 * copies : 4 * copies] ^ 3
    words = rng.integers(3, 60, (rows, 2)).astype(np.int32)
    text = "a photograph of a street with two trees and a red bicycle in front of a house "
    columns = {name: pa.array([value] * rows).dictionary_encode() for name, value in CONSTANT.items()}
    columns |= {
        "key": [f"{index:06d}-{i:05d}" for i in range(rows)],
        "record_id": ids,
        "row": np.arange(rows),
        "num_bytes": rng.integers(50_000, 900_000, rows),
        "locator": [f"photos/{index:06d}.tar:{index:06d}-{i:05d}.jpg" for i in range(rows)],
        "captions": [[text[: 3 * a], text[: 3 * b]] for a, b in words.tolist()],
        "words": words.tolist(),
        "width": rng.integers(240, 2000, rows),
        "height": rng.integers(300, 800, rows),
        "entropy_bits": rng.uniform(4, 8, rows),
        "aesthetic": rng.uniform(3, 8, rows),
        "bytes_per_pixel": rng.uniform(0.1, 1, rows),
        "hash_margin": rng.uniform(10, 300, rows),
        **hashes,
    }
    for name in score.SCORES.names:
        columns.setdefault(name, rng.uniform(0, 0.45, rows))
    arrays = [
        pa.array(columns[n]) if not isinstance(columns[n], pa.DictionaryArray) else columns[n].dictionary_decode()
        for n in score.SCORES.names
    ]
    table = pa.table(dict(zip(score.SCORES.names, arrays))).cast(score.SCORES)
    pq.write_table(table, path, compression="zstd", row_group_size=score.ROW_GROUP)


class Timed:
    """An engine that records the time of each of its tables."""

    def __init__(self, engine) -> None:
        self.engine, self.seconds = engine, Counter()

    def __getattr__(self, name: str):
        method = getattr(self.engine, name)

        def call(table: str, *arguments):
            start = time.perf_counter()
            try:
                return method(table, *arguments)
            finally:
                self.seconds[f"{name} {table}"] += time.perf_counter() - start

        return call if name in ("create", "append", "load", "scan") else method


class Disk:
    """The largest size of folders' files, looked at every 0.1 s inside the block; GiB, allocated."""

    def __init__(self, *folders: str) -> None:
        self.folders, self.peak, self._end = folders, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.peak = max(self.peak, sum(map(_allocated, self.folders)) / 2**30)

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def _allocated(folder: str) -> int:
    size = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += 512 * path.stat().st_blocks
    return size


def decide_all(folder: Path, engine_name: str) -> dict:
    files = sorted(folder.glob("*.parquet"))
    parts = [Part(path.stem, "scores", "0" * 64, str(path)) for path in files]
    config = CurationConfig()
    start, cpu = time.perf_counter(), time.process_time()
    with (
        tempfile.TemporaryDirectory(dir=folder) as work,
        tempfile.TemporaryDirectory(dir=folder) as out,
        Disk(work, out) as disk,
    ):
        engine = Timed(open_engine(engine_name, work))
        rows = [{"part": i, "shard": part.name, "file": part.name, "error": ""} for i, part in enumerate(parts)]
        engine.load("parts", decide.PARTS, rows)
        engine.scan("scores", {str(path): i for i, path in enumerate(files)})
        laps = {}
        cuts = decide.decide_records(engine, config, lambda positions: {})
        laps["records and duplicates"] = time.perf_counter() - start
        decide.write_tables(engine, parts, Path(out), min(len(parts), 2000))
        laps["ledger and groups"] = time.perf_counter() - start
        summary = summarize(engine, config, Account(), cuts, len(parts), lambda positions: {})
        (Path(out) / "report.html").write_text(report.render(summary))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        engine.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    near = sum(
        s
        for name, s in engine.seconds.items()
        if name.split()[1]
        in ("same", "nodes", "hash_values", "value_pairs", "repeated", "members", "proposed", "matched")
    )
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "gib": peak,
        "disk_gib": disk.peak,
        "near_s": near,
        "kept": summary.kept,
        "laps": laps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=("duckdb", "spark"), default="duckdb")
    parser.add_argument("--memory", default="1GB", help="of DuckDB's buffers; the default is that of the targets")
    parser.add_argument("--folder", type=Path, help="for scores, tables and what is spilled")
    parser.add_argument("--decide", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    engines.MEMORY = options.memory
    if options.decide:
        print(json.dumps(decide_all(options.decide, options.engine)))
        return
    print("command: python", " ".join(sys.argv))
    for count in options.counts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for index in range(-(-count // SHARD)):
                make_shard(index, min(SHARD, count - index * SHARD), Path(folder) / f"{index:06d}.parquet")
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            command = [sys.executable, __file__, "--decide", folder, "--engine", options.engine]
            command += ["--memory", options.memory]
            results = []
            for _ in range(options.rounds):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                results.append(json.loads(done.stdout.splitlines()[-1]))
        seconds, gib = TARGETS.get(count, (None, None))
        target = f"at most {seconds} s" + (f", {gib} GiB" if gib else "") if seconds else "no target"
        middle = sorted(results, key=lambda result: result["wall_s"])[len(results) // 2]
        laps = ", ".join(f"{name} by {at:.1f} s" for name, at in middle["laps"].items())
        print(
            f"{count} records ({size / count:.0f} bytes each), {options.engine}: {_spread(results, 'wall_s')} s, of CPU "
            f"{_spread(results, 'cpu_s')} s; near duplicates {_spread(results, 'near_s')} s; peak {_spread(results, 'gib', 2)} GiB, "
            f"disk {_spread(results, 'disk_gib', 2)} GiB "
            f"({target}); {middle['kept']} kept; {laps}",
            flush=True,
        )


def _spread(results: list[dict], name: str, digits: int = 1) -> str:
    values = sorted(result[name] for result in results)
    return f"{values[len(values) // 2]:.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


if __name__ == "__main__":
    main()
