"""The training task around a stage: a retry after SIGTERM, pruning after the seal, one artifact for all ranks."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from botocore.exceptions import EndpointConnectionError
from flytekit.exceptions.system import FlyteDownloadDataException
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from model.data.files import TextMeta
from model.stages import training_stages
from model.train.guard import Diverged
from model.train.preemption import Preempted
from tasks.artifacts import UserError, fetch, home
from tasks.manifest import load_manifest, seal
from tasks.recipe import load_recipe
from tasks.training import plots, samples, task


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Calls the task's function on sealed inputs, with `run.train_stage` replaced, and records what is pruned."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RANK", raising=False)
    run = ModuleType("model.train.run")
    run.pruned, run.LOGS = [], ()
    run.prune_run = lambda train, work_dir: run.pruned.append(work_dir)
    monkeypatch.setitem(sys.modules, "model.train.run", run)
    monkeypatch.setattr("tasks.encoding.open_latents.open_latents", lambda *_: tmp_path / "latents")
    monkeypatch.setattr("tasks.encoding.open_latents.text_settings", lambda _: TextMeta(text_dim=1))
    monkeypatch.setattr(samples, "sampler", lambda *_: None)
    monkeypatch.setattr(plots, "training_html", lambda _: "")
    inputs = {}
    for kind in ("latents", "texts", "components"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "file").write_text(kind)
        seal(tmp_path / kind, kind)
        inputs[kind] = FlyteDirectory(str(tmp_path / kind))

    def call(train_stage, *overrides, init=None):
        run.train_stage = train_stage
        recipe = load_recipe("smoke", overrides)
        config = training_stages(recipe.model, recipe.train)[0]
        return task.train_stage.task_function(stage=config, init=init, **inputs), run.pruned

    return call


def test_sigterm_is_an_error_that_flyte_retries(stage):
    def preempted(*_, **__):
        raise Preempted("SIGTERM after step 7")

    with pytest.raises(FlyteRecoverableException, match="SIGTERM after step 7"):
        stage(preempted)
    assert not list((home() / "artifacts" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (lambda: DistError("NCCL error: remote process exited"), False),
        (lambda: RuntimeError("CUDA error: uncorrectable ECC error encountered"), False),
        (lambda: torch.AcceleratorError("CUDA error: unspecified launch failure"), False),
        (lambda: OSError(errno.EIO, "Input/output error"), False),
        (lambda: TimeoutError("read timed out"), False),
        (lambda: EndpointConnectionError(endpoint_url="http://store"), False),
        (lambda: FlyteDownloadDataException("s3://bucket/latents: connection reset"), False),
        (lambda: CheckpointException("write", {1: (ConnectionResetError("reset by peer"), None)}), False),
        (lambda: CheckpointException("write", {0: (RuntimeError("?"), None), 1: (KeyError("name"), None)}), True),
        (lambda: UserError("train.init_from: no such repository"), True),
        (lambda: ValueError("the latents need model.in_channels=16"), True),
        (lambda: TypeError("a bug"), True),
        (lambda: FileNotFoundError(errno.ENOENT, "No such file", "weights"), True),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), True),
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), True),
        (lambda: Diverged("3 of the last 10 steps were skipped"), True),
    ],
    ids=lambda value: type(value()).__name__ if callable(value) else None,
)
def test_faults_of_machines_and_networks_are_retried_and_permanent_errors_are_not(stage, error, again):
    def fails(*_, **__):
        raise error()

    with pytest.raises(Exception) as caught:
        stage(fails)
    assert isinstance(caught.value, FlyteRecoverableException) != again, caught.value


def test_a_stage_keeps_its_directory_if_only_layout_or_speed_settings_change(stage):
    places = []

    def place(*overrides):
        def note(*_, work_dir, **__):
            places.append(work_dir)
            raise Preempted("enough")

        with pytest.raises(FlyteRecoverableException):
            stage(note, *overrides)
        return places[-1]

    first = place()
    for change in ("nproc_per_node=2", "nnodes=2", "local_batch_size=1", "compile=true", "num_workers=2"):
        assert place(f"train.{change}") == first, change
    assert place("train.log_every_steps=3", "train.checkpoint_uri=s3://bucket/runs") == first
    for change in ("optim.muon_lr=0.123", "seed=5", "sample_every_steps=3", "stages[0].steps=77", "dtype=bfloat16"):
        assert place(f"train.{change}") != first, change


def test_a_run_is_pruned_once_its_artifact_is_sealed(stage):
    def finished(*_, work_dir, out_dir, **__):
        (out_dir / "report.json").write_text(json.dumps({"steps": 1}))

    artifact, pruned = stage(finished)
    assert load_manifest(artifact.path).kind == "checkpoints" and len(pruned) == 1


@pytest.mark.parametrize("carried", [True, False])
def test_a_stage_stores_its_optimiser_state_if_the_recipe_carries_it(stage, carried):
    seen = []

    def finished(_, stage, *, out_dir, **__):
        seen.append(stage.hand_on_optimizer)
        (out_dir / "report.json").write_text("{}")

    stage(finished, f"train.carry_optimizer={str(carried).lower()}")
    assert seen == [carried]


def test_a_second_run_of_the_same_stage_is_refused_while_other_ranks_of_the_first_join_it(stage, monkeypatch):
    joined = []

    def training(*_, work_dir, out_dir, **__):
        with pytest.raises(UserError, match="another run does the same work"):
            stage(training)
        monkeypatch.setenv("RANK", "1")
        stage(lambda *_, **options: joined.append(options["work_dir"]))
        assert joined == [work_dir]
        (out_dir / "report.json").write_text(json.dumps({"steps": 1}))

    assert len(stage(training)[1]) == 1


def test_a_run_that_could_not_be_sealed_is_not_pruned(stage):
    pruned = None

    def nothing(*_, **__):
        nonlocal pruned
        pruned = sys.modules["model.train.run"].pruned

    with pytest.raises(ValueError, match="holds no file to seal"):
        stage(nothing)
    assert pruned == []


def test_other_ranks_train_and_seal_nothing(stage, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    calls = []
    _, pruned = stage(lambda *_, **options: calls.append(options["out_dir"]))
    assert len(calls) == 1 and pruned == [] and not (home() / "artifacts").exists()


def test_a_stage_fetches_the_last_checkpoint_and_the_optimiser_of_the_one_before_and_no_others(tmp_path):
    trained = tmp_path / "trained"
    for name in ("step-00000010/a", "step-00000100/a", "step-00000100/b", "optimizer/step-00000100/a", "report.json"):
        (trained / name).parent.mkdir(parents=True, exist_ok=True)
        (trained / name).write_text(name)
    seal(trained, "checkpoints")
    assert task.earlier_checkpoints(FlyteDirectory(str(trained))) == ("step-00000010/a",)
    shutil.rmtree(trained / "step-00000010")
    artifact = FlyteDirectory(str(trained))
    with pytest.raises(UserError, match="lacks step-00000010/a"):
        fetch(artifact, "checkpoints")
    assert fetch(artifact, "checkpoints", without=task.earlier_checkpoints(artifact)) == trained


def test_the_training_task_fetches_only_the_last_checkpoint(stage, tmp_path):
    seen = []

    def trained(*_, init_from, out_dir, **__):
        seen.append(init_from)
        (out_dir / "step-00000004").mkdir()
        (out_dir / "step-00000004" / "a").write_text("a")

    before = tmp_path / "before"
    for step in (4, 8):
        (before / f"step-{step:08d}").mkdir(parents=True)
        (before / f"step-{step:08d}" / "a").write_text(str(step))
    seal(before, "checkpoints")
    shutil.rmtree(before / "step-00000004")
    stage(trained, init=FlyteDirectory(str(before)))
    assert seen == [before]
