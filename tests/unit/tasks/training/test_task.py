"""What the training task does around a stage: a retry after SIGTERM, pruning after the seal, one artifact for all ranks."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory

from model.train.preemption import Preempted
from tasks.artifacts import UserError, home
from tasks.manifest import load_manifest, seal
from tasks.planning.sections import train_stage as section
from tasks.recipe import load_recipe
from tasks.training import figures, samples, task


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Calls the task's function on sealed inputs, with the run of `run.train_stage` and a note of what is pruned."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RANK", raising=False)
    run = ModuleType("model.train.run")
    run.pruned = []
    run.prune_run = lambda train, work_dir: run.pruned.append(work_dir)
    monkeypatch.setitem(sys.modules, "model.train.run", run)
    monkeypatch.setattr(samples, "sampler", lambda *_: None)
    monkeypatch.setattr(figures, "training_html", lambda _: "")
    inputs = {}
    for kind in ("latents", "components"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "file").write_text(kind)
        seal(tmp_path / kind, kind)
        inputs[kind] = FlyteDirectory(str(tmp_path / kind))
    config = section(load_recipe("smoke"), 0)

    def call(train_stage):
        run.train_stage = train_stage
        return task.train_stage.task_function(stage=config, **inputs), run.pruned

    return call


def test_sigterm_is_an_error_that_flyte_retries(stage):
    def preempted(*_, **__):
        raise Preempted("SIGTERM after step 7")

    with pytest.raises(FlyteRecoverableException, match="SIGTERM after step 7"):
        stage(preempted)
    assert not [path for path in (home() / "artifacts" / "checkpoints").iterdir()]


def test_a_run_is_pruned_once_its_artifact_is_sealed(stage):
    def finished(*_, work_dir, out_dir, **__):
        (out_dir / "report.json").write_text(json.dumps({"steps": 1}))

    artifact, pruned = stage(finished)
    assert load_manifest(artifact.path).kind == "checkpoints" and len(pruned) == 1


def test_a_second_run_of_the_same_stage_is_refused_while_other_ranks_of_the_first_join_it(stage, monkeypatch):
    joined = []

    def training(*_, work_dir, out_dir, **__):
        with pytest.raises(UserError, match="another run is at the same work"):
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
