"""WSM: merging checkpoints of a constant learning rate in place of decaying it (arXiv 2507.17634)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from model.config import TransformerConfig
from model.export import WEIGHTS_NAME, check_state, export_transformer, read_config

Checkpoint = str | Path | Mapping[str, torch.Tensor]
MODEL_PREFIX = "model."


def wsm_weights(n: int) -> list[float]:
    """Merge weights c_1..c_n, old to new, of sum 1, for an inverse-square-root decay w_j = 1 / sqrt(j).

    Merging with c scales the update between checkpoints j-1 and j by w_j = c_j + ... + c_n; so
    c_j = w_j - w_(j+1), c_n = w_n, and w_1 = 1.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"wsm_weights(n={n}): n must be at least 1")
    decay = [j**-0.5 for j in range(1, n + 1)]
    return [a - b for a, b in zip(decay, decay[1:])] + [decay[-1]]


def merge(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    out: str | Path,
    config: TransformerConfig | None = None,
) -> dict:
    """Writes the weighted sum of `checkpoints` as a diffusers transformer directory `out`.

    One tensor of each checkpoint is in memory at a time, beside the result. Sums are in fp64 and rounded once
    to the tensor's type; one checkpoint with weight 1 comes back bitwise.

    Args:
        checkpoints: old to new; each a state dict, a safetensors file, a directory of safetensors, or a DCP
            directory (tensors alone are read; names under "model." or plain).
        weights: one for each; sum 1 (`wsm_weights`).
        config: of the model; None reads config.json beside the newest checkpoint.

    Returns:
        {"checkpoints": n, "weights": [...], "tensors": n, "parameters": n}.

    Raises:
        ValueError: counts that differ, a sum that is not 1, or checkpoints of different tensors.
    """
    if not checkpoints or len(checkpoints) != len(weights):
        raise ValueError(f"merge needs one weight for each checkpoint, got {len(checkpoints)} and {len(weights)}")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"merge weights must sum to 1, got {sum(weights):.8g}")
    if config is None:
        config = _config_beside(checkpoints[-1])
    readers = [_open(checkpoint) for checkpoint in checkpoints]
    shapes = readers[0][0]
    for i, (other, _) in enumerate(readers[1:], start=2):
        differing = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"checkpoint {i} of {len(readers)} does not match the first: {len(differing)} tensors differ, first "
                f"{name} ({shapes.get(name, 'absent')} against {other.get(name, 'absent')})"
            )
    check_state(config, shapes)
    merged = {}
    for name in shapes:
        if len(readers) == 1:
            merged[name] = readers[0][1](name)
            continue
        total = torch.zeros(shapes[name], dtype=torch.float64)
        dtype = None
        for (_, read), weight in zip(readers, weights):
            tensor = read(name)
            dtype = dtype or tensor.dtype
            total.add_(tensor.to(torch.float64), alpha=weight)
        merged[name] = total.to(dtype)
    export_transformer(merged, out, config)
    parameters = sum(tensor.numel() for tensor in merged.values())
    return {"checkpoints": len(readers), "weights": list(weights), "tensors": len(merged), "parameters": parameters}


Shapes = dict[str, tuple[int, ...]]


def _open(checkpoint: Checkpoint) -> tuple[Shapes, Callable[[str], torch.Tensor]]:
    """(shapes by name, a function that reads one tensor)."""
    if isinstance(checkpoint, Mapping):
        return {name: tuple(t.shape) for name, t in checkpoint.items()}, lambda name: checkpoint[name].detach().cpu()
    path = Path(checkpoint)
    if path.is_file():
        return _open_safetensors([path])
    if (path / ".metadata").is_file():
        return _open_dcp(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} is not a checkpoint: neither a safetensors file, nor a directory of them, nor DCP")
    return _open_safetensors(files)


def _open_safetensors(files: list[Path]) -> tuple[Shapes, Callable[[str], torch.Tensor]]:
    from safetensors import safe_open

    where, shapes = {}, {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():
                where[name], shapes[name] = file, tuple(reader.get_slice(name).get_shape())

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as reader:
            return reader.get_tensor(name)

    return shapes, read


def _open_dcp(path: Path) -> tuple[Shapes, Callable[[str], torch.Tensor]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: value for key, value in metadata.items() if isinstance(value, TensorStorageMetadata)}
    prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in tensors) else ""
    # A plain checkpoint may hold the optimiser too; its keys are no parameters of the model.
    keys = {
        key.removeprefix(prefix): key
        for key in tensors
        if key.startswith(prefix) and not key.startswith(("optimizer", "state.", "param_groups"))
    }

    def read(name: str) -> torch.Tensor:
        stored = tensors[keys[name]]
        state = {keys[name]: torch.empty(stored.size, dtype=stored.properties.dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return state[keys[name]]

    return {name: tuple(tensors[key].size) for name, key in keys.items()}, read


def _config_beside(checkpoint: Checkpoint) -> TransformerConfig:
    if isinstance(checkpoint, Mapping):
        raise ValueError("merge of state dicts needs config")
    path = Path(checkpoint)
    return read_config(path.parent if path.is_file() else path)


__all__ = ["WEIGHTS_NAME", "merge", "wsm_weights"]
