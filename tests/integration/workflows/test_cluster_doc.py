"""The commands of docs/cluster.md and of the README, run as they stand there against stand-ins of docker, of Flyte and of the
Kubernetes API. What they start is then checked as the planner's pod would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from flyteadmin import StandInAdmin, flyteadmin
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState
from object_store import OWN, s3_server
from scripted_api import scripted_api

from tasks import envs
from tasks.planning.task import resolve_recipe
from tasks.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
README = re.search(r"^## On a cluster\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1]
README_COMMANDS = re.findall(r"^    (\S.*)$", README.replace("\\\n", ""), flags=re.MULTILINE)
COPIED = ("workflows", "tasks", "model", "eval", "recipes", "containers", "tools", "k8s", "config", "docs")
# Builds and pushes nothing: the images that it describes have the packages of containers/requirements.
DOCKER = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
tag = next((word for word in words if "/nucleus-" in word), "")
name = tag.rpartition(":")[0]
if words[0] == "run":
    for file in Path("containers/requirements").glob(name.rpartition("/nucleus-")[2] + "*.txt"):
        if file.name.split(".")[1] in ("txt", "no-deps"):
            print("\\n".join(line for line in file.read_text().splitlines() if "==" in line))
elif "{{.Size}}" in words:
    print(1)
elif words[0] == "inspect":
    print(json.dumps([name + "@sha256:" + "0" * 64]))
elif words[0] not in ("info", "build", "push"):
    sys.exit(f"docker {words}")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository of one commit with this working tree's files, and a .venv that is this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.lock.json", "sbom"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "no-deps.txt", ".gitignore", "README.md"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "all"], cwd=folder, check=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "docker.py").write_text(DOCKER)
    scripts = {name: f'exec "{Path(sys.executable).with_name(name)}" "$@"' for name in ("python", "pyflyte")}
    for name, script in (scripts | {"docker": f'exec "{sys.executable}" {folder}/.venv/docker.py "$@"'}).items():
        path = folder / ".venv" / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    (folder / ".venv" / ".installed").touch()  # newer than what it depends on, so that make installs nothing
    return folder


@contextmanager
def site(checkout: Path, folder: Path) -> Iterator[tuple[str, StandInAdmin, dict[str, str]]]:
    """Yields (endpoint, the requests that Flyte got, environment of a user) with the limits of our Helm values."""
    values = yaml.safe_load((ROOT / "k8s" / "helm" / "flyte-binary.yaml").read_text())
    limits = values["configuration"]["inline"]["task_resources"]["limits"]
    with (
        flyteadmin(limits) as (endpoint, admin),
        s3_server() as store,
        scripted_api({}, folder / "kubeconfig"),
    ):
        environment = os.environ | OWN | {"AWS_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {"KUBECONFIG": str(folder / "kubeconfig"), "PYTHONPATH": str(checkout)}
        environment |= {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"}
        yield endpoint, admin, environment


def run(command: str, checkout: Path, endpoint: str, environment: dict[str, str]) -> None:
    """Runs a command. The user has done what the text asks for: chosen a commit, and named the endpoint in the configuration."""
    command = command.replace("=COMMIT", f"={'a' * 40}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if "preflight" in command:  # of an empty cluster: it says what is missing, each with its remedy
        assert "checks:" in done.stdout and "->" in done.stdout and done.returncode, done.stderr[-2000:]
        return
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    if "flyte.example.yaml" in command:
        config = checkout / "config" / "flyte.yaml"
        text = yaml.safe_load(config.read_text())
        text["admin"] = {"endpoint": f"dns:///{endpoint}", "insecure": True}
        config.write_text(yaml.safe_dump(text))


def check_on_a_pod(execution: Any, admin: StandInAdmin, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of resolve_recipe for the inputs of an execution, in a pod of the shape 8x8 at the example's site."""
    plan = admin.plans[execution.spec.launch_plan.name].spec
    literals = dict(plan.fixed_inputs.literals) | dict(execution.inputs.literals)
    given = literals["overrides"].scalar.union.value
    changes = given.collection.literals if given.HasField("collection") else [given]
    section = yaml.safe_load((ROOT / "config" / "flyte.example.yaml").read_text())["nucleus"]
    monkeypatch.setattr(envs, "TRAIN_NNODES", 8)
    monkeypatch.setattr(envs, "TRAIN_NPROC", 8)
    monkeypatch.setenv("NUCLEUS_STORE", section["store"])
    monkeypatch.setenv("NUCLEUS_ENDPOINTS", section["endpoints"])
    context = FlyteContextManager.current_context()
    state = context.new_execution_state().with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        return resolve_recipe.task_function(
            recipe=literals["recipe"].scalar.primitive.string_value,
            overrides=[change.scalar.primitive.string_value for change in changes],
            source=literals["source"].scalar.primitive.string_value,
            ends_in="merged",
        )


@pytest.mark.slow
def test_every_command_of_the_document_runs_and_the_planner_accepts_what_it_starts(checkout, tmp_path, monkeypatch):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    assert len(BLOCKS) >= 9
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
    with site(checkout, tmp_path) as (endpoint, admin, environment):
        for block in BLOCKS:
            run(block, checkout, endpoint, environment)
        assert {"workflows.reproduce.reproduce", "workflows.pretrain.pretrain"} <= admin.plans.keys()
        assert {"pretrain-nucleus_17b-8x8", "reproduce-tiny", "train-stage-8x8"} <= admin.plans.keys()
        assert {request.id.version for request in admin.plans.values()} >= {commit, f"{commit}-8x8"}
        planned, uploaded = admin.executions
    lock = json.loads((checkout / "containers" / "images.lock.json").read_text())
    assert lock["revision"] == commit and lock["variant"] == "cuda"
    assert planned.spec.launch_plan.name == "pretrain-nucleus_17b-8x8"
    assert planned.spec.launch_plan.version == f"{commit}-8x8"
    sections = check_on_a_pod(planned, admin, monkeypatch)
    assert sections.source_path == "s3://my-bucket/images/" and sections.curation.concurrency == 32
    text = uploaded.inputs.literals["recipe"].scalar.primitive.string_value
    assert load_recipe(text).name == "mine"  # without the file


@pytest.mark.slow
def test_every_command_of_the_readme_runs_and_the_planner_accepts_what_it_starts(checkout, tmp_path, monkeypatch):
    assert len(README_COMMANDS) == 4
    (checkout / "containers" / "images.lock.json").unlink(missing_ok=True)
    with site(checkout, tmp_path) as (endpoint, admin, environment):
        for command in README_COMMANDS:
            run(command, checkout, endpoint, environment)
        assert "pretrain-nucleus_17b-8x8" in admin.plans
        (started,) = admin.executions
    assert (started.project, started.domain) == ("nucleus", "production")
    sections = check_on_a_pod(started, admin, monkeypatch)
    assert sections.name == "nucleus_17b" and len(sections.stages) == 3


def test_commands_that_no_test_runs_are_marked_so():
    assert set(re.findall(r"^```(\S.*)$", TEXT, flags=re.MULTILINE)) == {"sh", "sh trace", "sh cluster"}
    traces = re.findall(r"^```sh trace\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert all(line.startswith("python -m tasks.trace ") for block in traces for line in block.splitlines())
