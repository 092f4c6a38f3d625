"""One smoke reproduction, made once by the command that users type, in a home of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Home:
    """A home directory with its own Flyte cache and artifacts."""

    path: Path

    @property
    def artifacts(self) -> Path:
        return self.path / "nucleus" / "artifacts"

    def listing(self) -> dict[str, set[str]]:
        """Kind -> digests that are there."""
        return {
            kind.name: {entry.name for entry in kind.iterdir() if not entry.name.startswith(".")}
            for kind in self.artifacts.iterdir()
        }

    def environment(self) -> dict[str, str]:
        return os.environ | {"HOME": str(self.path), "NUCLEUS_HOME": str(self.path / "nucleus")}

    @staticmethod
    def command(*options: str, workflow: str = "reproduce") -> list[str]:
        return [str(Path(sys.executable).with_name("pyflyte")), "run", f"workflows/{workflow}.py", workflow, *options]

    def run(self, *options: str, workflow: str = "reproduce", timeout_s: float = 900) -> subprocess.CompletedProcess:
        """`pyflyte run workflows/reproduce.py reproduce ...` as a user would."""
        self.path.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            self.command(*options, workflow=workflow),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    @staticmethod
    def outputs(done: subprocess.CompletedProcess, of: str = "Reproduction") -> dict[str, Path]:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        last = done.stdout[done.stdout.rindex(f"{of}(") :]
        return {name: Path(path) for name, path in re.findall(r"(\w+)=([^\s,)]+)", last)}


def left_over(home: Home) -> list[Path]:
    """Half-written things: temporary directories and files outside of sealed directories."""
    if not home.artifacts.is_dir():
        return []
    return [
        entry
        for kind in home.artifacts.iterdir()
        for entry in kind.iterdir()
        if not (entry / "manifest.json").is_file()
    ]


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def smoke(smoke_home) -> dict[str, Path]:
    """Paths of the outputs of one smoke reproduction."""
    return Home.outputs(smoke_home.run("--recipe", "smoke"))


@pytest.fixture
def new_home(tmp_path) -> Home:
    return Home(tmp_path / "home")
