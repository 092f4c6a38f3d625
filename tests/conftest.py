"""Settings and fixtures of every test."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NVIDIA = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # a sandbox may have only some of them

# Without an NVIDIA device, Triton's kernels run in its interpreter. Triton reads this when it is first imported.
if not any(Path(path).exists() for path in NVIDIA):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the limit on CPU seconds of a test counts all threads
# Before any matrix product on CUDA: see model/__init__.py, which not every test imports first.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# kubernetes, which a GPU machine may lack, imports kubernetes_validate, which compiles 39 grammars: 3 s for each worker. Tests
# that validate import it themselves.
with contextlib.suppress(ImportError), pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "kubernetes_validate", None)
    import kubernetes.dynamic  # noqa: F401

# Garbage of earlier tests may hold groups of gloo. A forked process lacks their threads, and would wait forever when it
# ends such a group. So garbage is collected before a fork, and a child never collects what it inherits. The rest is
# left out of later collections: torch alone is millions of objects, and a collection of them takes as long as most tests.
os.register_at_fork(before=lambda: (gc.collect(), gc.freeze()), after_in_child=gc.freeze)

# flytekit and torch leave folders in the temporary folder. They go into one that is removed after the tests; workers inherit
# it. pytest's own folders stay where they were, so that those of failed tests are kept.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not WORKER:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="nucleus-tests-")


def pytest_unconfigure():
    if not WORKER:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Excludes what test files import from garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path, config):
    """`pytest -m gpu` imports only files with tests marked gpu: the others need packages that a GPU machine may lack."""
    if config.option.markexpr != "gpu":
        return None
    if collection_path.is_dir():
        files = collection_path.rglob("test_*.py")
    elif collection_path.name.startswith("test_"):
        files = [collection_path]
    else:
        return None
    return None if any("mark.gpu" in file.read_text() for file in files) else True


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Seeds the generators: a test draws the same numbers alone and after other tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that is marked fresh_process in a separate pytest process."""
    if pyfuncitem.get_closest_marker("fresh_process") is None or "NUCLEUS_TEST_FRESH" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["NUCLEUS_TEST_FRESH"] = "1"
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    return True


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home, and no store."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    return tmp_path / "home"
