"""Reproductions by the command that users type, in homes of their own: one of the smoke recipe, made once, and smaller ones."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.recipe import RECIPES

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
        if not self.artifacts.is_dir():
            return {}
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

    def invoke(self, *options: str, workflow: str = "reproduce") -> subprocess.CompletedProcess:
        """The same command in this process, which has imported everything after the first call."""
        from click.testing import CliRunner
        from flytekit.clis.sdk_in_container.pyflyte import main
        from flytekit.core.local_cache import LocalTaskCache

        self.path.mkdir(parents=True, exist_ok=True)
        LocalTaskCache._initialized = False  # it stays open in the home of the first call
        command = self.command(*options, workflow=workflow)[1:]
        with contextlib.chdir(ROOT):
            result = CliRunner(env=self.environment()).invoke(main, command)
        LocalTaskCache._initialized = False
        trace = "".join(traceback.format_exception(*result.exc_info)) if result.exc_info else ""
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr + trace)

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


STAGE = {"steps": 2, "batch_size": 4, "capacity_factors": 2.0, "aspect_ratios": ["1:1", "3:2", "2:3"]}


def small_recipe(folder: Path, sizes_px: list[int], **changes: Any) -> str:
    """A recipe of a few seconds that has all hops of smoke, and a stage of two steps at each size.

    Args:
        changes: sections, merged into those of the recipe.
    """
    values: dict[str, Any] = {
        "base": str(RECIPES / "smoke.yaml"),
        "name": f"stages{len(sizes_px)}",
        "source": {"scenes": 48, "scene_size_px": 64, "digits": 12, "defect_fraction": 0.1},
        "components": {"vae": {"steps": 4}, "text_encoder": {"steps": 4}, "min_psnr_db": 0.0},
        "model": {"num_layers": 4, "num_experts": 4, "moe_intermediate_dim": 64},
        "train": {
            "stages": [{"name": f"stage{i}", "image_size_px": size, **STAGE} for i, size in enumerate(sizes_px)],
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 2,
            "sample_every_steps": 0,
        },
        "merge": {"last_n": 2},
        "eval": {"seeds": [0], "prompts_per_task": 1, "num_inference_steps": 1},
    }
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


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
