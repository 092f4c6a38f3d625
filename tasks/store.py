"""Stores artifacts, and the parts of large artifacts.

An artifact of the whole corpus has a part for each shard. A map task seals the parts of its shards; the task that
gathers them seals an index: tables of names, digests, counts and locations. Parts are not copied.

    HOME/artifacts/KIND/DIGEST/           sealed directories: whole artifacts and parts
    HOME/keys/KIND/KEY.json               the part made from some inputs: KEY is their hash

HOME is NUCLEUS_HOME (default .nucleus). With NUCLEUS_STORE=s3://BUCKET/PREFIX parts and keys are kept there, so that
pods share them; HOME then has only copies. A part is made once for its inputs, across runs.
The reasons are in docs/decisions/artifacts.md.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import file_sha256
from model import storage
from tasks.manifest import MANIFEST, Manifest, Parent, load_manifest, seal, sealed_path, verify, writing

INDEX, LOCATIONS = "parts.parquet", "locations.parquet"  # tables of an index of parts
PARTS = pa.schema(
    [
        ("name", pa.string()),  # of the shard, unique in the index
        ("kind", pa.string()),
        ("digest", pa.string()),  # "" if the part could not be made
        ("rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("error", pa.string()),  # the reason, if it could not be made
    ]
)
PLACES = pa.schema([("digest", pa.string()), ("uri", pa.string())])
BATCH_ROWS = 10_000


# Copy of an artifact in this pod -> URI. Manifests name the URI, since the copy is lost with its pod.
FETCHED_FROM: dict[Path, str] = {}


class Part(NamedTuple):
    """A sealed part of an artifact, or the error (`error`) that prevented it."""

    name: str
    kind: str
    digest: str = ""
    uri: str = ""
    rows: int = 0
    size_bytes: int = 0
    error: str = ""

    def as_parent(self) -> Parent:
        assert self.digest, self
        return Parent(kind=self.kind, digest=self.digest, uri=self.uri)


def home() -> Path:
    """The directory of local artifacts and of the state of running stages."""
    return Path(os.environ.get("NUCLEUS_HOME", ".nucleus")).resolve()


def store() -> str:
    """The directory or URI of parts and keys."""
    shared = os.environ.get("NUCLEUS_STORE", "")
    return storage.check_path(shared).rstrip("/") if shared else str(home())


def local_path(kind: str, digest: str) -> Path:
    """The path of an artifact, or of its copy, on this machine."""
    return sealed_path(home() / "artifacts" / kind, digest)


def make_sealed(
    kind: str,
    make: Callable[[Path], Any],
    parents: Sequence[str | os.PathLike[str] | Parent] = (),
    config: Any = None,
    counts: Callable[[Any], dict[str, int]] | None = None,
    logs: Sequence[str] = (),
) -> tuple[Path, Manifest, Any]:
    """Runs `make(out_dir)` and seals the directory under HOME atomically.

    Returns:
        its path, its manifest, and the result of `make`.

    Raises:
        OSError: the disk is full (ENOSPC); the message has the path. Also errors of `make`.
    """
    folder = home() / "artifacts" / kind
    try:
        with writing(folder, by_digest=True) as out_dir:
            report = make(out_dir)
            manifest = seal(out_dir, kind, parents, config, counts(report) if counts else None, logs)
    except NotADirectoryError as error:
        raise ValueError(f"NUCLEUS_HOME={home()} is not a directory: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk under {folder} is full while making {kind}; nothing was kept"
            ) from error
        raise
    return sealed_path(folder, manifest.digest), manifest, report


def part_key(kind: str, version: str, inputs: dict[str, Any]) -> str:
    """The key of a part: equal for equal inputs of the same version of the code behind it.

    Args:
        version: see tasks.envs.CACHE_VERSIONS; raise it when the code's output for the same inputs changes.
        inputs: JSON-able: digests of inputs, and the configuration that determines the content.
    """
    text = json.dumps([kind, version, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def make_part(
    kind: str,
    name: str,
    version: str,
    inputs: dict[str, Any],
    make: Callable[[Path], int],
    parents: Sequence[str | os.PathLike[str] | Parent] = (),
    config: Any = None,
    logs: Sequence[str] = (),
) -> Part:
    """Returns the part that was made from the same inputs before, or makes a new one.

    Args:
        make: fills an empty directory and returns the number of rows.
        inputs: see `part_key`. The content must not depend on anything else.
    """
    key = storage.join(store(), "keys", kind, f"{part_key(kind, version, inputs)}.json")
    known = _known(kind, name, key)
    if known is not None:
        return known
    path, manifest, rows = make_sealed(kind, make, parents, config, lambda rows: {"rows": rows}, logs)
    # Without manifest and logs: they contain paths, and the index of parts must not depend on the location of a home.
    size = sum((path / name).stat().st_size for name in manifest.files)
    uri = _publish(path, kind, manifest.digest)
    record = {"digest": manifest.digest, "rows": rows, "size_bytes": size}
    if not storage.is_remote(key):
        Path(key).parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(key, json.dumps(record).encode())
    return Part(name, kind, manifest.digest, uri, rows, size)


def known_part(kind: str, name: str, version: str, inputs: dict[str, Any]) -> Part | None:
    """The part that `make_part` would return without making one; None if it would make one."""
    return _known(kind, name, storage.join(store(), "keys", kind, f"{part_key(kind, version, inputs)}.json"))


def _known(kind: str, name: str, key: str) -> Part | None:
    content = storage.read_bytes(key)
    if content is None:
        return None
    try:
        record = json.loads(content)
        digest, rows, size = str(record["digest"]), int(record["rows"]), int(record["size_bytes"])
    except (ValueError, KeyError, TypeError):
        return None  # damaged: make the part again
    uri = _uri(kind, digest)
    manifest = storage.read_bytes(storage.join(uri, MANIFEST))
    if manifest is None or json.loads(manifest).get("digest") != digest:
        return None  # the part is gone, or another one replaced it
    return Part(name, kind, digest, uri, rows, size)


def _uri(kind: str, digest: str) -> str:
    return storage.join(store(), "artifacts", kind, digest)


def _publish(path: Path, kind: str, digest: str) -> str:
    """Copies a sealed directory to a remote store, its manifest last."""
    uri = _uri(kind, digest)
    if storage.is_remote(uri):
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        for name in sorted(names, key=lambda name: name == MANIFEST):
            storage.upload(path / name, storage.join(uri, name))
    return uri


def fetch_part(part: Part, without: tuple[str, ...] = ()) -> Path:
    """The part's directory on this machine, downloaded if it is remote, and verified.

    Args:
        without: files that are not downloaded: endings of names, or folders (storage.is_left_out).

    Raises:
        ValueError: the part was changed, or another directory replaced it.
        FileNotFoundError: it is gone.
    """
    path = local_path(part.kind, part.digest)
    if not path.exists() and storage.is_remote(part.uri):
        _download(part, path, without)
    elif storage.is_remote(part.uri) and (path / MANIFEST).is_file():
        _download_rest(part, path, without)
    elif not path.exists() and Path(part.uri).is_dir():
        path = Path(part.uri)  # in another home
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"part {part.name!r} of kind {part.kind!r} is neither at {path} nor at {part.uri}")
    verify(path, without, kind=part.kind, digest=part.digest)
    return path


def _download(part: Part, path: Path, without: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".fetching-{uuid.uuid4().hex}")
    try:
        storage.copy_folder(part.uri, temporary, without)
        if not (temporary / MANIFEST).is_file():
            raise FileNotFoundError(f"part {part.name!r} of kind {part.kind!r} is gone from {part.uri}")
        with contextlib.suppress(FileExistsError, OSError):  # another process was first
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download_rest(part: Part, path: Path, without: tuple[str, ...]) -> None:
    """Downloads files that an earlier `fetch_part` left out."""
    manifest = load_manifest(path)
    for name in sorted(manifest.files | manifest.logs):
        if not storage.is_left_out(name, without) and not (path / name).exists():
            _download_into(path, name, part.uri)


def _download_into(directory: Path, name: str, uri: str) -> None:
    temporary = directory.with_name(f".file-{uuid.uuid4().hex}")  # not inside: a kill would leave an extra file there
    filesystem, source = storage.filesystem(storage.join(uri, name))
    try:
        filesystem.get_file(source, str(temporary))
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, directory / name)
    finally:
        temporary.unlink(missing_ok=True)


def fetch_file(directory: Path, name: str) -> Path | None:
    """Downloads and verifies, once, a file of an artifact that artifacts.fetch(without=...) left at its source.

    Args:
        directory: a local artifact, or a folder inside one.
        name: path of the file inside `directory`.

    Returns:
        its path; None if the artifact has no such file.

    Raises:
        ValueError: the file was changed.
    """
    path = directory / name
    above = (directory, *directory.parents)
    root = next((at for at in above if at in FETCHED_FROM), None)
    root = root or next((at for at in above if (at / MANIFEST).is_file()), None)
    if root is None:  # an artifact that is being written
        return path if path.is_file() else None
    inside = path.relative_to(root).as_posix()
    wanted = _digests_of(root).get(inside)
    if wanted is None:
        return None
    if not path.is_file():
        if root not in FETCHED_FROM:
            return None
        _download_into(root, inside, FETCHED_FROM[root])
    if (digest := _digest_of(path, path.stat().st_mtime_ns)) != wanted:
        where: Path | str = path
        if root in FETCHED_FROM:  # another attempt downloads it again
            path.unlink()
            where = storage.join(FETCHED_FROM[root], inside)
        raise ValueError(f"{where} was changed: its SHA-256 is {digest}, not {wanted}")
    return path


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, modified_ns: int) -> str:
    return file_sha256(path)


@functools.lru_cache(maxsize=4)
def _digests_of(directory: Path) -> dict[str, str]:
    """Path inside a sealed directory -> SHA-256. Cached: a manifest may list a file for each shard."""
    manifest = load_manifest(directory)
    return dict(manifest.files | manifest.logs)


def write_index(out_dir: str | os.PathLike[str], parts: Iterable[Part]) -> dict[str, int]:
    """Writes the tables of an index of parts; seal it with logs=(LOCATIONS,), since locations are not content.

    Returns:
        {"parts", "failed", "rows", "size_bytes"}

    Raises:
        ValueError: a name repeats.
    """
    out_dir = Path(out_dir)
    counts = {"parts": 0, "failed": 0, "rows": 0, "size_bytes": 0}
    names: set[str] = set()
    with (
        pq.ParquetWriter(out_dir / INDEX, PARTS) as index,
        pq.ParquetWriter(out_dir / LOCATIONS, PLACES) as places,
    ):
        for batch in _batches(parts):
            for part in batch:
                if part.name in names:
                    raise ValueError(f"part {part.name!r} is there twice")
                names.add(part.name)
                counts["failed" if part.error else "parts"] += 1
                counts["rows"] += part.rows
                counts["size_bytes"] += part.size_bytes
            rows = [{field: getattr(part, field) for field in PARTS.names} for part in batch]
            index.write_table(pa.Table.from_pylist(rows, PARTS))
            where = [{"digest": part.digest, "uri": part.uri} for part in batch if part.digest]
            places.write_table(pa.Table.from_pylist(where, PLACES))
    return counts


def read_index(directory: str | os.PathLike[str]) -> Iterator[Part]:
    """The parts of an index, in order, without loading the whole table."""
    directory = Path(directory)
    with pq.ParquetFile(directory / INDEX) as index, pq.ParquetFile(directory / LOCATIONS) as places:
        yield from zip_index(index, places, str(directory))


def zip_index(index: pq.ParquetFile, places: pq.ParquetFile, where: str) -> Iterator[Part]:
    """The parts from the two open tables of an index; `where` is for messages."""
    uris = (row for batch in places.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
    for batch in index.iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            uri = ""
            if row["digest"]:
                place = next(uris)
                assert place["digest"] == row["digest"], f"{where}: {LOCATIONS} is of another {INDEX}"
                uri = place["uri"]
            yield Part(uri=uri, **row)


def is_index(directory: str | os.PathLike[str]) -> bool:
    return (Path(directory) / INDEX).is_file()


def missing_parts(directory: str | os.PathLike[str]) -> list[Part]:
    """Parts of an index that are neither on this machine nor in their store. Reads no content."""
    lost = []
    for part in read_index(directory):
        if not part.digest or (local_path(part.kind, part.digest) / MANIFEST).is_file():
            continue
        if storage.read_bytes(storage.join(part.uri, MANIFEST)) is None:
            lost.append(part)
    return lost


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    for part in parts:
        batch.append(part)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def group_range(group: int, groups: int, count: int) -> range:
    """Positions of the shards of one of `groups` groups over `count` shards."""
    return range(group * count // groups, (group + 1) * count // groups)


def num_groups(count: int, max_groups: int) -> int:
    """Number of groups for map tasks: one for each shard, at most `max_groups`."""
    return max(1, min(count, max_groups))


__all__ = [
    "FETCHED_FROM",
    "INDEX",
    "LOCATIONS",
    "Part",
    "fetch_file",
    "fetch_part",
    "group_range",
    "home",
    "is_index",
    "known_part",
    "load_manifest",
    "local_path",
    "make_part",
    "make_sealed",
    "missing_parts",
    "num_groups",
    "part_key",
    "read_index",
    "store",
    "write_index",
    "zip_index",
]
