"""`pyflyte run --remote`: inputs that a pod cannot read are refused or sent as text, and missing settings are filled
in."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import rich_click as click
import yaml
from flyteadmin import flyteadmin

from containers.lock import ROLES
from tasks.profiles import SETTINGS
from tasks.recipe import load_recipe
from workflows import remote_run

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "sha256:" + "cd" * 32
RUN = ["run", "--remote", "workflows/reproduce.py", "reproduce"]
LIMITS = {"cpu": "1000", "memory": "10Ti", "gpu": "8", "ephemeralStorage": "10Ti"}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A folder with a lock of images, without the machine's Flyte configuration and settings."""
    images = [f"NUCLEUS_IMAGE_{role.upper()}" for role in ROLES]
    for name in (*SETTINGS, *images, "NUCLEUS_TRAIN_NNODES", "NUCLEUS_TRAIN_NPROC", "FLYTECTL_CONFIG", "UCTL_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is put back where `prepare` sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    lock = tmp_path / "images.lock.json"
    images = {role: {"image": f"registry.example/nucleus-{role}", "digest": DIGEST} for role in ROLES}
    lock.write_text(json.dumps({"images": images}))
    monkeypatch.setattr(remote_run, "LOCK", lock)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {ROOT}/recipes/smoke.yaml\nname: mine\neval: {{guidance_scale: 2.5}}\n")
    return path


def value(args: list[str], option: str) -> str:
    assert args.count(option) == 1, args
    return args[args.index(option) + 1]


@pytest.mark.parametrize("words", [["--recipe", "{}"], ["--recipe={}"]])
def test_a_recipe_file_travels_as_its_text_with_its_bases(recipe, words):
    args = remote_run.prepare([*RUN, *(word.format(recipe) for word in words)])
    text = value(args, "--recipe")
    recipe.unlink()  # as in a pod
    assert load_recipe(text).name == "mine" and load_recipe(text).eval.guidance_scale == 2.5
    assert load_recipe(text).train == load_recipe("smoke").train and str(recipe.parent) not in " ".join(args)


@pytest.mark.parametrize("command", ["remote-launchplan", "remote-workflow"])
def test_a_recipe_file_travels_as_its_text_to_registered_workflows_too(recipe, command):
    args = remote_run.prepare(["run", command, "train", "--recipe", str(recipe)])
    assert load_recipe(value(args, "--recipe")).name == "mine" and "--image" not in args


def test_a_recipe_named_in_an_inputs_file_travels_as_its_text(recipe, tmp_path):
    inputs = tmp_path / "inputs.yaml"
    inputs.write_text(yaml.safe_dump({"recipe": str(recipe), "source": "s3://bucket/images/"}))
    args = remote_run.prepare([*RUN, "--inputs-file", str(inputs)])
    assert load_recipe(value(args, "--recipe")).name == "mine"


def test_a_local_run_keeps_its_arguments(recipe):
    args = ["run", "workflows/reproduce.py", "reproduce", "--recipe", str(recipe), "--source", "my_images/"]
    assert remote_run.prepare(args) == args


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "my_images/"], "is a path of your machine"),
        (["--recipe", "absent.yaml"], "is not a file"),
        (["--recipe", "tinny"], "did you mean 'tiny'"),
        (["--recipe", "smoke", "--overrides", "eval.sed=1"], "eval.sed: unknown key"),
        (["--recipe", "smoke", "--overrides", '["source.path=my_images"]'], "is a path of your machine"),
        (["--recipe", "nucleus_17b"], "is a placeholder"),
    ],
)
def test_what_no_pod_could_run_is_refused(words, message):
    with pytest.raises(click.UsageError, match=message):
        remote_run.prepare([*RUN, *words])


def test_a_source_is_refused_for_a_launch_plan_too():
    with pytest.raises(click.UsageError, match="is a path of your machine"):
        remote_run.prepare(["run", "remote-launchplan", "reproduce-tiny", "--source=my_images/"])


def test_images_code_shape_and_the_sites_settings_are_filled_in(tmp_path, monkeypatch):
    config = tmp_path / "flyte.yaml"
    section = {"project": "nucleus", "domain": "production", "profile": "h200", "queue": "training"}
    config.write_text(yaml.safe_dump({"admin": {"endpoint": "dns:///x"}, "nucleus": section}))
    words = ["--recipe", "nucleus_17b", "--source", "s3://bucket/images/"]
    args = remote_run.prepare(["--config", str(config), "run", "--remote", "workflows/pretrain.py", "pretrain", *words])
    assert args[:3] == ["--config", str(config), "run"]
    assert (value(args, "--project"), value(args, "--domain")) == ("nucleus", "production")
    given = {args[i + 1] for i, word in enumerate(args) if word == "--image"}
    assert given == {f"{role}=registry.example/nucleus-{role}@{DIGEST}" for role in ROLES}
    assert value(args, "--copy") == "all" and value(args, "--destination-dir").startswith("/scratch/")
    asked = ("NUCLEUS_PROFILE", "NUCLEUS_QUEUE", "NUCLEUS_TRAIN_NNODES", "NUCLEUS_TRAIN_NPROC")
    assert [os.environ[name] for name in asked] == ["h200", "training", "8", "8"]


def test_what_is_given_is_kept(monkeypatch):
    monkeypatch.setenv("NUCLEUS_TRAIN_NNODES", "16")
    args = remote_run.prepare(
        ["run", "--copy", "auto", "--image", "a=b:c", "--destination-dir", "/x", *RUN[1:], "--recipe", "smoke"]
    )
    assert value(args, "--copy") == "auto" and value(args, "--image") == "a=b:c"
    assert value(args, "--destination-dir") == "/x" and os.environ["NUCLEUS_TRAIN_NNODES"] == "16"


def test_without_images_it_says_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_run, "LOCK", tmp_path / "absent.json")
    with pytest.raises(click.UsageError, match="make images REGISTRY"):
        remote_run.prepare([*RUN, "--recipe", "smoke"])


def pyflyte(endpoint: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    config = folder / "flyte.yaml"
    section = {"project": "nucleus", "domain": "production", "profile": "h100"}
    config.write_text(
        yaml.safe_dump({"admin": {"endpoint": f"dns:///{endpoint}", "insecure": True}, "nucleus": section})
    )
    command = [str(Path(sys.executable).with_name("pyflyte")), "--config", str(config), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_local_source_is_refused_within_seconds_and_nothing_is_sent(tmp_path):
    with flyteadmin(LIMITS) as (endpoint, admin):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = pyflyte(endpoint, tmp_path, *RUN, "--recipe", "smoke", "--source", "my_images/")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "is a path of your machine" in done.stdout + done.stderr
    assert not (admin.uploads or admin.tasks or admin.executions)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3  # of CPU, so that a busy machine does not matter


@pytest.mark.slow
def test_a_recipe_file_and_repeated_overrides_reach_the_cluster(recipe, tmp_path):
    images = [word for role in ROLES for word in ("--image", f"{role}=registry.example/nucleus-{role}@{DIGEST}")]
    words = ["--recipe", str(recipe), "--overrides", "eval.seeds=[3]", "--overrides", "merge.last_n=1"]
    with flyteadmin(LIMITS) as (endpoint, admin):
        done = pyflyte(endpoint, tmp_path, "run", "--remote", *images, *RUN[2:], *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (execution,) = admin.executions
    inputs = execution.inputs.literals
    assert load_recipe(inputs["recipe"].scalar.primitive.string_value).name == "mine"
    changes = inputs["overrides"].scalar.union.value.collection.literals
    assert [change.scalar.primitive.string_value for change in changes] == ["eval.seeds=[3]", "merge.last_n=1"]
    (code,) = admin.uploads.values()
    with tarfile.open(fileobj=io.BytesIO(code)) as tar:  # recipes, and modules that are imported when a task runs
        assert {"recipes/smoke.yaml", "recipes/ablations/token_choice.yaml", "model/train/run.py"} <= set(
            tar.getnames()
        )
    args = admin.tasks["tasks.planning.task.resolve_recipe"].spec.template.container.args
    assert args[0] == "pyflyte-fast-execute" and "/scratch/code" in args
    assert admin.tasks["tasks.planning.task.resolve_recipe"].spec.template.container.image.endswith(DIGEST)
