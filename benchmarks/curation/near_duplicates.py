"""The search for near duplicates by both 64-bit hashes (tasks/curation/decisions/near.py): time, CPU time and memory by
corpus size, and recall.

    python benchmarks/curation/near_duplicates.py                       1M and 10M hashes of both kinds
    python benchmarks/curation/near_duplicates.py --counts 1000000 2000000 5000000 10000000     the exponent by least squares
    python benchmarks/curation/near_duplicates.py --counts 100000 1000000 --shuffled
    python benchmarks/curation/near_duplicates.py --counts 1000000 --joins          next to the joins that Spark runs, in DuckDB

Hashes are uniform at random. Of the records, 5% are copies of another record with up to 4 bits of pHash and up to 16 of
dHash flipped, 5% with up to 4 of dHash and 16 of pHash, and 1% have the hashes of another record. Every planted pair
must be matched. All pairs of a sample are compared by brute force. With --shuffled the records are read in
another order, and the result must be equal. Sizes and ways take turns for `--rounds` rounds; printed are medians, with the
least and the most.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.config import DedupConfig
from tasks.curation.decisions import near
from tasks.curation.decisions.covers import plan_cover
from tasks.curation.decisions.engines import Engine, one, open_engine, rows_of
from tasks.curation.scoring.hashes import HASHES

CHUNK = 500_000
SAMPLE = 20_000
TARGETS = {1_000_000: (20, 1.0), 10_000_000: (180, 2.5)}  # records: (s, GiB)


def make_hashes(count: int, path: Path, seed: int = 0) -> None:
    """Writes `compared`, and the planted pairs next to it."""
    rng = np.random.default_rng(seed)
    hashes = {name: rng.integers(-(2**63), 2**63, count, dtype=np.int64) for name in HASHES}
    copies = count // 100
    chosen = rng.permutation(count)
    pairs = []
    for kind, share in (("phash", 5), ("dhash", 5), ("all", 1)):
        of, copy, chosen = (
            chosen[: share * copies],
            chosen[share * copies : 2 * share * copies],
            chosen[2 * share * copies :],
        )
        for name in HASHES:
            if kind in ("all", name) or name.startswith("phash256"):
                hashes[name][copy] = hashes[name][of]
        if kind != "all":
            other = "dhash" if kind == "phash" else "phash"
            hashes[other][copy] = hashes[other][of]
            for name, flips in ((kind, 4), (other, 16)):  # the same bit twice flips none
                for _ in range(flips):
                    hashes[name][copy] ^= np.int64(1) << rng.integers(0, 63, len(copy))
        pairs.append(np.stack([of, copy], axis=1))
    order = np.random.default_rng(seed + 1).permutation(count)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, count, CHUNK):
            n = min(CHUNK, count - start)
            columns = {name: values[start : start + n] for name, values in hashes.items()}
            columns |= {"position": np.arange(start, start + n), "shuffled": order[start : start + n]}
            columns |= {"pixels": rng.integers(1, 4, n) * 10**6, "points": rng.integers(0, 20, n)}
            columns |= {
                "tie": [f"{x:016x}" for x in rng.integers(0, 2**63, n)],
                "name": [""] * n,
                "by_hashes": [True] * n,
            }
            writer.write_table(pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA))
    np.save(path.with_suffix(".npy"), np.concatenate(pairs))


SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("position", "shuffled", "pixels", "points", *HASHES)]
    + [("tie", pa.string()), ("name", pa.string()), ("by_hashes", pa.bool_())]
)


def search(path: Path, way: str) -> dict:
    """Time, CPU time and peak memory of one search in this process; `way` is one of sorts, shuffled and joins."""
    pairs = pa.table(dict(zip("ab", np.load(path.with_suffix(".npy")).T)))
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        engine = open_engine("duckdb", work)
        engine.scan("source", {str(path): 0})
        start, cpu = time.perf_counter(), time.process_time()
        position = "shuffled" if way == "shuffled" else "position"
        engine.in_process = way != "joins"
        columns = ", ".join(name for name in SCHEMA.names if name not in ("position", "shuffled"))
        engine.create("compared", f"SELECT {position} AS position, position AS first, {columns} FROM source")
        proposing = _count_cpu_time(engine, "append" if way == "joins" else "load", "value_pairs")
        near.match_by_hashes(engine, DedupConfig())
        near.keep_stars(engine)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        engine.load("planted", pairs.schema, pairs.to_pylist())
        node = "SELECT c.first, coalesce(s.leader, c.position) AS node FROM compared c LEFT JOIN same s ON c.position = s.position"
        engine.create("node_of", node)
        missed = one(
            engine,
            "SELECT count(*) AS n FROM planted p JOIN node_of a ON p.a = a.first JOIN node_of b ON p.b = b.first "
            "LEFT JOIN (SELECT a, b FROM matched UNION ALL SELECT b AS a, a AS b FROM matched) m "
            "ON m.a = a.node AND m.b = b.node WHERE m.a IS NULL AND a.node <> b.node",
        )
        result = rows_of(
            engine,
            "SELECT count(*) AS dropped, coalesce(sum(hash(c.first, k.first) % 1000000007), 0) AS digest FROM near n "
            "JOIN compared c ON n.position = c.position JOIN compared k ON n.keeper = k.position",
        )
        row = next(result)
        engine.close()
    keys = 2 * len(plan_cover(pq.read_metadata(path).num_rows, DedupConfig().max_hamming_distance).keys)
    times = {"wall_s": wall, "cpu_s": cpu, "keys": keys, "proposing_cpu_s": sum(proposing)}
    return times | {"gib": peak, "planted": len(pairs), "missed": missed} | {k: int(v) for k, v in row.items()}


def _count_cpu_time(engine: Engine, method: str, table: str) -> list[float]:
    """A list, to which each later call of the engine's method for `table` adds its CPU seconds."""
    call, seconds = getattr(engine, method), []

    def timed(name: str, *arguments) -> None:
        start = time.process_time()
        call(name, *arguments)
        if name == table:
            seconds.append(time.process_time() - start)

    setattr(engine, method, timed)
    return seconds


def brute_force(folder: Path) -> tuple[int, int]:
    """(number of pairs of a sample within the radius, number of these that were proposed)."""
    path = folder / "sample.parquet"
    make_hashes(SAMPLE, path, seed=9)
    table = pq.read_table(path, columns=["phash", "dhash"])
    want = set()
    for kind in ("phash", "dhash"):
        words = table[kind].to_numpy()
        for i in range(len(words)):
            at = np.flatnonzero(np.bitwise_count(words[i + 1 :] ^ words[i]) <= DedupConfig().max_hamming_distance)
            want.update((i, i + 1 + j) for j in at.tolist())
    with tempfile.TemporaryDirectory(dir=folder) as work:
        engine = open_engine("duckdb", work)
        engine.scan("source", {str(path): 0})
        engine.create("compared", "SELECT * FROM source")
        near.match_by_hashes(engine, DedupConfig())
        result = {(row["a"], row["b"]) for row in rows_of(engine, "SELECT a, b FROM proposed")}
        result |= {tuple(sorted(row.values())) for row in rows_of(engine, "SELECT position, leader FROM same")}
        engine.close()
    return len(want), len(want & result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--shuffled", action="store_true", help="search again in another order, and compare")
    parser.add_argument("--joins", action="store_true", help="search again by joins, and compare")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the hashes and spilled tables")
    parser.add_argument("--search", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_hashes(int(options.make[0]), Path(options.make[1]))
        return
    if options.search:
        print(json.dumps(search(Path(options.search[0]), options.search[1])))
        return
    print("command: python", " ".join(sys.argv))
    ways = ["sorts"] + ["shuffled"] * options.shuffled + ["joins"] * options.joins
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        pairs, output = brute_force(Path(folder))
        print(f"brute force: {output} of {pairs} pairs of {SAMPLE} records within the radius are proposed")
        runs: dict[tuple[int, str], list[dict]] = {(count, way): [] for count in options.counts for way in ways}
        for count in options.counts:
            # In another process: on Linux the peak of this one would count as that of the searches that it starts.
            command = [sys.executable, __file__, "--make", str(count), str(Path(folder) / f"{count}.parquet")]
            subprocess.run(command, check=True)
        for _ in range(options.rounds):
            for (count, way), results in runs.items():
                command = [sys.executable, __file__, "--search", str(Path(folder) / f"{count}.parquet"), way]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                results.append(json.loads(done.stdout.splitlines()[-1]))
    for (count, way), results in runs.items():
        one = results[0]
        target = "at most {} s, {} GiB".format(*TARGETS[count]) if count in TARGETS else "no target"
        print(
            f"{count} records, both hashes, {way}: {_spread(results, 'wall_s')} s, of CPU {_spread(results, 'cpu_s')} s, "
            f"{_spread(results, 'proposing_cpu_s')} of them for {one['keys']} keys; peak {_spread(results, 'gib', 2)} GiB "
            f"({target}); {one['dropped']} dropped, {one['missed']} of {one['planted']} planted pairs missed"
        )
        first = runs[count, "sorts"][0]
        if any((r["digest"], r["dropped"]) != (first["digest"], first["dropped"]) for r in results):
            print("  NOT EQUAL to the first result")
    if len(options.counts) > 1:
        for way in ways:
            for clock in ("wall_s", "cpu_s"):
                times = [float(np.median([r[clock] for r in runs[count, way]])) for count in options.counts]
                exponent = np.polyfit(np.log(options.counts), np.log(times), 1)[0]
                print(f"growth exponent of {way} by the medians of {clock}: {exponent:.2f} (at most 1.2)")


def _spread(results: list[dict], name: str, digits: int = 1) -> str:
    values = [result[name] for result in results]
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
