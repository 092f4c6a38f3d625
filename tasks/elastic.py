"""Several training processes on a node, as torch elastic starts them, where a preempted or lost node is retried.

pod: SIGTERM -> agent (the pod's process): SIGTERM -> its workers, which finish their step, save it with the other
ranks, and end, or are killed after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds -> agent: a recoverable error

the last step -> rank 0's node seals and uploads; the others wait for its outputs

a node is gone -> NCCL's watchdog aborts the workers of the others, which wait for it -> agents: a recoverable error

a worker's exception -> its error.json, and beside it a marker if the task calls it recoverable -> agent: recoverable,
unless some worker's was not; of the errors of several nodes, Flyte takes the earliest

See docs/decisions/flyte.md.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LOOK_EVERY_S = 10.0


class PreemptibleElastic(Elastic):
    """`Elastic`, of a task that asks for a retry when its pod gets SIGTERM."""


class PreemptibleElasticTask(PytorchElasticFunctionTask):
    def _execute(self, **kwargs: Any) -> Any:
        """Raises FlyteRecoverableException: the agent got a signal, and its workers have ended. The plugin ignores the
        outputs then, and ends as if all were well, with neither outputs nor an error. Or a signal ended a worker (an
        abort, or the kernel's for want of memory), which the plugin takes for an error of the user's code.

        Where one worker's exception makes the others lose it, torch reports any of those that it finds ended when it
        looks, every `monitor_interval` seconds: the plugin may see a lost connection, and not why. An error that is not
        recoverable follows from no other one, so that it decides, whichever worker has it."""
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


def errors_of_code(failure: ProcessFailure) -> str:
    """What the workers of this attempt raised that is not recoverable, or nothing."""
    workers = Path(failure.error_file).parents[1]
    files = [path for path in workers.glob("*/error.json") if not (path.parent / RECOVERABLE_ERROR_FILE_NAME).exists()]
    return "\n".join(path.read_text() for path in sorted(files))


def wait_for_outputs() -> None:
    """Until another node has written the task's outputs. Kubeflow takes an elastic job for finished as soon as one of its
    pods is: Flyte would look for outputs that are not there yet, and remove the pod that is uploading them."""
    context = FlyteContextManager.current_context()
    outputs = f"{context.user_space_params.output_metadata_prefix}/{OUTPUT_FILE_NAME}"
    while not context.file_access.exists(outputs):
        time.sleep(LOOK_EVERY_S)


TaskPlugins.register_pythontask_plugin(PreemptibleElastic, PreemptibleElasticTask)
