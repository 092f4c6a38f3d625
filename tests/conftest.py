"""What holds for every test."""

import os
import sys
from pathlib import Path

import pytest

# Without an NVIDIA device, Triton's kernels run in its interpreter. Triton reads this when it is first imported.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test draws the same numbers alone as after any others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
