"""Measures how the readers of a user's source handle hostile archives, tables, names and sites.

    python benchmarks/curation/hostile.py [KIND ...]

Each kind is written to a temporary folder (sparse files take no room) and read in a separate process: the scan, then
every record. URLs are downloaded from a server on the loopback; images are decoded in a worker process. Prints peaks of
memory over the memory after imports: that of one process, and that of the process and its workers together (pages that
they share count once; sampled every 30 ms). Then processor time (the machine may be busy) and the
outcome. A kind passes if both peaks stay within 512 MiB, the time within 60 s, and it ends as declared: read, or
refused in one ValueError.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "curation")]

import hostile_images  # noqa: E402
import hostile_tables  # noqa: E402, F401
import hostile_urls  # noqa: E402
from hostile_inputs import KINDS  # noqa: E402

MAX_MEMORY_MIB, MAX_SECONDS = 512, 60
HANGS_AFTER_S = 600  # by the clock
SAMPLE_S = 0.03
PRELOADED = [
    "httpcore",
    "httpx",
    "protego",
    "pyarrow.parquet",
    "tasks.curation.scoring.score",
    "tasks.curation.scoring.hashes",
    "tasks.curation.sources.arrow",
    "tasks.curation.sources.parquet",
    "tasks.curation.sources.scan",
    "tasks.curation.sources.tars",
    "tasks.curation.sources.urls.fetch",
    "pillow_heif",
]  # part of the baseline


class Outcome(NamedTuple):
    """memory_mib: peak of one process over the baseline. seconds: processor time. result: the outcome, in a line.
    together_mib: peak of the process and its workers."""

    memory_mib: float
    seconds: float
    ended: str  # "read" or "refused"
    result: str
    together_mib: float = math.nan


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


def _together_kib(pid: int) -> int:
    """Memory of a process and those that it started; a page that several share is divided among them."""
    total = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total += sum(_together_kib(int(child)) for child in children)
    return total


def _child(name: str, folder: str, out: str, port: int, pipe) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    from tasks.curation.scoring import score

    score._load_libraries()
    pipe.send("ready")
    pipe.recv()
    if name in hostile_images.IMAGES:
        pipe.send(Outcome(*hostile_images.decode(folder)))
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
    pipe.send(Outcome((_peak_kib() - baseline) / 1024, seconds, ended, result))


def measure(name: str, start: str = "spawn") -> Outcome:
    """Writes one kind, and reads it in a separate process, whose memory is measured.

    Args:
        start: of the process; "forkserver" imports the modules once for many kinds.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, out = Path(scratch) / "source", Path(scratch) / "corpus"
        folder.mkdir()
        context = multiprocessing.get_context(start)
        context.set_forkserver_preload(PRELOADED)
        port = stack.enter_context(hostile_urls.serving())
        if name in hostile_urls.SITES:
            hostile_urls.build(name, folder, port)
        else:
            KINDS[name][1](folder)
        pipe, theirs = context.Pipe()
        process = context.Process(target=_child, args=(name, str(folder), str(out), port, theirs))
        process.start()
        theirs.close()
        outcome, together = Outcome(math.nan, math.nan, "hung or killed", "no answer"), 0
        with contextlib.suppress(EOFError, ConnectionResetError):  # it died
            pipe.recv()
            baseline, hangs_at = _together_kib(process.pid), time.monotonic() + HANGS_AFTER_S
            pipe.send("go")
            while not (done := pipe.poll(SAMPLE_S)) and time.monotonic() < hangs_at:
                together = max(together, _together_kib(process.pid) - baseline)
            if done:
                outcome = pipe.recv()._replace(together_mib=together / 1024)
        process.join(1)
        if process.is_alive():
            process.kill()
        return outcome


def passes(name: str, outcome: Outcome) -> bool:
    within = max(outcome.memory_mib, outcome.together_mib) <= MAX_MEMORY_MIB and outcome.seconds <= MAX_SECONDS
    return within and outcome.ended in KINDS[name][0].split(" or ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all if none is named")
    names = parser.parse_args().kinds or list(KINDS)
    failed = 0
    print(f"{'kind':36} {'MiB':>6} {'with workers':>12} {'s':>6}  outcome")
    begun = time.monotonic()
    for name in names:
        outcome = measure(name, "forkserver")
        failed += not passes(name, outcome)
        mark = "" if passes(name, outcome) else "FAILED "
        print(
            f"{name:36} {outcome.memory_mib:6.0f} {outcome.together_mib:12.0f} {outcome.seconds:6.1f}  "
            f"{mark}{outcome.ended}: {outcome.result[:160]}",
            flush=True,
        )
    print(f"{len(names)} kinds in {time.monotonic() - begun:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
