"""Which errors of a training end it, and which are of a machine or a network: those are worth another attempt."""

from __future__ import annotations

# The run's input, or its code: ValueErrors are ours, for users.
_COMES_AGAIN = (
    ValueError, TypeError, AttributeError, LookupError, NameError, ImportError, AssertionError, NotImplementedError,
    ArithmeticError, MemoryError,
)  # fmt: skip


def comes_again(error: BaseException) -> bool:
    """Whether another attempt at the same work would end as this one did.

    So do wrong input and bugs, want of memory, of room or of access, a file that is not there, and a loss that the
    guard gave up on. Anything else may pass: what a CUDA device raises (ECC, Xid), cuBLAS, NCCL or gloo, whose errors
    are often plain RuntimeErrors, an OSError, an object store that does not answer.
    """
    from torch import OutOfMemoryError
    from torch.distributed.checkpoint.api import CheckpointException

    from model.storage import may_pass
    from model.train.guard import Diverged

    if isinstance(error, CheckpointException):  # DCP's, of what failed on each rank
        return any(comes_again(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return not may_pass(error)
    return isinstance(error, (*_COMES_AGAIN, OutOfMemoryError, Diverged))
