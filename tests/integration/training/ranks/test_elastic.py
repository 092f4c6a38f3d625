"""A pod of several training processes that is preempted, run by the entry point of Flyte's pods: the attempt that gets
SIGTERM, and its retry. Its processes are forks of this one, which has imported what they need."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from flyteidl.core import errors_pb2
from flytekit import FlyteContextManager
from flytekit.bin.entrypoint import execute_task_cmd
from flytekit.core.type_engine import TypeEngine
from flytekit.core.utils import write_proto_to_file
from flytekit.types.directory import FlyteDirectory
from test_robust import STEPS, Ranks, before_step, latents, report, same_weights, until_sigterm, whole  # noqa: F401
from train_helpers import train_config, training_stage, write_artifacts

from model.weights.checkpoints import finished_checkpoints
from tasks.manifest import seal

pytestmark = pytest.mark.slow
NAME = "tasks.training.task.train_stage"


def pod(folder: Path, out: Path) -> None:
    """`pyflyte-execute` of the training task on two processes; the inputs are in folder/inputs.pb."""
    os.environ |= {"NUCLEUS_HOME": str(folder / "home"), "NUCLEUS_TRAIN_NPROC": "2", "NUCLEUS_ACCELERATOR": "none"}
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        del sys.modules[name]  # else the task would have a single process
    from tasks.training.task import train_stage

    train_stage.task_config.start_method = "fork"  # spawned ones would import everything again
    train_stage.task_config.monitor_interval = 1
    command = ["--inputs", folder / "inputs.pb", "--output-prefix", out, "--raw-output-data-prefix", folder / "raw"]
    resolver = "flytekit.core.python_auto_container.default_task_resolver"
    command += ["--resolver", resolver, "--", "task-module", "tasks.training.task", "task-name", "train_stage"]
    execute_task_cmd.main([str(part) for part in command], standalone_mode=False)


@pytest.fixture
def folder(tmp_path, latents):  # noqa: F811
    """With the inputs of the task, as Flyte hands them to a pod."""
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "file").write_text("nothing is sampled")
    seal(tmp_path / "components", "components")
    values = {
        **{kind: FlyteDirectory(str(path), remote_directory=False) for kind, path in write_artifacts(tmp_path).items()},
        "components": FlyteDirectory(str(tmp_path / "components"), remote_directory=False),
        "stage": training_stage(train_config(steps=STEPS)),
    }
    context, kinds = FlyteContextManager.current_context(), {name: type(value) for name, value in values.items()}
    literals = TypeEngine.dict_to_literal_map(context, values, kinds)
    write_proto_to_file(literals.to_flyte_idl(), str(tmp_path / "inputs.pb"))
    return tmp_path


def test_a_preempted_pod_is_retried_and_resumes_from_the_step_that_both_ranks_saved(folder, whole):  # noqa: F811
    last = 8

    def preempted(_):
        before_step(last, until_sigterm(folder / "waiting"))
        pod(folder, folder / "first")

    first = Ranks(preempted)
    first.wait_for((folder / "waiting").exists)
    os.kill(first.processes[0].pid, signal.SIGTERM)  # the pod's process, as Kubernetes does
    assert first.codes() == {0}
    document = errors_pb2.ErrorDocument.FromString((folder / "first" / "error.pb").read_bytes())
    assert document.error.kind == errors_pb2.ContainerError.RECOVERABLE, document.error.message
    assert f"got signal: {signal.SIGTERM:d}" in document.error.message
    (run,) = (folder / "home" / "runs").iterdir()
    assert list(finished_checkpoints(run / "checkpoints")) == [5, last]

    assert Ranks(lambda _: pod(folder, folder / "second")).codes() == {0}
    assert not (folder / "second" / "error.pb").exists() and (folder / "second" / "outputs.pb").is_file()
    (artifact,) = (path for path in (folder / "home" / "artifacts" / "checkpoints").iterdir())
    assert report(artifact)["resumed_from_step"] == last and report(artifact)["ranks"] == 2
    assert same_weights(whole(2), artifact) == [10, 15, 18]
