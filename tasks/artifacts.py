"""The typed artifacts that pass between tasks: sealed directories whose cache key is their content.

In a local run an artifact stays under NUCLEUS_HOME (default: .nucleus in the working directory), named by its
digest; on a cluster Flyte uploads it. See docs/decisions/artifacts.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import rich_click as click
from flytekit import Deck, FlyteContextManager, HashMethod
from flytekit.core.context_manager import ExecutionState
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory

from model import storage
from tasks import envs
from tasks.lineage.parents_page import parents_page
from tasks.manifest import MANIFEST, Parent, as_parent, load_manifest, verify
from tasks.store import FETCHED_FROM, home, make_sealed


def _content_digest(directory: FlyteDirectory) -> str:
    uri = source(directory)
    if storage.is_remote(uri) and not (Path(directory.path) / MANIFEST).is_file():
        # Not downloaded: an artifact that a user names, or that a dynamic workflow passes on.
        digest = storage.sealed_digest(uri)
        if digest is None:
            raise ValueError(f"{uri} is not a sealed directory: it has no {MANIFEST}")
        return digest
    return load_manifest(str(directory.path)).digest


def _artifact() -> Any:
    return Annotated[FlyteDirectory, HashMethod(_content_digest)]


CorpusDir = _artifact()
RecordsDir = _artifact()
UrlsDir = _artifact()
ScoresDir = _artifact()
CaptionsDir = _artifact()
DecisionsDir = _artifact()
SelectionsDir = _artifact()
CuratedDir = _artifact()
ComponentsDir = _artifact()
TextsDir = _artifact()
LatentsDir = _artifact()
CheckpointsDir = _artifact()
MergedDir = _artifact()
PromptsDir = _artifact()
ImagesDir = _artifact()
AnswersDir = _artifact()
ScorecardDir = _artifact()
PipelineDir = _artifact()
StudyDir = _artifact()


# Kinds whose tasks have decks.
SHOWN = ("curated", "components", "texts", "latents", "checkpoints", "merged", "scorecard", "pipeline", "study")


class UserError(click.ClickException, ValueError):
    """A ValueError that `pyflyte run` prints as its message alone, without a traceback."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """In a local run, turns a ValueError (for users) or a full disk into one readable message; on a cluster it passes
    unchanged."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        if not is_local() or (isinstance(error, OSError) and error.errno != errno.ENOSPC):
            raise
        raise UserError(getattr(error, "strerror", None) or str(error)) from error


def work_path(name: str, step: str, config: Any, parents: Sequence[Path]) -> Path:
    """The directory of a long task's unfinished work: the same for the same inputs, in every attempt.

    The path depends on the cache version of `step` (see envs): newer code must not continue or return the work of older
    code. NUCLEUS_WORK sets storage that outlives a pod (a mounted volume); by default it is under `home`.
    """
    digests = [load_manifest(parent).digest for parent in parents]
    key = json.dumps([step, envs.CACHE_VERSIONS[step], config, digests], sort_keys=True)
    root = Path(os.environ.get("NUCLEUS_WORK") or home() / "runs")
    return root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def exclusive(work_dir: Path) -> Iterator[None]:
    """Makes `work_dir`, and keeps other runs of the same work out of it until the block ends.

    Two runs at once would overwrite each other's files. Of several processes that train together, the first takes the
    lock for all. The lock ends with its process.

    Raises:
        UserError: another run has the lock; on a cluster, where it is an earlier attempt that has not ended, an error
            that Flyte retries.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(work_dir, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # closing does not release it: forked children have it too
            busy = not os.path.samestat(os.fstat(lock), os.stat(work_dir))  # the other run is removing it
        except (BlockingIOError, FileNotFoundError):
            busy = True
        except OSError:  # a file system without locks, such as some NFS: continue without
            busy = False
        if busy:
            error = UserError if is_local() else FlyteRecoverableException
            raise error(f"another run does the same work in {work_dir}: stop it, or start again when it has ended")
        yield


def is_local() -> bool:
    state = FlyteContextManager.current_context().execution_state
    return state is None or state.mode != ExecutionState.Mode.TASK_EXECUTION


def source(directory: FlyteDirectory) -> str:
    """The location of an artifact: a URI, or a local path."""
    return str(directory.remote_source or directory.path)


def fetch(directory: FlyteDirectory, kind: str, without: tuple[str, ...] = ()) -> Path:
    """Downloads a remote artifact, checks its kind, and verifies every file, except those that match `without`
    (storage.is_left_out): these stay at its `source`, and `store.fetch_file` gets them one by one. Parts of an index
    are not fetched (`fetch_part`).

    Runs once for all training processes of a pod: Flyte makes them download to the same folder, where one would
    overwrite files that another is reading. Each launch and each restart of a launch verifies again.

    Raises:
        UserError: the artifact is of another kind, or was changed.
    """
    path = once_per_pod(f"{directory.path} {without}", lambda: _fetch(directory, kind, without))
    if directory.remote_source:
        FETCHED_FROM[path] = str(directory.remote_source)
    return path


def _as_parent(parent: Path | Parent) -> Parent:
    named = parent if isinstance(parent, Parent) else as_parent(parent)
    uri = None if isinstance(parent, Parent) else FETCHED_FROM.get(parent)
    return named if uri is None else named.model_copy(update={"uri": uri})


def once_per_pod(name: str, work: Callable[[], Path]) -> Path:
    """The path that `work()` returns, called by one of the training processes of this pod; the others wait for it."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return work()
    attempt = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1]  # new at each launch, emptied at each restart
    with open(attempt / hashlib.sha256(name.encode()).hexdigest()[:16], "a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        done.seek(0)
        if not (path := done.read()):
            path = str(work())
            done.write(path)
    return Path(path)


def _fetch(directory: FlyteDirectory, kind: str, without: tuple[str, ...]) -> Path:
    if without and directory.remote_source:
        storage.copy_folder(directory.remote_source, Path(directory.path), without)
    else:
        directory.download()
    path = Path(directory.path)
    with plain_errors():
        verify(path, without, kind=kind)
    return path


def produce(
    kind: str,
    make: Callable[[Path], Any],
    parents: Sequence[Path | Parent] = (),
    config: Any = None,
    counts: Callable[[Any], dict[str, int]] | None = None,
    logs: Sequence[str] = (),
) -> tuple[FlyteDirectory, Path, Any]:
    """Runs `make(out_dir)` and seals the directory atomically (`store.make_sealed`).

    Returns:
        the artifact for Flyte, its local path, and the result of `make`.

    Raises:
        UserError: the disk is full. Also errors of `make`. No partial directory remains.
    """
    with plain_errors():
        final, _, report = make_sealed(kind, make, [_as_parent(p) for p in parents], config, counts, logs)
    if kind in SHOWN:
        Deck("Made from", parents_page(final))
    # remote_directory=False: a local run reads the artifact where it is.
    artifact = FlyteDirectory(str(final), remote_directory=False) if is_local() else FlyteDirectory(str(final))
    return artifact, final, report
