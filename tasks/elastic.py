"""Runs several training processes on a node with torch elastic, and retries after a preempted or lost node.

pod: SIGTERM -> agent (the pod's process): SIGTERM -> its workers, which finish their step, save it with the other
ranks, and end, or are killed after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds -> agent: a recoverable error

the last step -> rank 0's node seals and uploads; the others wait for its outputs

a node is gone -> NCCL's watchdog aborts the workers of the others, which wait for it -> agents: a recoverable error

a worker's exception -> its error.json, and next to it a marker if the task calls it recoverable -> agent: recoverable,
unless some worker's was not; of the errors of several nodes, Flyte takes the earliest

See docs/decisions/flyte.md.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flytekit import FlyteContextManager
from flytekit.core.base_task import IgnoreOutputs
from flytekit.core.constants import OUTPUT_FILE_NAME
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import TaskPlugins
from flytekitplugins.kfpytorch import Elastic
from flytekitplugins.kfpytorch.error_handling import RECOVERABLE_ERROR_FILE_NAME
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask

from model import storage
from model.logs import get_logger
from tasks.store import store

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

logger = get_logger(__name__)

LOOK_EVERY_S = 10.0


class PreemptibleElastic(Elastic):
    """`Elastic`, for a task that requests a retry when its pod gets SIGTERM."""


class PreemptibleElasticTask(PytorchElasticFunctionTask):
    def _execute(self, **kwargs: Any) -> Any:
        try:
            return self._attempt(**kwargs)
        except FlyteRecoverableException:
            upload_traces()
            raise

    def _attempt(self, **kwargs: Any) -> Any:
        """Raises FlyteRecoverableException in two cases. The agent got a signal and its workers have ended: the plugin
        would then end normally, with neither outputs nor an error. Or a signal ended a worker (an abort, or the
        kernel's out-of-memory killer), which the plugin would treat as an error of the user's code.

        If one worker's exception makes the others fail, torch reports any of those that have ended when it polls, every
        `monitor_interval` seconds: the plugin may see a lost connection instead of its cause. A permanent error is
        never a consequence of another, so it decides, from any worker."""
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            return super()._execute(**kwargs)
        except FlyteRecoverableException as error:
            failed = error.__context__
            if not isinstance(failed, ChildFailedError) or not (
                errors := errors_of_code(failed.get_first_failure()[1])
            ):
                raise
            raise FlyteUserRuntimeException(RuntimeError(errors), timestamp=error.timestamp) from failed
        except FlyteUserRuntimeException as error:
            failed = error.value
            if not isinstance(failed, ChildFailedError) or failed.get_first_failure()[1].exitcode >= 0:
                raise
            message = f"{failed}: the next attempt goes on from the last checkpoint"
            raise FlyteRecoverableException(message, timestamp=error.timestamp) from failed
        except IgnoreOutputs as ignored:
            signalled = ignored.__context__
            if not isinstance(signalled, SignalException):  # another node's agent has rank 0 and its outputs
                wait_for_outputs()
                raise
            message = f"{signalled}: the next attempt goes on from the last checkpoint"
            raise FlyteRecoverableException(message) from signalled


def upload_traces() -> None:
    """Copies this node's dumps of NCCL's flight recorder to NUCLEUS_STORE/nccl/EXECUTION: the operator removes the pods of a
    failed attempt at once. An error of the store does not replace that of the attempt."""
    prefix = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "")
    dumps = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*")) if prefix else []
    if not dumps or not storage.is_remote(store()):
        return
    execution = FlyteContextManager.current_context().user_space_params.execution_id.name
    folder = storage.join(store(), "nccl", execution)
    try:
        for dump in dumps:
            storage.upload(dump, storage.join(folder, f"{socket.gethostname()}-{dump.name}"))
        logger.warning(f"{len(dumps)} dumps of NCCL's flight recorder are in {folder}")
    except Exception as error:
        logger.warning(f"no dump of NCCL's flight recorder could be copied to {folder}: {error}")


def errors_of_code(failure: ProcessFailure) -> str:
    """The permanent errors that workers of this attempt raised, as text; "" if there are none."""
    workers = Path(failure.error_file).parents[1]
    files = [path for path in workers.glob("*/error.json") if not (path.parent / RECOVERABLE_ERROR_FILE_NAME).exists()]
    return "\n".join(path.read_text() for path in sorted(files))


def wait_for_outputs() -> None:
    """Waits until another node has written the task's outputs. Kubeflow considers an elastic job finished as soon as
    one of its pods is: Flyte would look for outputs that do not exist yet, and remove the pod that uploads them."""
    context = FlyteContextManager.current_context()
    outputs = f"{context.user_space_params.output_metadata_prefix}/{OUTPUT_FILE_NAME}"
    while not context.file_access.exists(outputs):
        time.sleep(LOOK_EVERY_S)


TaskPlugins.register_pythontask_plugin(PreemptibleElastic, PreemptibleElasticTask)
