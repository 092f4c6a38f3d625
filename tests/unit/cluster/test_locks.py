"""Each role's image has the packages that its tasks import, at the versions of constraints.txt."""

from __future__ import annotations

import ast
import functools
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from containers import lock

ROOT = Path(__file__).resolve().parents[3]
OURS = ("workflows", "tasks", "model", "eval")
# role -> folders of its own, whose task.py files its pods load; all share the files of tasks/ itself
FOLDERS = {
    "curation": ["tasks.planning", "tasks.curation"],
    "scorer": ["tasks.curation"],
    "encoder": ["tasks.encoding", "model"],
    "trainer": ["tasks.training", "tasks.merging", "model"],
    "evaluator": ["tasks.evaluation", "eval", "model"],
    "publisher": ["tasks.publishing"],
}


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


@functools.cache
def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, except for type checkers and in `try` (optional packages)."""
    tree = _tree(path)
    optional = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.Try) or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for inner in ast.walk(outer)
    }
    found = set()
    for node in ast.walk(tree):
        if node in optional:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _third_party(folders: list[str]) -> dict[str, str]:
    """Top-level package -> the file of ours that imports it, of all modules in these folders that their tasks load or
    run."""
    own = [f"{folder}.task" for folder in folders]
    seen, todo, packages = set(), [module for module in own if _file(module)], {}
    while todo:
        module = todo.pop()
        if module in seen or not (path := _file(module)):
            continue
        seen.add(module)
        for name in _imports(path):
            if name.split(".")[0] in OURS:
                if name.startswith(tuple(folders)) or name.count(".") == 1:
                    todo.append(name)
            else:
                packages.setdefault(name.split(".")[0], path.relative_to(ROOT).as_posix())
    return packages


def _locked(role: str) -> set[str]:
    lines = (lock.REQUIREMENTS / f"{role}.txt").read_text().splitlines()
    return {line.split("==")[0] for line in lines if line and not line.startswith("#")}


def test_the_locks_are_what_pyproject_and_constraints_give():
    for name, text in lock.locked().items():
        assert (lock.REQUIREMENTS / name).read_text() == text, f"{name} is stale: run python -m containers.lock"


@pytest.mark.parametrize("role", lock.ROLES)
def test_a_roles_lock_has_every_package_that_its_own_folder_imports(role):
    distributions = _distributions()
    locked = _locked(role)
    missing = {
        f"{package} ({path})"
        for package, path in _third_party(FOLDERS[role]).items()
        if package in distributions
        and path != "tasks/elastic.py"  # loaded by training tasks of several processes alone
        and path != "tasks/hub_directory.py"  # python -m tasks.trace on a person's machine
        and not (role == "scorer" and path.startswith("tasks/curation/sources/urls/"))  # curation's image downloads
        and package != "pyspark"  # curation.engine=spark has a separate extra, and the site a separate image
        and package != "triton"  # used where it is installed; torchtitan needs it, and so the trainer has it
        and not locked & {canonicalize_name(name) for name in distributions[package]}
    }
    assert not missing


HEAVY = {"torch", "diffusers", "transformers", "triton"}


def _loaded(module: str, seen: dict[str, set[str]]) -> set[str]:
    """Top-level packages that the import of one of our modules loads, directly or indirectly."""
    if module in seen or not (path := _file(module)):
        return seen.get(module, set())
    seen[module] = set()
    packages = set()
    for node in _tree(path).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            above = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
            ours = name.split(".")[0] in OURS
            packages |= set().union(*(_loaded(each, seen) for each in above)) if ours else {name.split(".")[0]}
    seen[module] = packages
    return packages


def test_the_planner_and_curation_load_no_torch_whatever_their_tasks_import():
    assert not _locked("curation") & HEAVY
    seen: dict[str, set[str]] = {}
    for folder in FOLDERS["curation"]:
        for path in ROOT.joinpath(*folder.split(".")).rglob("*.py"):
            for name in _imports(path):
                if name.split(".")[0] in OURS:
                    heavy = _loaded(name, seen) & HEAVY
                    assert not heavy, f"{path.relative_to(ROOT)} imports {name}, which loads {', '.join(heavy)}"


@pytest.mark.parametrize("role", lock.ROLES)
def test_a_roles_lock_has_what_loads_with_the_modules_that_its_tasks_import(role):
    """Also with modules of other folders, such as the sources of curation, from which the encoder reads images."""
    distributions, locked = _distributions(), _locked(role)
    seen: dict[str, set[str]] = {}
    for folder in FOLDERS[role]:
        for path in ROOT.joinpath(*folder.split(".")).rglob("task.py"):
            for name in _imports(path):
                if name.split(".")[0] not in OURS:
                    continue
                for package in _loaded(name, seen):
                    names = {canonicalize_name(n) for n in distributions.get(package, [])}
                    assert not names or names & locked, (
                        f"{name}, which {path.relative_to(ROOT)} imports, loads {package}"
                    )
