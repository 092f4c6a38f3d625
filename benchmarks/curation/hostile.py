"""Measures how the readers of a user's source handle hostile archives, tables, names and sites.

    python benchmarks/curation/hostile.py [KIND ...]

Each kind is written to a temporary folder (sparse files take no room) and read in a separate process: the scan, then
every record. URLs are downloaded from a server on the loopback; images are decoded in a worker process. Prints the peak
of memory over the process's memory after its imports, processor time (the machine may be busy; of images, time by the
clock) and the outcome. A kind passes if it stays within 512 MiB and 60 s and ends as declared: read, or refused in one
ValueError.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "curation")]

import hostile_images  # noqa: E402
import hostile_urls  # noqa: E402
from hostile_inputs import KINDS  # noqa: E402

MAX_MEMORY_MIB, MAX_SECONDS = 512, 60
HANGS_AFTER_S = 600  # by the clock


class Outcome(NamedTuple):
    """memory_mib: peak over the baseline. seconds: processor time. result: the outcome, in a line."""

    memory_mib: float
    seconds: float
    ended: str  # "read" or "refused"
    result: str


def _peak_kib() -> int:
    """Peak memory of this process since its start. `ru_maxrss` includes its parent's, which made the inputs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _read(folder: str, out: str) -> str:
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources.base import Account, open_corpus, write_corpus

    write_corpus(SourceConfig(), folder, out)
    corpus = open_corpus(out)
    total, problems, size = corpus.account(), 0, 0
    for shard in corpus.shards():
        account = Account()
        for record in corpus.read(shard, account):
            problems += bool(record.problem)
            size += len(record.data)
        total += account
    total.check()
    return f"{total.records} records, {problems} with a problem, {size:,} bytes; {total.left_out()}"


def _child(name: str, folder: str, out: str, port: int, send) -> None:
    import httpcore  # noqa: F401  part of the baseline, as all of these
    import httpx  # noqa: F401
    import protego  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from tasks.curation.sources import arrow, parquet, scan, tars  # noqa: F401

    if name in hostile_images.IMAGES:
        send.send(Outcome(*hostile_images.decode(folder)))
        return
    hostile_urls.reach(port)
    baseline = _peak_kib()
    begun = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = (
                hostile_urls.download(name, folder, Path(out)) if name in hostile_urls.SITES else _read(folder, out)
            )
        ended = "read"
    except ValueError as error:
        ended, result = "refused", str(error).replace(folder + "/", "")
    seconds = time.process_time() - begun
    send.send(Outcome((_peak_kib() - baseline) / 1024, seconds, ended, result))


def measure(name: str) -> Outcome:
    """Writes one kind, and reads it in a separate process, whose memory is measured."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, out = Path(scratch) / "source", Path(scratch) / "corpus"
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        port = stack.enter_context(hostile_urls.serving())
        if name in hostile_urls.SITES:
            hostile_urls.build(name, folder, port)
        else:
            KINDS[name][1](folder)
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, str(folder), str(out), port, send))
        process.start()
        outcome = receive.recv() if receive.poll(HANGS_AFTER_S) else None
        process.join(1)
        if process.is_alive():
            process.kill()
        return outcome or Outcome(float("nan"), float("nan"), "hung or killed", f"exit code {process.exitcode}")


def passes(name: str, outcome: Outcome) -> bool:
    within = outcome.memory_mib <= MAX_MEMORY_MIB and outcome.seconds <= MAX_SECONDS
    return within and outcome.ended in KINDS[name][0].split(" or ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all if none is named")
    names = parser.parse_args().kinds or list(KINDS)
    failed = 0
    print(f"{'kind':36} {'MiB':>6} {'s':>6}  outcome")
    for name in names:
        outcome = measure(name)
        failed += not passes(name, outcome)
        mark = "" if passes(name, outcome) else "FAILED "
        print(
            f"{name:36} {outcome.memory_mib:6.0f} {outcome.seconds:6.1f}  {mark}{outcome.ended}: {outcome.result[:160]}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
