"""Progress and warnings of a run: one line each on standard output, as they are logged.

NUCLEUS_LOG_LEVEL (INFO by default; WARNING leaves only warnings and errors) is the level. Results of a command are
printed, not logged. Loggers are below "nucleus", separate from the root logger, which torchtitan and flytekit
configure. The reasons are in docs/decisions/structure.md.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

ROOT = "nucleus"


class _StandardOutput(logging.StreamHandler):
    """Writes to the current sys.stdout, which tests and Flyte's tasks replace."""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `logger = get_logger(__name__)`."""
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _StandardOutput) for handler in root.handlers):
        handler = _StandardOutput()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        level = os.environ.get("NUCLEUS_LOG_LEVEL", "INFO").upper()
        root.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
        root.propagate = False
    return root.getChild(name)
