"""Worker processes for code that parses untrusted bytes: a crash, a timeout or a memory limit fails only one record."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 50.0  # of the 60 s for any input; a photograph takes under a second
STARVED_S = 0.1  # between looks at a worker that is late
LARGE_BYTES = 16 * 2**20  # a larger item is not sent: a new worker is forked with it, and shares the parent's copy
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # cgroup v2's limit, as containers see it
CONTAINER_LIMIT_V1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
UNLIMITED = 2**62  # cgroup v1 writes a number near 2**63 where there is no limit
CONTAINER_SHARE = 0.8  # share of it for all workers together


class CrashError(Exception):
    """The worker died, took too long, or its function raised an unexpected error."""


class Workers:
    """Runs a function of bytes in worker processes; a context manager.

    Processes are forked: each starts in milliseconds and shares loaded modules. The function must not use threads or
    devices of its parent. Small items are sent to a worker that serves many. A large one is not copied: a new worker
    is forked with it, and ends after it.

    An item that fails in a worker that has served others is tried once more in a new one, within its time limit: the
    others may have fragmented the memory or damaged the decoder, and a result must not depend on them.

    Args:
        count: largest number of workers; fewer if the container has too little memory for all of them, since the kernel
            would kill the whole container. None: one for each core, at most 4.
        timeout_s: of one item, from when it is sent, in both workers together. Where other processes keep the processors
            busy, processor time counts: which images are decoded must not depend on the load.
        memory_bytes: limit of a worker together with the parent's copy of its item. None: no limit.
        failed: whether a result is a failure, too. Libraries report a lack of memory as a broken image.
    """

    def __init__(
        self,
        function: Callable[[bytes], Any],
        count: int | None = None,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int | None = None,
        failed: Callable[[Any], bool] = lambda result: False,
    ) -> None:
        self._function, self._timeout_s, self._failed = function, timeout_s, failed
        count = count or min(4, len(os.sched_getaffinity(0)))
        if memory_bytes:
            # Fewer workers, not less memory for each: which images are decoded must not depend on the machine.
            count = min(count, max(1, _container_bytes() // memory_bytes))
        self._count, self._memory_bytes = count, memory_bytes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def map(self, items: Iterable[tuple[Any, bytes | None]]) -> Iterator[tuple[Any, Any]]:
        """(tag, result) of each (tag, data), in order. The result is a `CrashError` if the function failed, None if
        data is None. At most one item per worker, and the next one, is in memory."""
        waiting: deque[tuple[Any, _Worker | None, bytes | None]] = deque()
        free: deque[_Worker] = deque(self._workers)
        for tag, data in items:
            worker = again = None
            if data is not None:
                while not free and len(self._workers) == self._count:
                    yield self._collect(waiting, free)
                worker = self._worker_for(data, free)
                again = data if worker.served else None
            waiting.append((tag, worker, again))
            while len(waiting) > self._count:
                yield self._collect(waiting, free)
        while waiting:
            yield self._collect(waiting, free)

    def _worker_for(self, data: bytes, free: deque[_Worker]) -> _Worker:
        """The worker to which the item was given."""
        if len(data) > LARGE_BYTES:
            if free and len(self._workers) == self._count:
                self._end(free.popleft())
            return self._start(data)
        worker = free.popleft() if free else self._start()
        worker.send(data)
        return worker

    def _start(self, item: bytes | None = None, spent_s: float = 0.0) -> _Worker:
        self._workers.append(_Worker(self._function, self._memory_bytes, self._timeout_s, item, spent_s))
        return self._workers[-1]

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()

    def _collect(self, waiting: deque, free: deque) -> tuple[Any, Any]:
        """again: the item, if its worker has served others."""
        tag, worker, again = waiting.popleft()
        if worker is None:
            return tag, None
        result = worker.receive()
        failed = isinstance(result, CrashError) or self._failed(result)
        if again is not None and failed and worker.took_s < self._timeout_s:
            self._end(worker)
            worker = self._start(again, spent_s=worker.took_s)
            result = worker.receive()
        if worker.alive:
            free.append(worker)
        else:
            self._end(worker)
        return tag, result


def container_limit() -> int | None:
    """The memory limit of the container in bytes; None without one."""
    for path in (CONTAINER_LIMIT, CONTAINER_LIMIT_V1):
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
        return limit if limit < UNLIMITED else None
    return None


def _container_bytes() -> int:
    """What all workers together may take."""
    limit = container_limit()
    return UNLIMITED if limit is None else int(CONTAINER_SHARE * limit)


class _Worker:
    """A process that serves items which are sent, or the one item that it is forked with.

    Attributes:
        alive: whether it can serve another item.
        served: how many items it has served.
        took_s: the time that the last one took.
    """

    def __init__(
        self,
        function: Callable[[bytes], Any],
        memory_bytes: int | None,
        timeout_s: float,
        item: bytes | None,
        spent_s: float,
    ) -> None:
        """spent_s: of the item's time limit, in another worker."""
        self._memory_bytes, self._timeout_s, self._single = memory_bytes, timeout_s, item is not None
        self._left_s, self._sent, self._cpu_before_s = timeout_s - spent_s, time.monotonic(), 0.0
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(function, theirs, self._connection, memory_bytes, item), daemon=True
        )
        self._process.start()
        theirs.close()
        self.alive, self.served, self.took_s = True, 0, 0.0

    def send(self, data: bytes) -> None:
        self._sent, self._cpu_before_s = time.monotonic(), self._state()[1]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `receive` reports it
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """The result of the item, or a `CrashError`."""
        self.served += 1
        try:
            if not self._answers():
                self.alive, self.took_s = False, self._timeout_s
                return CrashError(f"the image took over {self._timeout_s:g} s to decode")
            self.took_s, result = self._connection.recv()
        except (EOFError, OSError):  # it ended, perhaps in the middle of a message
            self.alive, self.took_s = False, time.monotonic() - self._sent
            self._process.join(5)
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            return CrashError(f"the image crashed its decoder ({how})")
        self.alive = not self._single
        if isinstance(result, MemoryError):
            self.alive = False  # another one takes its place, with its memory in order
            return CrashError(f"the image needs over {(self._memory_bytes or 0) // 2**20:,} MiB to decode")
        if isinstance(result, Exception):
            return CrashError(f"{type(result).__name__}: {result}"[:300])
        return result

    def _answers(self) -> bool:
        """Waits for the result; whether it came in time."""
        wait_s = max(0.0, self._sent + self._left_s - time.monotonic())
        while not self._connection.poll(wait_s):
            state, cpu_s = self._state()
            if state not in "RD" or cpu_s - self._cpu_before_s > self._left_s:  # it hangs, or has had its time
                return False
            wait_s = STARVED_S
        return True

    def _state(self) -> tuple[str, float]:
        """The process's state (R: it runs, or waits for a processor; D: for the disk), and its processor time."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            return "X", 0.0
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _limit_data(now: int, later: int) -> None:
    """Limits this process's memory, mappings included (since Linux 4.7). later: up to which it may be raised again."""
    resource.setrlimit(resource.RLIMIT_DATA, (now, later))


def _serve(
    function: Callable[[bytes], Any],
    connection: Connection,
    parents: Connection,
    memory_bytes: int | None,
    item: bytes | None,
) -> None:
    """item: the only one, which is in this process's memory from its start."""
    parents.close()  # so that the pipe closes when the parent ends
    silent = os.open(os.devnull, os.O_WRONLY)
    # C libraries print a line for each row of a damaged image. A crash is in the parent's `CrashError`.
    os.dup2(silent, 2)
    os.close(silent)
    gc.freeze()  # collecting the parent's objects would copy their pages
    if memory_bytes:
        with contextlib.suppress(AttributeError):  # other libraries than glibc return free memory by themselves
            ctypes.CDLL(None).malloc_trim(0)  # what the parent has freed would come on top of the limit
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
        limit = data - len(item or b"") + memory_bytes  # an item counts, however it came
        _limit_data(limit, limit)
    while True:
        data = result = None  # frees the last item's before the next one comes
        try:
            data = connection.recv_bytes() if item is None else item
        except (EOFError, OSError):
            os._exit(0)  # without the parent's exit handlers
        if memory_bytes:
            # The parent keeps a copy of what it sends. A second try, which shares it, has no more memory than the first.
            _limit_data(limit - (len(data) if len(data) <= LARGE_BYTES else 0), limit)
        begun = time.monotonic()
        try:
            result = function(data)
        except Exception as error:
            result = error
        took_s = time.monotonic() - begun
        try:
            connection.send((took_s, result))
        except MemoryError as error:  # before the first byte
            connection.send((took_s, error))
        if item is not None:
            os._exit(0)
