"""DCP checkpoints, local or in S3: lists finished ones, and loads them without executing code that they contain.

    step-{n}/.metadata                   written last, by a rename; a folder without it is an interrupted save
    step-{n}/__{rank}_{i}.distcp

DCP reads `.metadata` with pickle.load, and values other than tensors with torch.load(weights_only=False). Both execute
code from the checkpoint. `load` does neither. See docs/decisions/checkpoints.md.
"""

from __future__ import annotations

import enum
import importlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from model.storage import check_path, filesystem, may_pass, options, replacing

METADATA = ".metadata"
_STEP = re.compile(rf"step-(\d+)/{re.escape(METADATA)}")
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


def finished_checkpoints(folder: str | os.PathLike) -> dict[int, str]:
    """Step -> path of each finished checkpoint of a folder, in ascending order."""
    fs, root = filesystem(folder)
    checkpoints = {}
    for path in fs.find(root):  # one listing, also in S3
        match = _STEP.fullmatch(os.path.relpath(path, root))
        if match:
            checkpoints[int(match.group(1))] = f"{str(folder).rstrip('/')}/{os.path.basename(os.path.dirname(path))}"
    return dict(sorted(checkpoints.items()))


def last_checkpoint(path: str | os.PathLike) -> str:
    """The last finished checkpoint of a folder of checkpoints. The path of a checkpoint is returned unchanged.

    Raises:
        ValueError: there is no finished checkpoint.
    """
    fs, root = filesystem(path)
    if fs.exists(f"{root}/{METADATA}"):
        return str(path)
    checkpoints = finished_checkpoints(path)
    if not checkpoints:
        raise ValueError(f"{path} has no finished checkpoint (step-*/ with a {METADATA} file)")
    return list(checkpoints.values())[-1]


_INSTANCES = tuple(
    getattr(importlib.import_module(module), name)
    for module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    for name in sorted(_CLASSES[module] - {"_MEM_FORMAT_ENCODING"})
)


def _path_text(*steps: str) -> str:
    """Replaces pathlib's classes, which DCP writes for the path of the checkpoint: a str has no attributes to
    change."""
    return "/".join(steps)


def _enum_member(kind: Any, name: str) -> enum.Enum:
    """Replaces getattr, with which an early Python 3.11 (Debian 12 has 3.11.2) pickles enum members."""
    if not (isinstance(kind, enum.EnumMeta) and isinstance(name, str)):
        raise ValueError(f"it reads an attribute of {kind!r}, which is not an enum")
    return kind[name]


class _MetadataUnpickler(pickle._Unpickler):
    """Allows DCP's metadata classes and torch's dtypes, and no other global.

    Uses Python's unpickler instead of the C one, like torch's weights_only, since only there BUILD can be restricted:
    BUILD sets attributes of any object, and on a class or an enum member the change would last in this process.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # an opcode that allocates the length it claims; DCP does not write it

    def load_build(self) -> None:
        if type(self.stack[-2]) not in _INSTANCES:
            raise ValueError(
                f"it changes attributes of {self.stack[-2]!r}, which is not an instance of a metadata class"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return _path_text
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise ValueError(f"it names {module}.{name}, which is not part of a checkpoint's metadata")


class _MetadataPickler(pickle.Pickler):
    """Writes enum members alike in all versions of Python, so that equal metadata has equal bytes."""

    def reducer_override(self, obj: Any) -> Any:
        return (type(obj), (obj.value,)) if isinstance(obj, enum.Enum) else NotImplemented


def _read_metadata(content: bytes, where: Any) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it is a {type(metadata).__name__}")
        names = {info.relative_path for info in (metadata.storage_data or {}).values()}
    except Exception as error:  # on hostile bytes an unpickler may raise any exception
        raise ValueError(f"{where} is not the metadata of a checkpoint: {error}") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"{where} points at {name!r}, which is outside of the checkpoint")
    return metadata


def canonical_metadata(checkpoint: Path) -> None:
    """Rewrites `.metadata` of a local checkpoint so that equal checkpoints have equal bytes.

    DCP writes a random id and the path into it. A pickle's bytes also depend on object identity in memory, which differs
    after a resume. The file is replaced instead of changed in place, as it may be a hard link to the run's file.
    """
    path = checkpoint / METADATA
    metadata = _read_metadata(path.read_bytes(), path)
    metadata.storage_meta = None
    buffer = io.BytesIO()
    pickler = _MetadataPickler(buffer, protocol=4)
    pickler.fast = True  # writes each object in full, without references to earlier ones
    pickler.dump(metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def incomplete_files(checkpoint: str | os.PathLike) -> list[str]:
    """Files of a checkpoint that are missing or shorter than in its metadata; `.metadata` itself if that is unreadable."""
    fs, root = filesystem(checkpoint)
    try:
        metadata = _read_metadata(fs.cat_file(f"{root}/{METADATA}"), f"{checkpoint}/{METADATA}")
    except (ValueError, FileNotFoundError):
        return [METADATA]
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    sizes = {os.path.basename(path): entry["size"] for path, entry in fs.find(root, detail=True).items()}
    return sorted(name for name, end in ends.items() if sizes.get(name, -1) < end)


class CheckpointReader(FsspecReader):
    """Reads a DCP checkpoint, local or remote. The only pickle that it reads is the metadata, by `_MetadataUnpickler`."""

    def __init__(self, path: str | os.PathLike):
        path = check_path(path)  # before DCP creates a file system for it
        super().__init__(path, **options(path))
        self.source = path
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, parsed once per reader. It has an entry for each shard of each tensor, and loading tensor by
        tensor requests it for each tensor.

        Raises:
            ValueError: `.metadata` is not the metadata of a checkpoint.
        """
        if self._metadata is None:
            self._metadata = self._parse_metadata(*args, **kwargs)
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def _parse_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        where = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(where, "rb") as file:
            metadata = _read_metadata(file.read(), where)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{read_item.dest_index.fqn} is neither a tensor nor a plain value") from error
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def load(state: dict[str, Any], source: str | os.PathLike | CheckpointReader, *, alone: bool) -> None:
    """Fills `state` from a checkpoint.

    Args:
        source: the checkpoint's path, or a reader, which parses the metadata once for several calls.
        alone: only this process reads; otherwise all ranks must call, and each reads its shards.

    Raises:
        ValueError: no checkpoint, a damaged one, or one with other names or shapes.
        ConnectionError: the checkpoint could not be read, but may be intact.
    """
    reader = source if isinstance(source, CheckpointReader) else CheckpointReader(source)
    try:
        with without_warning():
            dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), no_dist=alone)
    except CheckpointException as error:  # a BaseException whose message contains full tracebacks
        failures = [failure for failure, _ in error.failures.values()]
        reasons = {(str(failure) or type(failure).__name__).splitlines()[0] for failure in failures}
        error_type = ConnectionError if any(may_pass(failure) for failure in failures) else ValueError
        raise error_type(f"{reader.source} cannot be loaded: {'; '.join(sorted(reasons))}") from error


@contextmanager
def without_warning() -> Iterator[None]:
    """Silences DCP's warning that a single process saves or loads without a process group, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
