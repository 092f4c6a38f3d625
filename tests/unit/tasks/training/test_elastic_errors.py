"""Which ends of a training process make Flyte try again."""

from __future__ import annotations

import signal

import pytest
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tasks.training.elastic import PreemptibleElastic, PreemptibleElasticTask


def nothing() -> None:
    """A task's function."""


@pytest.mark.parametrize(
    ("exitcode", "raised"),
    [
        (-signal.SIGABRT, FlyteRecoverableException),  # NCCL's watchdog: another node is gone
        (-signal.SIGKILL, FlyteRecoverableException),
        (1, FlyteUserRuntimeException),  # an exception of ours: it would be raised again
    ],
)
def test_a_worker_that_a_signal_ended_is_started_again(tmp_path, monkeypatch, exitcode, raised):
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file=str(tmp_path / "none.json"))

    def execute(self, **_):
        raise FlyteUserRuntimeException(ChildFailedError("train", {1: failure}), timestamp=5.0)

    monkeypatch.setattr(PytorchElasticFunctionTask, "_execute", execute)
    task = PreemptibleElasticTask(PreemptibleElastic(nnodes=1, nproc_per_node=2), nothing)
    with pytest.raises(raised) as caught:
        task._execute()
    assert caught.value.timestamp == 5.0
