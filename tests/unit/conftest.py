"""The time limit of unit tests."""

import os

import pytest

LIMIT_S = 20  # ten times the time of such a test on a laptop


@pytest.fixture(autouse=True)
def at_most_seconds_of_cpu_unless_slow(request):
    """`make test-fast` stays fast: a test that takes longer, with the processes that it waits for, needs the marker slow."""
    begun = _cpu_s()
    yield
    taken = _cpu_s() - begun
    if taken > LIMIT_S and not any(request.node.get_closest_marker(name) for name in ("slow", "long", "gpu")):
        pytest.fail(f"{taken:.0f} s of CPU: make the test cheaper, or mark it slow", pytrace=False)


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
