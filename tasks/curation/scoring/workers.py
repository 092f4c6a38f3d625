"""Worker processes for code that parses untrusted bytes: a crash, a timeout or a memory limit fails only one record."""

from __future__ import annotations

import contextlib
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
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # cgroup v2's limit, as containers see it
CONTAINER_SHARE = 0.8  # share of it for all workers together


class CrashError(Exception):
    """The worker died, took too long, or its function raised an unexpected error."""


class Workers:
    """Runs a function of bytes in worker processes; a context manager.

    Processes are forked: each starts in milliseconds and shares loaded modules. The function must not use threads or
    devices of its parent.

    Args:
        count: largest number of workers; fewer if the container has too little memory for all of them, since the kernel
            would kill the whole container. None: one for each core, at most 4.
        timeout_s: of one item, from when it is sent.
        memory_bytes: limit of a worker. None: no limit.
    """

    def __init__(
        self,
        function: Callable[[bytes], Any],
        count: int | None = None,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int | None = None,
    ) -> None:
        self._function, self._timeout_s = function, timeout_s
        count = count or min(4, len(os.sched_getaffinity(0)))
        if (
            memory_bytes
        ):  # fewer workers, not less memory for each: which images are decoded must not depend on the machine
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
        data is None. At most one item per worker is in memory."""
        waiting: deque[tuple[Any, _Worker | None]] = deque()
        free: deque[_Worker] = deque(self._workers)
        for tag, data in items:
            worker = None
            if data is not None:
                while not free and len(self._workers) == self._count:
                    yield self._collect(waiting, free)
                worker = free.popleft() if free else self._start()
                worker.send(data)
            waiting.append((tag, worker))
            while len(waiting) > self._count:
                yield self._collect(waiting, free)
        while waiting:
            yield self._collect(waiting, free)

    def _start(self) -> _Worker:
        self._workers.append(_Worker(self._function, self._memory_bytes, self._timeout_s))
        return self._workers[-1]

    def _collect(self, waiting: deque, free: deque) -> tuple[Any, Any]:
        tag, worker = waiting.popleft()
        if worker is None:
            return tag, None
        try:
            result = worker.receive()
        except CrashError as error:
            result = error
        if worker.alive:
            free.append(worker)
        else:
            self._workers.remove(worker)
            worker.stop()
        return tag, result


def _container_bytes() -> int:
    """What all workers together may take."""
    try:
        limit = int(CONTAINER_LIMIT.read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return 2**62
    return int(CONTAINER_SHARE * limit)


class _Worker:
    def __init__(self, function: Callable[[bytes], Any], memory_bytes: int | None, timeout_s: float) -> None:
        self._memory_bytes, self._timeout_s, self._deadline = memory_bytes, timeout_s, 0.0
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(function, theirs, self._connection, memory_bytes), daemon=True
        )
        self._process.start()
        theirs.close()
        self.alive = True

    def send(self, data: bytes) -> None:
        self._deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `receive` reports it
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        try:
            if not self._connection.poll(max(0.0, self._deadline - time.monotonic())):
                self.alive = False
                raise CrashError(f"the image took over {self._timeout_s:g} s to decode")
            result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.alive = False
            self._process.join(5)
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            raise CrashError(f"the image crashed its decoder ({how})") from None
        if isinstance(result, MemoryError):
            self.alive = False  # another one takes its place, with its memory in order
            raise CrashError(f"the image needs over {(self._memory_bytes or 0) // 2**20:,} MiB to decode")
        if isinstance(result, Exception):
            raise CrashError(f"{type(result).__name__}: {result}"[:300])
        return result

    def stop(self) -> None:
        self._connection.close()
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(
    function: Callable[[bytes], Any], connection: Connection, parents: Connection, memory_bytes: int | None
) -> None:
    parents.close()  # so that the pipe closes when the parent ends
    if memory_bytes:
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + memory_bytes,) * 2)  # also of mappings, since Linux 4.7
    while True:
        data = result = None  # frees the last item's before the next one comes
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # without the parent's exit handlers
        try:
            result = function(data)
        except Exception as error:
            result = error
        connection.send(result)
