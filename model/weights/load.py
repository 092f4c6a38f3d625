"""Loads weights: safetensors into a model of any layout, and DCP checkpoints tensor by tensor.

A rank of a sharded model reads only its own rows of each file, one tensor at a time, so that no host holds the whole model
in memory. This works for DTensors on any mesh (FSDP2, expert parallelism, both): `compute_local_shape_and_global_offset`
gives a rank's region of a tensor.

The file layout is that of huggingface_hub and diffusers: `diffusion_pytorch_model.safetensors`, or shards listed in
`diffusion_pytorch_model.safetensors.index.json`. No function here unpickles weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from model.storage import is_remote

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
MODEL_PREFIX = "model."  # name prefix of the model's tensors in a full checkpoint

Region = tuple[slice, ...]


class Weights(NamedTuple):
    """Stored or sharded tensors: name -> shape and type (a meta tensor), and a function that reads one by name."""

    described: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks names and shapes.

    Raises:
        ValueError: missing or unknown tensors, or wrong shapes; the message names up to five.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"unknown {name}" for name in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(actual[name])}, not {shape}"
        for name, shape in expected.items()
        if name in actual and tuple(actual[name]) != tuple(shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} do not fit the configuration: {'; '.join(problems[:5])}{more}")


def load_weights(model: nn.Module, directory: str | Path) -> int:
    """Loads a transformer directory into `model`, converting to the types of its parameters.

    A model on the meta device is first allocated on `torch.get_default_device()`, each rank its own shards. Uses no
    collectives: each rank reads on its own. Names and shapes are checked before any weight is read.

    Returns:
        bytes of stored tensors that this rank read.

    Raises:
        ValueError: files that are missing, corrupt or inconsistent, or tensors that do not match the model.
    """
    files = open_files(directory)
    state = model.state_dict()
    check_shapes(shapes_of(state), shapes_of(files.described), f"the weights in {directory}")
    if any(tensor.is_meta for tensor in state.values()):
        model.to_empty(device=torch.get_default_device())
        state = model.state_dict()
    bytes_read = 0
    with torch.no_grad():
        for name, tensor in state.items():
            local, region = own_part(tensor)
            if local.numel():
                piece = files.read(name, region)
                local.copy_(piece)
                bytes_read += piece.numel() * piece.element_size()
    return bytes_read


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Region | None]:
    """This rank's part of a tensor, and its region in the full tensor; None if the part is the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert local.numel() == 0 or tuple(local.shape) == tuple(shape), (local.shape, shape, tensor.placements)
    if tuple(local.shape) == tuple(tensor.shape):
        return local, None
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape))


def open_weights(path: str | Path) -> Weights:
    """Opens a transformer directory, a safetensors file, or a DCP checkpoint (also s3://). Reads names, shapes and types only.

    Raises:
        ValueError: the path is none of these, or files are missing, corrupt or inconsistent with their index.
    """
    if is_remote(path):
        return _open_dcp(str(path))
    path = Path(path)
    if (path / ".metadata").is_file():
        return _open_dcp(path)
    files = open_files(path)
    return Weights(files.described, files.read)


def open_files(path: str | Path) -> SafetensorsFiles:
    """Opens a transformer directory or a safetensors file. Raises like `open_weights`."""
    path = Path(path)
    if path.is_file():
        return SafetensorsFiles([path])
    if (path / INDEX_NAME).is_file():
        index = _read_index(path / INDEX_NAME)
        return SafetensorsFiles(sorted({path / file for file in index.values()}), index)
    if (path / WEIGHTS_NAME).is_file():
        return SafetensorsFiles([path / WEIGHTS_NAME])
    raise ValueError(
        f"{path} is not a checkpoint: neither a safetensors file, nor {WEIGHTS_NAME}, nor {INDEX_NAME}, nor DCP"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        files = set(index.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index: it needs a JSON object with a weight_map ({error!r})") from None
    for file in sorted(files, key=str):
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path} names {file!r}: it must be a file in the same directory")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file}, which is missing from {path.parent}")
    return index


class SafetensorsFiles:
    """The tensors of several files. `index` maps each tensor to the file that must contain it; None: no index."""

    def __init__(self, files: list[Path], index: Mapping[str, str] | None = None):
        self.described: dict[str, torch.Tensor] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            with _reader(file) as reader:
                for name in reader.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    if index is not None and index.get(name) != file.name:
                        raise ValueError(f"{file} holds {name}, which its index puts in {index.get(name, 'no file')}")
                    stored = reader.get_slice(name)
                    dtype = _dtype(stored.get_dtype(), file)
                    self.described[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
                    self._file[name] = file
        for name in sorted((index or {}).keys() - self._file.keys()):
            raise ValueError(f"the index of {files[0]} puts {name} in {index[name]}, which does not contain it")

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """One tensor, or only `region` of it. Reads no other bytes of the file's data."""
        with _reader(self._file[name]) as reader:
            return reader.get_tensor(name) if region is None else reader.get_slice(name)[region]


def _reader(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from None


def _dtype(name: str, file: Path) -> torch.dtype:
    from safetensors.torch import _TYPES

    if name not in _TYPES:
        raise ValueError(f"{file} has tensors of type {name}, which PyTorch does not know")
    return _TYPES[name]


def _open_dcp(path: str | Path) -> Weights:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from model.weights.checkpoints import CheckpointReader, load

    reader = CheckpointReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {key: value for key, value in metadata.items() if isinstance(value, TensorStorageMetadata)}
    prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in tensors) else ""
    # A checkpoint without the prefix may also contain optimiser state, whose keys are skipped.
    keys = {
        key.removeprefix(prefix): key
        for key in tensors
        if key.startswith(prefix) and not key.startswith(("optimizer", "state.", "param_groups"))
    }
    described = {
        name: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype, device="meta")
        for name, key in keys.items()
    }

    def read(name: str) -> torch.Tensor:
        state = {keys[name]: torch.empty_like(described[name], device="cpu")}
        load(state, reader, alone=True)
        return state[keys[name]]

    return Weights(described, read)
