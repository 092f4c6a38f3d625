"""A wheel has the code, and the recipes that the code reads from its folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_wheel_has_every_module_and_recipe(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("workflows", "tasks", "model", "eval", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [
        path.relative_to(source).as_posix()
        for name in ("workflows", "tasks", "model", "eval", "recipes")
        for path in (source / name).rglob("*")
        if path.suffix in (".py", ".yaml", ".json")
    ]
    assert not set(wanted) - names
