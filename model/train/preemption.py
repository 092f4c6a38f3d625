"""SIGTERM: what Kubernetes sends to a pod, terminationGracePeriodSeconds before it kills it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Preempted(Exception):
    """Training stopped on request, behind a checkpoint. Called again, it goes on from there."""


class StopFlag:
    """`raised`: this process was asked to stop. `agreed`: some rank was, and by now all ranks know."""

    raised = False
    agreed = False


@contextlib.contextmanager
def sigterm_sets() -> Iterator[StopFlag]:
    """A flag that SIGTERM raises instead of ending the process; afterwards the former handler is back.

    Only the main thread may handle signals: elsewhere the flag stays down.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(signum: int, frame: object) -> None:
        flag.raised = True

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, former if former is not None else signal.SIG_DFL)
