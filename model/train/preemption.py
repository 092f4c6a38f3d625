"""Handling of SIGTERM, which Kubernetes sends to a pod terminationGracePeriodSeconds before it kills it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Preempted(Exception):
    """Training stopped on SIGTERM after it saved a checkpoint. The next call resumes from it."""


class StopFlag:
    """`raised`: this process received SIGTERM. `agreed`: all ranks know that at least one rank received it."""

    raised = False
    agreed = False


@contextlib.contextmanager
def sigterm_sets() -> Iterator[StopFlag]:
    """Yields a flag that SIGTERM sets instead of ending the process. Restores the previous handler on exit.

    Python allows only the main thread to handle signals: in other threads the flag is never set.
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
