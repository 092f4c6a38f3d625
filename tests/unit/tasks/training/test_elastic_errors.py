"""How the nodes of a training end: which errors Flyte retries, and that no node ends before the outputs exist."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
from flytekit import FlyteContextManager
from flytekit.core.base_task import IgnoreOutputs
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask
from object_store import s3_bucket
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tasks import elastic
from tasks.elastic import PreemptibleElastic, PreemptibleElasticTask


def nothing() -> None:
    """A task's function."""


@pytest.mark.parametrize(
    ("exitcode", "raised"),
    [
        (-signal.SIGABRT, FlyteRecoverableException),  # NCCL's watchdog: another node is gone
        (-signal.SIGKILL, FlyteRecoverableException),
        (1, FlyteUserRuntimeException),  # our own exception, which would be raised again
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


@pytest.mark.slow
@pytest.mark.parametrize("of_code", [None, 0, 1])
def test_a_workers_error_that_is_not_recoverable_decides_whichever_worker_torch_looks_at(of_code):
    """Both end between two checks of the agent. The peers of a failed worker lose it, which alone would be retried."""

    def work():
        rank = int(os.environ["RANK"])
        if rank == of_code:
            raise ValueError("no such tier")
        if of_code is not None:
            time.sleep(0.1)
        raise FlyteRecoverableException("connection closed by peer")

    task = PreemptibleElasticTask(PreemptibleElastic(nproc_per_node=2, start_method="fork", monitor_interval=1), work)
    if of_code is None:
        with pytest.raises(FlyteRecoverableException, match="connection closed"):
            task._execute()
    else:
        with pytest.raises(FlyteUserRuntimeException, match="no such tier"):
            task._execute()


def test_a_node_without_rank_0_waits_for_the_outputs(tmp_path, monkeypatch):
    """An elastic PyTorchJob is finished as soon as one of its pods is."""

    def execute(self, **_):
        raise IgnoreOutputs()

    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            (tmp_path / "outputs.pb").write_bytes(b"")

    monkeypatch.setattr(PytorchElasticFunctionTask, "_execute", execute)
    monkeypatch.setattr(elastic, "time", SimpleNamespace(sleep=sleep))
    task = PreemptibleElasticTask(PreemptibleElastic(nnodes=2, nproc_per_node=1), nothing)
    context = FlyteContextManager.current_context()
    parameters = context.user_space_params.builder()
    parameters.output_metadata_prefix = str(tmp_path)
    state = context.execution_state.with_params(user_space_params=parameters.build())
    with FlyteContextManager.with_context(context.with_execution_state(state)), pytest.raises(IgnoreOutputs):
        task._execute()
    assert len(looks) == 2


def test_the_dumps_of_the_flight_recorder_outlive_the_pod_of_a_failed_attempt(tmp_path, monkeypatch):
    def execute(self, **_):
        raise FlyteRecoverableException("a collective timed out")

    def store_fails(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(PytorchElasticFunctionTask, "_execute", execute)
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{tmp_path}/nccl_trace_rank_")
    for rank in range(2):
        (tmp_path / f"nccl_trace_rank_{rank}").write_bytes(b"collectives")
    task = PreemptibleElasticTask(PreemptibleElastic(nnodes=1, nproc_per_node=2), nothing)
    with s3_bucket("traces") as fs:
        monkeypatch.setenv("NUCLEUS_STORE", "s3://traces/store")
        with pytest.raises(FlyteRecoverableException, match="a collective timed out"):
            task._execute()
        kept = fs.find("traces/store/nccl")
        assert [path.rpartition("nccl_trace_")[2] for path in sorted(kept)] == ["rank_0", "rank_1"]
        assert fs.cat_file(kept[0]) == b"collectives"
        monkeypatch.setattr(elastic.storage, "upload", store_fails)
        with pytest.raises(FlyteRecoverableException, match="a collective timed out"):  # still the cause
            task._execute()
