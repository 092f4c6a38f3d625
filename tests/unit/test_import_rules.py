"""Imports point one way: workflows -> tasks -> {model, eval}; heavy libraries load inside task bodies."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("workflows", "tasks", "model", "eval")
HEAVY = {"torch", "diffusers", "transformers", "torchtitan"}
FLYTE_FILES = {"tasks/envs.py", "tasks/artifacts.py", "tasks/elastic.py"}
# The layers inside tasks/, lowest first (docs/architecture.md). A module imports its own layer's package and lower layers.
# Configuration sections are below all passes, so that a recipe can be composed of them.
LAYERS = (
    ("tasks.manifest", "tasks.diffusers_parts"),
    ("tasks.store", "tasks.hub_directory"),
    ("tasks.sealed", "tasks.lineage.trace_page", "tasks.elastic"),
    ("tasks.lineage.record_usage", "tasks.lineage.parents_page"),
    ("tasks.trace", "tasks.profiles", "tasks.site"),
    ("tasks.envs", "tasks.lineage.ancestors"),
    ("tasks.artifacts",),
    ("tasks.curation.config", "tasks.encoding.config", "tasks.publishing.config", "tasks.study.config"),
    ("tasks.curation",),
    ("tasks.encoding",),
    ("tasks.training", "tasks.merging"),
    ("tasks.evaluation",),
    ("tasks.publishing", "tasks.draw"),
    ("tasks.recipe",),
    ("tasks.planning",),
    (
        "tasks.compare",
        "tasks.preflight",
        "tasks.curation.check",
        "tasks.curation.plan",
        "tasks.curation.replay",
    ),  # commands
    ("tasks.study",),
)
LAYERS_OF_MODEL = (("model",), ("model.train",), ("model.plan",))


def _sources() -> list[Path]:
    result = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(result) > 20
    return result


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level package, whether it runs when the module is imported) of every import in a file."""
    tree = _tree(path)
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
    return [(name.split(".")[0], node not in inside) for node, name in _imported(tree)]


def _imported(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """(statement, dotted name) of every import, wherever it stands; of `from x import y`, x.y."""
    result = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            result += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return result


def _layer(name: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """(layer, its entry) of a dotted name: the entry with the longest common prefix."""
    entries = [(entry, i) for i, layer in enumerate(layers) for entry in layer if f"{name}.".startswith(f"{entry}.")]
    assert entries, f"{name} is in no layer: add it to LAYERS, and to docs/architecture.md"
    entry, index = max(entries, key=lambda pair: len(pair[0]))
    return index, entry


@pytest.mark.parametrize(
    "path",
    [p for p in _sources() if p.relative_to(ROOT).parts[0] in ("tasks", "model") and p.name != "__init__.py"],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_no_import_runs_upward(path: Path):
    package = path.relative_to(ROOT).parts[0]
    layers = LAYERS if package == "tasks" else LAYERS_OF_MODEL
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own, entry = _layer(name, layers)
    for _, imported in _imported(_tree(path)):
        if imported.split(".")[0] != package:
            continue
        layer, other = _layer(imported, layers)
        assert layer < own or other == entry, f"{name} imports {imported}, of the layer above ({other})"


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


LOAD = """
import json, os, sys
loaded = []
for name in ("reproduce", "study"):
    __import__("workflows." + name)
    loaded.append(sorted({top for top in sys.modules if "." not in top}))
print(json.dumps([os.environ["CUBLAS_WORKSPACE_CONFIG"], *loaded]))
"""


@pytest.fixture(scope="module")
def loaded() -> list:
    """CUBLAS_WORKSPACE_CONFIG, and the top-level modules after workflows.reproduce, and after workflows.study too."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", LOAD]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return json.loads(out.stdout)


@pytest.mark.parametrize("index", [1, 2], ids=["reproduce", "study"])
def test_loading_a_workflow_loads_no_heavy_library(loaded, index: int):
    """`pyflyte run ... --help` takes about as long as flytekit itself: seconds depend on the machine, modules do not."""
    heavy = HEAVY | {"scipy", "sklearn", "matplotlib", "duckdb", "imagehash", "s3fs", "kubernetes"}
    assert not heavy & set(loaded[index])


def test_loading_the_workflow_sets_cublas_workspace_before_anything_can_multiply_on_a_gpu(loaded):
    """PyTorch reads it at a process's first product on CUDA; a local run encodes there before it trains."""
    assert loaded[0] == ":4096:8" and "torch" not in loaded[1]


@pytest.mark.slow
def test_the_engine_is_imported_without_the_packages_that_a_gpu_machine_may_lack():
    missing = ("pydantic", "diffusers", "torchtitan", "flytekit", "safetensors")
    modules = ("model.layers.attention", "model.layers.moe", "model.transformer", "model.optim", "model.kernels")
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_pytest_for_gpus_imports_no_file_without_such_tests(tmp_path):
    """Otherwise a missing package would be an error of collection, and no test would run."""
    for name in ("flytekit", "moto", "torchtitan", "pydantic", "diffusers", "kubernetes"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed here')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout[-3000:]
    assert "test_kernels.py::test_routing" in out.stdout and "test_attention.py::test_every_backend" in out.stdout
    assert "error" not in out.stdout.lower()
