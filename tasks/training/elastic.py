"""Several training processes on a node, as torch elastic starts them, where a preempted or lost node is retried.

    pod: SIGTERM -> agent (the pod's process): SIGTERM -> its workers, which finish their step, save it with the other
    ranks, and end, or are killed after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds -> agent: a recoverable error

    the last step -> rank 0's node seals and uploads; the others wait for its outputs

    a node is gone -> NCCL's watchdog aborts the workers of the others, which wait for it -> agents: a recoverable error
"""

from __future__ import annotations

import time
from typing import Any

from flytekit import FlyteContextManager
from flytekit.core.base_task import IgnoreOutputs
from flytekit.core.constants import OUTPUT_FILE_NAME
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import TaskPlugins
from flytekitplugins.kfpytorch import Elastic
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask

LOOK_EVERY_S = 10.0


class PreemptibleElastic(Elastic):
    """`Elastic`, of a task that asks for a retry when its pod gets SIGTERM."""


class PreemptibleElasticTask(PytorchElasticFunctionTask):
    def _execute(self, **kwargs: Any) -> Any:
        """Raises FlyteRecoverableException: the agent got a signal, and its workers have ended. The plugin ignores the
        outputs then, and ends as if all were well, with neither outputs nor an error. Or a signal ended a worker (an
        abort, or the kernel's for want of memory), which the plugin takes for an error of the user's code."""
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            return super()._execute(**kwargs)
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


def wait_for_outputs() -> None:
    """Until another node has written the task's outputs. Kubeflow takes an elastic job for finished as soon as one of its
    pods is: Flyte would look for outputs that are not there yet, and remove the pod that is uploading them."""
    context = FlyteContextManager.current_context()
    outputs = f"{context.user_space_params.output_metadata_prefix}/{OUTPUT_FILE_NAME}"
    while not context.file_access.exists(outputs):
        time.sleep(LOOK_EVERY_S)


TaskPlugins.register_pythontask_plugin(PreemptibleElastic, PreemptibleElasticTask)
