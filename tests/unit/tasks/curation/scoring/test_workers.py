"""Code that parses untrusted bytes runs in workers: a crash or an endless loop costs one result."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.curation.scoring.workers import LARGE_BYTES, CrashError, Workers

MIB = 2**20
served: list[bytes] = []  # by this process


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
        results = list(workers.map(enumerate(items)))
    assert [tag for tag, _ in results] == list(range(len(items))), "results are out of order"
    return [str(result) if isinstance(result, CrashError) else result for _, result in results]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_whatever_dies(count):
    big = b"x" * 3_000_000  # more than a pipe holds
    large = bytes(LARGE_BYTES + 1)
    result = outcomes([b"a", b"die", None, big, b"die", large, b"bug", b"bb", large, None], count)
    crash = "the image crashed its decoder (signal 9)"
    assert result == [1, crash, None, 3_000_000, crash, len(large), "KeyError: 'x'", 2, len(large), None]


@pytest.mark.slow
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


def complain(data: bytes) -> int:
    written = os.write(2, data * 1000)
    if data == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    return written


def test_what_a_library_prints_to_stderr_in_a_worker_is_dropped_and_its_crash_is_reported(capfd):
    with Workers(complain, 1) as workers:
        results = [str(result) for _, result in workers.map(enumerate([b"row\n", b"die", b"row\n"]))]
    assert results == ["4000", "the image crashed its decoder (signal 9)", "4000"]
    assert capfd.readouterr().err == ""


# --- items do not depend on their neighbours -------------------------------------------------------------------


def spoilt(data: bytes) -> str:
    """Fails in a process that has served another item, or always."""
    how, _, always = data.decode().partition(" ")
    if served or always:
        if how == "memory":
            raise MemoryError
        if how == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error":
            raise KeyError("x")
        return "broken"
    served.append(data)
    return "read"


@pytest.mark.parametrize("how", [b"memory", b"crash", b"error", b"broken"])
def test_what_fails_after_others_is_tried_again_in_a_new_worker(how):
    items = [how] * 4
    with Workers(spoilt, 1, failed="broken".__eq__) as workers:
        assert [result for _, result in workers.map(enumerate(items))] == ["read"] * 4


def log_and_spoil(data: bytes) -> str:
    name, text = data.split(b":")
    with open(name, "ab") as file:
        file.write(text + b"\n")
    return spoilt(text)


def test_what_fails_by_itself_is_tried_in_two_workers_at_most(tmp_path):
    log = tmp_path / "log"
    items = [b"memory", b"memory always", b"broken always", b"memory"]
    with Workers(log_and_spoil, 1, memory_bytes=100 * MIB, failed="broken".__eq__) as workers:
        results = [str(result) for _, result in workers.map((i, b"%s:%s" % (bytes(log), item)) for i, item in enumerate(items))]  # fmt: skip
    assert results == ["read", "the image needs over 100 MiB to decode", "broken", "read"]
    # The worker of the second item is new when the third one comes: no neighbour can be the cause.
    assert log.read_text().split("\n")[:-1] == ["memory", "memory always", "memory always", "broken always", "memory"]


def slow_when_spoilt(data: bytes) -> str:
    if not served:
        served.append(data)
        time.sleep(float(data))
        return "read"
    time.sleep(0.7)
    raise MemoryError


@pytest.mark.slow
def test_both_workers_together_have_the_time_of_one_item():
    with Workers(slow_when_spoilt, 1, timeout_s=1.0) as workers:
        results = [str(result) for _, result in workers.map(enumerate([b"0", b"0.7", b"0"]))]
    assert results == ["read", "the image took over 1 s to decode", "read"]


def wait_and_work(data: bytes) -> str:
    waits, works = map(float, data.split())
    time.sleep(waits)
    while time.process_time() < works:
        pass
    return "read"


@pytest.mark.slow
def test_a_worker_that_waits_for_a_processor_has_its_time_and_one_that_works_too_long_has_no_more():
    """One that had no processor for a while, and one that works for ever."""
    with Workers(wait_and_work, 1, timeout_s=1.0) as workers:
        results = [str(result) for _, result in workers.map(enumerate([b"0.3 0.85", b"0 99", b"0 0"]))]
    assert results == ["read", "the image took over 1 s to decode", "read"]


# --- memory ----------------------------------------------------------------------------------------------------


def private_mib(data: bytes) -> float:
    """Memory of this process that no other one shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def test_a_large_item_is_not_copied_to_its_worker():
    with Workers(private_mib, 1) as workers:
        ((_, taken),) = workers.map([(0, bytes(64 * MIB))])
    assert taken < 32


COLLECTS = """
import gc
from pathlib import Path
from tasks.curation.scoring.workers import Workers

def collect(data):
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) // 1024

kept = [[] for _ in range(1_000_000)]  # 60 MiB
with Workers(collect, 1) as workers:
    ((_, taken),) = workers.map([(0, b"")])
assert taken < 32, taken
"""


def test_a_worker_that_collects_garbage_copies_no_objects_of_its_parent():
    """In a process without these tests' own settings of the garbage collector."""
    done = subprocess.run([sys.executable, "-c", COLLECTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def take(data: bytes) -> int:
    return len(bytearray(int(data.rstrip(b"\0")) * MIB))


@pytest.mark.slow
@pytest.mark.fresh_process
@pytest.mark.parametrize("size", [16, LARGE_BYTES + 1, 60 * MIB])
def test_the_limit_of_memory_counts_the_item_whether_it_was_sent_or_shared(size):
    room = 100 - size // MIB
    items = [(share, str(int(share * room)).encode().ljust(size, b"\0")) for share in (0.5, 1.5, 0.5)]
    with Workers(take, 1, memory_bytes=100 * MIB) as workers:
        results = [isinstance(result, CrashError) for _, result in workers.map(items)]
    assert results == [False, True, False]


@pytest.mark.slow
@pytest.mark.fresh_process
def test_the_parents_copy_of_a_sent_item_counts_too():
    """In a worker's first item, and in a later one with its second try."""
    items = [(taken, str(taken).encode().ljust(LARGE_BYTES, b"\0")) for taken in (74, 60, 74)]
    with Workers(take, 1, memory_bytes=100 * MIB) as workers:
        results = [isinstance(result, CrashError) for _, result in workers.map(items)]
        assert results == [True, False, True], "74 and twice 16 are over 100"
        ((_, result),) = workers.map([(0, b"74")])
    assert result == 74 * MIB, "the next item has a limit of its own"


def dies_while_it_answers(data: bytes) -> bytes:
    if data == b"die":
        threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        return bytes(50 * MIB)  # more than a pipe holds
    return data


def test_a_worker_that_dies_in_the_middle_of_its_answer_costs_one_item(monkeypatch):
    collect = Workers._collect
    monkeypatch.setattr(Workers, "_collect", lambda *of: (time.sleep(0.5), collect(*of))[1])  # reads once it is dead
    with Workers(dies_while_it_answers, 2) as workers:
        (_, first), (_, second) = workers.map([(0, b"die"), (1, b"ok")])
    assert "crashed its decoder (signal 9)" in str(first) and second == b"ok"


@pytest.mark.slow
@pytest.mark.fresh_process
def test_an_answer_for_which_there_is_no_memory_says_so():
    with Workers(lambda data: bytes(int(data) * MIB), 1, memory_bytes=100 * MIB) as workers:
        results = [result for _, result in workers.map([(0, b"1"), (1, b"70"), (2, b"1")])]
    assert str(results[1]) == "the image needs over 100 MiB to decode" and len(results[0]) == len(results[2]) == MIB
