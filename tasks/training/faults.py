"""Distinguishes errors that end a training from faults of a machine or network, after which another attempt may
succeed."""

from __future__ import annotations

# Wrong input or a bug in the code. ValueErrors are ours, for users.
_PERMANENT = (
    ValueError, TypeError, AttributeError, LookupError, NameError, ImportError, AssertionError, NotImplementedError,
    ArithmeticError, MemoryError,
)  # fmt: skip


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt at the same work would end in the same error.

    True for wrong input and bugs, too little memory, disk space or access, a missing file, and a run that `LossGuard`
    ended. Other errors may be temporary: those of a CUDA device (ECC, Xid), cuBLAS, NCCL or gloo, often plain
    RuntimeErrors, an OSError, an object store that does not answer.
    """
    from torch import OutOfMemoryError
    from torch.distributed.checkpoint.api import CheckpointException

    from model.storage import may_pass
    from model.train.guard import Diverged

    if isinstance(error, CheckpointException):  # DCP's, with the error of each rank
        return any(is_permanent(failure) for failure, _ in error.failures.values())
    if isinstance(error, OSError):
        return not may_pass(error)
    return isinstance(error, (*_PERMANENT, OutOfMemoryError, Diverged))
