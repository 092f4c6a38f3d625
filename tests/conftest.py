"""What holds for every test."""

import gc
import os
import sys
from pathlib import Path

import pytest

# Without an NVIDIA device, Triton's kernels run in its interpreter. Triton reads this when it is first imported.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Garbage of earlier tests may hold gloo's groups, whose threads a forked process does not have: ending one there waits for
# them for ever. So it is collected before, and what a child inherits is never collected by it.
os.register_at_fork(before=gc.collect, after_in_child=gc.freeze)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test draws the same numbers alone as after any others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
