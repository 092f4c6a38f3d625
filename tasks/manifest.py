"""Sealed directories: the artifacts that pass from task to task.

A pass writes into a temporary directory next to its final name (`writing`). `seal` records the digests of its files, of
its parents and of its configuration in manifest.json. The rename at the end of `writing` makes the directory visible
atomically. `verify` refuses a missing, added or changed file.

An artifact's digest covers its content, its parents' digests and its configuration. Logs, timings, locations and the
producer are recorded and checksummed, but not part of the digest: the same work done twice gives the same digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from eval.files import file_sha256
from model import storage
from model.storage import MANIFEST as MANIFEST
from model.storage import replacing

SCHEMA_VERSION = 2
WRITING = ".writing-"
FOLDER_ONLY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW  # opening a pipe would block
KINDS = (
    "urls",  # ranges of tables of URLs
    "records",  # one shard of made or downloaded images and captions, as a tar
    "corpus",  # table of shards; their bytes stay in place
    "measured",  # one shard's columns of passes 1 and 2, and its thumbnails
    "columns",  # one shard's columns of one scorer
    "scores",  # one shard's columns, including those of all scorers
    "captions",  # one shard's scores with the captions that a model wrote, or the index of all
    "decisions",  # the fate of each record of one corpus, with the reason
    "selections",  # one shard's kept records: tier, bucket, captions, split
    "curated",  # index of selections, and the ledger
    "components",  # frozen VAE, text encoder, processor
    "texts",  # caption embeddings: one shard's, or the index of all
    "latents",  # one stage's latents: one shard's, or the index of all
    "checkpoints",  # one stage's last checkpoints
    "merged",  # one transformer, diffusers layout
    "prompts",  # prompts of a benchmark, with the real images of held-out captions
    "images",  # generated images
    "answers",  # answers of judges about generated images
    "scorecard",  # scores, error bars, grid
    "pipeline",  # the published diffusers directory
    "study",  # paired comparison of several recipes
)


def visible(text: str) -> str:
    """The text with control and unprintable characters escaped, so that a name in a message cannot control the
    terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


class Parent(BaseModel):
    """A sealed directory from which this one was made: its kind, its digest, and its path or URI at that time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")  # it is printed in cards and terminals
    uri: str


class Manifest(BaseModel):
    """The seal of a directory.

    `digest` covers kind, files, parents' digests, config and counts. `checksum` covers the whole manifest, so that a
    changed location or `made_by` is detected too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    kind: str
    files: dict[str, str]  # path inside the directory -> SHA-256
    logs: dict[str, str] = {}  # the same for logs, timings, locations: checksummed, not part of the digest
    parents: tuple[Parent, ...]
    config: dict[str, Any]
    counts: dict[str, int]
    made_by: dict[str, str]  # code_version, image, execution, task, attempt, git_revision, if known
    digest: str
    checksum: str


def code_version() -> str:
    """The installed version, with NUCLEUS_CODE_VERSION (a commit, set in the container) if it is set."""
    try:
        base = version("nucleus-flyte")
    except PackageNotFoundError:
        base = "0+unknown"
    commit = os.environ.get("NUCLEUS_CODE_VERSION", "")
    return f"{base}+{commit}" if commit else base


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)


def made_by() -> dict[str, str]:
    """The running code version, and on a cluster the image, the Flyte execution, the task and its attempt."""
    environment = os.environ.get
    execution = [environment(f"FLYTE_INTERNAL_EXECUTION_{name}", "") for name in ("PROJECT", "DOMAIN", "ID")]
    known = {
        "code_version": code_version(),
        "git_revision": environment("NUCLEUS_GIT_REVISION", ""),
        "image": environment("NUCLEUS_IMAGE") or environment("FLYTE_INTERNAL_IMAGE", ""),
        "execution": "/".join(execution) if execution[-1] else "",
        "task": environment("FLYTE_INTERNAL_TASK_NAME", ""),
        "attempt": environment("FLYTE_ATTEMPT_NUMBER", ""),
    }
    return {name: value for name, value in known.items() if value}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(fields: dict[str, Any]) -> str:
    """Digest of the content, so that the same bytes made twice are the same artifact."""
    keep = {k: fields[k] for k in ("schema_version", "kind", "files", "config", "counts")}
    keep["parents"] = sorted((p["kind"], p["digest"]) for p in fields["parents"])
    return _hash(keep)


def _checksum(fields: dict[str, Any]) -> str:
    return _hash({name: value for name, value in fields.items() if name != "checksum"})


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a sealed directory, without checking its files.

    Raises:
        ValueError: there is no manifest, or it is not a manifest of this project.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} is not a sealed directory: it has no {MANIFEST}")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(content: bytes, where: str | os.PathLike[str]) -> Manifest:
    """The manifest in the content of a manifest.json; `where` is for messages.

    Raises:
        ValueError: it is not a manifest of this project.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValueError as error:
        raise ValueError(f"{where} is not a manifest of schema {SCHEMA_VERSION}: {error}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"{where} has schema {manifest.schema_version}; this version reads schema {SCHEMA_VERSION}")
    return manifest


def seal(
    directory: str | os.PathLike[str],
    kind: str,
    parents: Sequence[str | os.PathLike[str] | Parent] = (),
    config: BaseModel | dict[str, Any] | None = None,
    counts: dict[str, int] | None = None,
    logs: Sequence[str] = (),
) -> Manifest:
    """Writes manifest.json over the files of `directory`, fsyncs them all, and returns it.

    Args:
        directory: the finished directory; afterwards no file in it may change.
        kind: one of `KINDS`.
        parents: sealed directories from which this one was made (their manifests are read, not verified again), or
            `Parent`s if they are not on this machine.
        config: the settings that determine the content, as a recipe section or a JSON-able dict.
        counts: whole numbers to show in lineage, such as {"records": 100}.
        logs: patterns (fnmatch on the path inside the directory) of files that are checksummed but not part of the
            digest, such as "logs/*" or "metrics.jsonl".

    Raises:
        ValueError: unknown kind, nothing to seal, or a parent without a seal.
    """
    directory = Path(directory)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    files = _files(directory)
    if not files:
        raise ValueError(f"{directory} holds no file to seal")
    _refuse_links(directory)
    hashed = {p.relative_to(directory).as_posix(): file_sha256(p) for p in files}
    outside = {name for name in hashed if any(fnmatch.fnmatchcase(name, pattern) for pattern in logs)}
    if len(outside) == len(hashed):
        raise ValueError(f"{directory} holds nothing but logs ({', '.join(sorted(outside))})")
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "files": {name: digest for name, digest in hashed.items() if name not in outside},
        "logs": {name: digest for name, digest in hashed.items() if name in outside},
        "parents": [parent if isinstance(parent, Parent) else as_parent(parent) for parent in parents],
        "config": config.model_dump(mode="json") if isinstance(config, BaseModel) else (config or {}),
        "counts": counts or {},
        "made_by": made_by(),
    }
    # Through JSON and back first: the digest must be that of the parsed manifest.json (a key 1 is read as "1", a count
    # of 100.0 as 100).
    draft = json.loads(Manifest(digest="", checksum="", **fields).model_dump_json())
    draft["digest"] = _digest(draft)
    manifest = Manifest.model_validate({**draft, "checksum": _checksum(draft)})
    for path in files:
        _fsync(path)
    for path in {parent for file in files for parent in file.relative_to(directory).parents}:
        _fsync(directory / path)
    with replacing(directory / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1))
        _fsync(temporary)
    _fsync(directory)
    return manifest


PUBLIC = ("code_version", "git_revision")  # of made_by


def public_manifest(manifest: Manifest) -> Manifest:
    """The manifest for publication: without paths, buckets, user names, images and executions, with the same digest."""
    parents = tuple(parent.model_copy(update={"uri": ""}) for parent in manifest.parents)
    made_by = {name: value for name, value in manifest.made_by.items() if name in PUBLIC}
    public = manifest.model_copy(update={"parents": parents, "made_by": made_by})
    return public.model_copy(update={"checksum": _checksum(public.model_dump(mode="json"))})


def as_parent(directory: str | os.PathLike[str]) -> Parent:
    """A sealed directory as an entry of its children's parents.

    Raises:
        ValueError: see `load_manifest`.
    """
    manifest = load_manifest(directory)
    return Parent(kind=manifest.kind, digest=manifest.digest, uri=str(Path(directory).resolve()))


def verify(
    directory: str | os.PathLike[str], without: tuple[str, ...] = (), kind: str | None = None, digest: str | None = None
) -> Manifest:
    """Reads every file of a sealed directory and compares it with the manifest.

    Args:
        without: files that are not read and may be absent: endings of names, or folders (storage.is_left_out).
        kind: the required kind.
        digest: the required digest: an attacker who can write the directory can also reseal it.

    Raises:
        ValueError: names the first file that is missing, added or changed, or the manifest itself.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    check_covers(manifest, directory, kind, digest)
    _refuse_links(directory)
    hashes = manifest.files | manifest.logs
    listed, present = (
        {name for name in names if not storage.is_left_out(name, without)}
        for names in (hashes, [p.relative_to(directory).as_posix() for p in _files(directory)])
    )
    for name in sorted(listed - present):
        raise ValueError(f"{directory} lacks {name}, which its manifest lists")
    for name in sorted(present - listed):
        raise ValueError(f"{directory} holds {name}, which its manifest does not list")
    for name in sorted(listed):
        if file_sha256(directory / name) != hashes[name]:
            raise ValueError(f"{directory / name} was changed: its SHA-256 is not the manifest's {hashes[name]}")
    return manifest


def check_covers(manifest: Manifest, where: str | os.PathLike[str], kind: str | None, digest: str | None) -> None:
    """Checks that a manifest is consistent and has the required kind and digest.

    Raises:
        ValueError: it was changed, or has another kind or digest.
    """
    fields = manifest.model_dump(mode="json")
    if _digest(fields) != manifest.digest or _checksum(fields) != manifest.checksum:
        raise ValueError(f"{where}/{MANIFEST} was changed: its digest does not cover its content")
    if kind is not None and manifest.kind != kind:
        raise ValueError(f"{where} is an artifact of kind {manifest.kind!r}; {kind!r} is needed")
    if digest is not None and manifest.digest != digest:
        raise ValueError(f"{where} has the digest {manifest.digest}; {digest} was expected")


@contextlib.contextmanager
def writing(final: str | os.PathLike[str], by_digest: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `final` when the block ends, and is removed if it raises.

    The block seals it. An older `final` is replaced. With `by_digest`, `final` is a folder and the directory becomes
    `final/DIGEST` (see `sealed_path`); existing equal content is kept. Leftovers of killed attempts are removed first,
    but not those of running attempts (each locks its own). A crash at any moment leaves `final` complete, old or new,
    or absent between two renames; never partial.

    Raises:
        OSError: the disk is full (ENOSPC); the message has the path. Also errors of the block.
    """
    final = Path(final)
    folder = final if by_digest else final.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WRITING}{uuid.uuid4().hex}"
    with _locked(folder):  # so that no other attempt cleans up between mkdir and lock
        for stale in folder.glob(f"{WRITING}*"):
            _remove_unlocked(stale)
        temporary.mkdir()
        lock = _lock(temporary)
    try:
        yield temporary
        assert (temporary / MANIFEST).is_file(), f"{final} would become visible without a seal"
        digest = load_manifest(temporary).digest
        if by_digest:
            final = sealed_path(folder, digest)
        with _locked(folder):  # else another attempt's equal content may appear between the check and the rename
            if by_digest:
                # Absent, damaged, different, or with other logs (such as locations): the new directory replaces it.
                with contextlib.suppress(ValueError):
                    if verify(final, digest=digest).logs == load_manifest(temporary).logs:
                        return
            while True:
                try:
                    os.replace(temporary, final)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                # Renamed before it is deleted: a directory that is deleted in place is partial meanwhile.
                aside = folder / f"{WRITING}{uuid.uuid4().hex}"
                os.replace(final, aside)
                shutil.rmtree(aside, ignore_errors=True)
            _fsync(folder)
    except Exception as error:
        # Libraries raise their own types for it (safetensors, Arrow), so the text is compared.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise OSError(
                errno.ENOSPC, f"No space left on device while writing {final}; nothing half-written was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sealed_path(folder: str | os.PathLike[str], digest: str) -> Path:
    """The path to which `writing(folder, by_digest=True)` moves the directory of that digest."""
    return Path(folder) / digest


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, such as some NFS: continue without
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> int | None:
    """A descriptor with an exclusive lock on `directory`; None if another process has it, or it is not a directory."""
    try:
        descriptor = os.open(directory, FOLDER_ONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_unlocked(stale: Path) -> None:
    # A lock, not a process id: ids are reused, and meaningless on another host of a shared file system.
    lock = _lock(stale)
    if lock is not None:
        shutil.rmtree(stale, ignore_errors=True)
        os.close(lock)


def _refuse_links(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link; a sealed directory holds plain files only")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe, socket or device; a sealed directory holds plain files only")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
