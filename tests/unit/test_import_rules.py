"""Imports point one way: workflows -> tasks -> {model, eval}; heavy libraries load inside task bodies."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("workflows", "tasks", "model", "eval")
HEAVY = {"torch", "diffusers", "transformers", "torchtitan"}
FLYTE_FILES = {"tasks/envs.py", "tasks/artifacts.py", "tasks/training/elastic.py"}


def _sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 20
    return found


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level package, whether it runs when the module is imported) of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(outer)
    }
    inside |= {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        found += [(name.split(".")[0], node not in inside) for name in names]
    return found


@pytest.mark.parametrize("path", _sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path):
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    imported = {top for top, _ in _imports(path)}
    forbidden = {
        "model": {"tasks", "workflows", "eval", "flytekit"},
        "eval": {"tasks", "workflows", "model", "flytekit"},
        "tasks": {"workflows"},
        "workflows": set(),
    }[package]
    assert not imported & forbidden, f"{name} imports {imported & forbidden}"
    if not name.startswith("model/train/"):
        assert "torchtitan" not in imported, f"{name} imports torchtitan; only model/train may"
    may_flyte = package == "workflows" or name in FLYTE_FILES or path.name == "task.py"
    if not may_flyte:
        assert "flytekit" not in imported, f"{name} imports flytekit"


@pytest.mark.parametrize(
    "path",
    [p for p in _sources() if p.relative_to(ROOT).parts[0] in ("workflows", "tasks")],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_heavy_libraries_load_inside_task_bodies(path: Path):
    at_import = {top for top, runs in _imports(path) if runs}
    assert not at_import & HEAVY, f"{path.relative_to(ROOT)} imports {at_import & HEAVY} when it is loaded"


def test_loading_the_workflow_loads_no_heavy_library():
    code = f"import sys, workflows.reproduce; print(sorted({HEAVY!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_loading_the_workflow_sets_cublas_workspace_before_anything_can_multiply_on_a_gpu():
    """PyTorch reads it at a process's first product on CUDA; a local run encodes there before it trains."""
    code = (
        "import os, sys, workflows.reproduce; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert out.stdout.split() == [":4096:8", "False"]


@pytest.mark.parametrize("module", ["model.attention", "model.moe", "model.transformer", "model.kernels"])
def test_the_engine_is_imported_without_the_packages_that_a_gpu_machine_may_lack(module):
    missing = ("pydantic", "diffusers", "torchtitan", "flytekit", "safetensors")
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nimport {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_pytest_for_gpus_imports_no_file_without_such_tests(tmp_path):
    """Else a package that is missing there would be an error of collection, and no test would run."""
    for name in ("flytekit", "moto", "torchtitan", "pydantic", "diffusers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed here')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout[-3000:]
    assert "test_kernels.py::test_routing" in out.stdout and "test_attention.py::test_every_backend" in out.stdout
    assert "error" not in out.stdout.lower()
