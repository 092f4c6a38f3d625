"""Code that parses untrusted bytes runs in workers: a crash or an endless loop costs one result."""

import os
import signal
import time

import pytest

from tasks.curation.scoring.workers import CrashError, Workers


def parse(data: bytes) -> int:
    if data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"hang":
        time.sleep(60)
    if data == b"bug":
        raise KeyError("x")
    return len(data)


def outcomes(items: list[bytes | None], count: int = 2) -> list[object]:
    with Workers(parse, count, timeout_s=1.0) as workers:
        found = list(workers.map(enumerate(items)))
    assert [tag for tag, _ in found] == list(range(len(items))), "results are out of order"
    return [str(result) if isinstance(result, CrashError) else result for _, result in found]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_whatever_dies(count):
    big = b"x" * 3_000_000  # more than a pipe holds
    found = outcomes([b"a", b"die", None, big, b"die", b"bug", b"bb", None], count)
    crash = "the image crashed its decoder (signal 9)"
    assert found == [1, crash, None, 3_000_000, crash, "KeyError: 'x'", 2, None]


def test_one_that_hangs_is_killed_after_the_time_limit():
    begun = time.monotonic()
    assert outcomes([b"a", b"hang", b"bb"]) == [1, "the image took over 1 s to decode", 2]
    assert time.monotonic() - begun < 30


def nap(data: bytes) -> str:
    time.sleep(float(data))
    return "read"


def test_the_time_of_an_item_does_not_depend_on_how_long_those_before_it_take():
    with Workers(nap, 3, timeout_s=0.5) as workers:
        results = [result for _, result in workers.map(enumerate([b"1.2", b"1.2", b"1.2"]))]
    assert all(isinstance(result, CrashError) for result in results), results


def test_at_most_one_item_for_each_worker_is_taken_ahead():
    taken = 0

    def items():
        nonlocal taken
        for taken in range(1, 20):
            yield taken, b"x"

    with Workers(parse, 2) as workers:
        for done, _ in enumerate(workers.map(items())):
            assert taken <= done + 3


def test_no_process_stays_behind():
    with Workers(parse, 2) as workers:
        list(workers.map([(0, b"a"), (1, b"b")]))
        pids = [worker._process.pid for worker in workers._workers]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
