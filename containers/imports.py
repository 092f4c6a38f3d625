"""What the tasks of each role import: read from the code, compared with the locks (tests/unit/cluster/test_locks.py), and
imported in each image after its build (containers/build.py), so that a file removed by mistake fails the build.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("workflows", "tasks", "model", "eval")
# role -> packages that only its pods load, of which task.py has the tasks, or __main__.py a command for pods; all roles load
# the files directly in tasks/
FOLDERS = {
    "curation": ["tasks.planning", "tasks.curation"],
    "scorer": ["tasks.curation", "eval.judges.pp_ocr"],
    "encoder": ["tasks.encoding", "model"],
    "trainer": ["tasks.training", "tasks.merging", "tasks.preflight", "model"],
    "evaluator": ["tasks.evaluation", "eval", "model"],
    "publisher": ["tasks.publishing"],
}
_BY_NAME = re.compile(rf"({'|'.join(OURS)})(\.\w+)+(:\w+)?")  # of a module that is imported when a recipe names it
# Run in an image. Arguments: MODULE, MODULE:NAME for `from MODULE import NAME`, and ?PACKAGE for one whose files are read without
# an import.
IMPORT = """
import contextlib, importlib, importlib.util, sys
missing = []
with contextlib.redirect_stdout(sys.stderr):
    for text in sys.argv[1:]:
        module, _, name = text.partition(":")
        try:
            if text.startswith("?"):
                assert importlib.util.find_spec(text[1:])
                continue
            loaded = importlib.import_module(module)
            if name and not hasattr(loaded, name):
                importlib.import_module(module + "." + name)
        except Exception as error:
            missing.append(f"{text} ({type(error).__name__}: {error})")
    if "tasks.planning.task" in sys.argv:  # the planner, to which a recipe names further modules
        from tasks.recipe import RECIPES, load_recipe
        for path in sorted(RECIPES.rglob("*.yaml")):
            try:
                load_recipe(str(path), [])
            except Exception as error:
                missing.append(f"{path.name} ({type(error).__name__}: {error})")
if missing:
    sys.exit("the image lacks a part of " + ", ".join(missing))
"""


def find_file(module: str) -> Path | None:
    """The file of one of our modules."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def distributions() -> dict[str, list[str]]:
    """Top-level package -> names of the installed distributions with it."""
    return dict(packages_distributions())


@functools.cache
def imports_of(path: Path) -> frozenset[tuple[str, str]]:
    """(module, "") or (module, name) that a file imports anywhere, except for type checkers and in `try` (optional packages); and
    our modules that it names in strings."""
    tree = parse(path)
    optional = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.Try) or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for inner in ast.walk(outer)
    }
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if node in optional:
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _BY_NAME.fullmatch(node.value):
            found.add((node.value.partition(":")[0], ""))
    return frozenset(found)


def folders_of(path: Path) -> set[str]:
    """Packages whose files a file of ours reads without an import: arguments of package_folder."""
    calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and node.args)
    names = (node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "package_folder")
    return {name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)}


def task_modules(role: str) -> list[str]:
    """Our modules with the tasks of a role, and its commands for pods."""
    modules = (f"{folder}.{name}" for folder in FOLDERS[role] for name in ("task", "__main__"))
    return [module for module in modules if find_file(module)]


def third_party(role: str) -> Iterator[tuple[str, str, str]]:
    """(module, name, file of ours) of each import of an installed package, in all of our modules that the role's tasks load
    or run; (?PACKAGE, "", file of ours) where files are read without an import."""
    folders = tuple(FOLDERS[role])
    seen, todo = set(), task_modules(role)
    while todo:
        module = todo.pop()
        if module in seen or not (path := find_file(module)):
            continue
        seen.add(module)
        file = path.relative_to(ROOT).as_posix()
        yield from ((f"?{name}", "", file) for name in sorted(folders_of(path)) if not _is_elsewhere(role, name, file))
        for source, name in sorted(imports_of(path)):
            package = source.split(".")[0]
            if package in OURS:
                names = [source, f"{source}.{name}"]
                todo += [text for text in names if text.startswith(folders) or text.count(".") == 1]
            elif package in distributions() and not _is_elsewhere(role, source, file):
                yield source, name, file


# Modules of curation with models, which run in the scorer's image, or on its GPUs.
WITH_MODELS = {f"tasks/curation/{name}.py" for name in ("scorers/hub", "scorers/packaged", "captioning/qwen_vl")}


def _is_elsewhere(role: str, source: str, file: str) -> bool:
    """Whether a file's import never runs in pods of the role."""
    package = source.split(".")[0]
    for_jobs = file == "tasks/elastic.py" or (file == "tasks/envs.py" and package in ("kubernetes", "flytekitplugins"))
    return (
        (for_jobs and role != "trainer")  # training tasks of several processes
        or file == "tasks/hub_directory.py"  # python -m tasks.trace on a person's machine
        or file in ("tasks/compare.py", "model/routing_report.py")  # commands, where matplotlib is installed
        or (role == "curation" and file in WITH_MODELS)
        or (
            role == "curation" and file == "tasks/planning/task.py" and package == "torch"
        )  # plan_benchmarks: evaluator
        or (role == "scorer" and file.startswith("tasks/curation/sources/urls/"))  # curation's image downloads
        # only for curation.engine=spark, for which a site builds a separate image: docs/scale.md
        or package == "pyspark"
        or source == "flytekitplugins.spark"
        or (package == "triton" and role != "trainer")  # used where it is installed; torchtitan needs it
    )


def program_arguments(role: str) -> list[str]:
    """Arguments of IMPORT: first our modules, as model.train sets torchtitan's device before torchtitan is imported."""
    names = {f"{source}:{name}" if name else source for source, name, _ in third_party(role)}
    return [*task_modules(role), *sorted(names)]
