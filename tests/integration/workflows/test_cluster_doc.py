"""The commands of docs/cluster.md, run as they stand there against stand-ins of Flyte and of the Kubernetes API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flyteadmin import flyteadmin
from object_store import OWN, s3_server
from scripted_api import scripted_api

from containers.lock import ROLES
from tasks.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
COPIED = ("workflows", "tasks", "model", "eval", "recipes", "containers", "tools", "k8s", "config", "docs")


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
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    images = {r: {"image": f"127.0.0.1:1/nucleus-{r}", "digest": "sha256:" + "0" * 64} for r in ROLES}
    lock = {"revision": commit, "variant": "cuda", "images": images}
    (folder / "containers" / "images.lock.json").write_text(json.dumps(lock))
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "pyflyte"):
        script = folder / ".venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).with_name(name)}" "$@"\n')
        script.chmod(0o755)
    (folder / ".venv" / ".installed").touch()  # newer than what it depends on, so that make installs nothing
    return folder


@pytest.mark.slow
def test_every_command_of_the_document_runs(checkout, tmp_path):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    assert len(BLOCKS) >= 8
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
    values = yaml.safe_load((ROOT / "k8s" / "helm" / "flyte-binary.yaml").read_text())
    limits = values["configuration"]["inline"]["task_resources"]["limits"]
    with (
        flyteadmin(limits) as (endpoint, admin),
        s3_server() as store,
        scripted_api({}, tmp_path / "kubeconfig"),
    ):
        environment = os.environ | OWN | {"AWS_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {"KUBECONFIG": str(tmp_path / "kubeconfig"), "PYTHONPATH": str(checkout)}
        environment |= {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"}
        for block in BLOCKS:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=checkout, env=environment, capture_output=True, text=True
            )
            if "preflight" in block:  # of an empty cluster: it says what is missing, each with its remedy
                assert "checks:" in done.stdout and "->" in done.stdout and done.returncode, done.stderr[-2000:]
                continue
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            if "flyte.example.yaml" in block:  # "Name your endpoint"
                config = checkout / "config" / "flyte.yaml"
                site = yaml.safe_load(config.read_text())
                site["admin"] = {"endpoint": f"dns:///{endpoint}", "insecure": True}
                config.write_text(yaml.safe_dump(site))
        assert {"workflows.reproduce.reproduce", "workflows.pretrain.pretrain"} <= admin.plans.keys()
        assert {"pretrain-nucleus_17b-8x8", "reproduce-tiny", "train-stage-8x8"} <= admin.plans.keys()
        assert {request.id.version for request in admin.plans.values()} >= {commit, f"{commit}-8x8"}
        planned, uploaded = admin.executions
    assert planned.spec.launch_plan.name == "pretrain-nucleus_17b-8x8"
    assert planned.spec.launch_plan.version == f"{commit}-8x8"
    changes = planned.inputs.literals["overrides"].scalar.union.value.collection.literals
    assert [c.scalar.primitive.string_value for c in changes] == ["curation.concurrency=32", "encoding.concurrency=16"]
    text = uploaded.inputs.literals["recipe"].scalar.primitive.string_value
    assert load_recipe(text).name == "mine"  # without the file


def test_commands_that_no_test_runs_are_marked_so():
    assert set(re.findall(r"^```(\S.*)$", TEXT, flags=re.MULTILINE)) == {"sh", "sh cluster"}
