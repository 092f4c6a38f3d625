"""Writes and reads diffusers transformer directories: config.json, and safetensors in one file or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from model.config import TransformerConfig
from model.transformer import NucleusTransformer
from model.weights.load import INDEX_NAME, WEIGHTS_NAME, Weights, check_shapes, open_weights, shapes_of

CLASS_NAME = "NucleusMoEImageTransformer2DModel"
OWN_CLASS_NAME = "NucleusTransformer"  # for ablations, which diffusers' class does not support
DIFFUSERS_VERSION = "0.42.1"
FILE_PATTERN = WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
MAX_SHARD_SIZE = "10GB"  # diffusers' default


def diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    """The config.json that diffusers writes for this model. Ablations have this project's class name."""
    class_name = OWN_CLASS_NAME if config.is_ablation else CLASS_NAME
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **config.model_dump(mode="json")}


def check_state(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that names and shapes are those of the model.

    Raises:
        ValueError: missing or unknown tensors, or wrong shapes; the message names them.
    """
    with torch.device("meta"):
        expected = shapes_of(NucleusTransformer(config).state_dict())
    check_shapes(expected, shapes, "the weights")


def write_config(config: TransformerConfig, out: Path) -> None:
    (out / "config.json").write_text(json.dumps(diffusers_config(config), indent=2, sort_keys=True) + "\n")


def export_transformer(
    source: NucleusTransformer | Weights | Mapping[str, torch.Tensor],
    out: str | Path,
    config: TransformerConfig | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a directory that diffusers' `from_pretrained(out)` and `load_transformer(out)` load.

    Memory holds the tensors of one file at a time. The layout is diffusers': one file up to `max_shard_size`, several files
    with an index above.

    Args:
        source: a model, a state dict with diffusers' names, or `open_weights` of a checkpoint; the last two need
            `config`. Tensors may be sharded: then all ranks must call, and rank 0 writes.
        dtype: type of floating-point weights in the file; None keeps their types.
        max_shard_size: maximum bytes of tensors per file, such as 5_000_000_000 or "5GB"; a larger tensor gets a file
            to itself.

    Raises:
        ValueError: weights that do not match the configuration.
    """
    if isinstance(source, nn.Module):
        config, source = config or source.config, source.state_dict()
    if config is None:
        raise ValueError("export_transformer of a state dict needs its config")
    weights = source if isinstance(source, Weights) else _in_memory(source)
    check_state(config, shapes_of(weights.described))
    described = {name: tensor.to(_stored_type(tensor, dtype)) for name, tensor in weights.described.items()}
    split = split_torch_state_dict_into_shards(described, filename_pattern=FILE_PATTERN, max_shard_size=max_shard_size)
    out = Path(out)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        out.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = weights.read(name)
            if writes:
                tensors[name] = tensor.detach().to("cpu", described[name].dtype).contiguous()
        if writes:
            save_file(tensors, out / file, metadata={"format": "pt"})
    if writes:
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (out / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        write_config(config, out)


def _in_memory(state: Mapping[str, torch.Tensor]) -> Weights:
    def read(name: str) -> torch.Tensor:
        tensor = state[name]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    described = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    return Weights(described, read)


def _stored_type(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def read_config(directory: str | Path) -> TransformerConfig:
    """The configuration in a transformer directory's config.json.

    Raises:
        ValueError: no such file, another class, or an unknown key.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a transformer directory: it has no config.json")
    values = json.loads(path.read_text())
    ours = OWN_CLASS_NAME if "routing" in values else CLASS_NAME
    if values.get("_class_name", ours) != ours:
        raise ValueError(f"{path} is of class {values['_class_name']}, not {ours}")
    with torch.device("meta"):
        return NucleusTransformer.from_config(values).config


def load_transformer(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> NucleusTransformer:
    """The model in a transformer directory (written here or released by the authors), in eval mode, in `dtype` (None: the
    stored types) and on `device` (None: the CPU). For a sharded model see `load_weights`."""
    return assembled(read_config(directory), open_weights(directory), dtype, device)


def assembled(
    config: TransformerConfig,
    weights: Weights,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> NucleusTransformer:
    """The model with these weights, in eval mode. Tensors move to `device` one at a time, so that the host never holds all
    of them.

    Raises:
        ValueError: weights that do not match the configuration.
    """
    with torch.device("meta"):
        model = NucleusTransformer(config)
    check_state(config, shapes_of(weights.described))
    state = {name: weights.read(name).to(device=device, dtype=dtype) for name in weights.described}
    model.load_state_dict(state, assign=True)
    return model.eval()


def released_weights(where: str, config: TransformerConfig) -> Path:
    """The transformer directory of `train.init_from`: a local path, or a Hub repository, downloaded unless it is cached.

    Raises:
        ValueError: no such directory, or a model with another configuration than `config`. Capacity factors may differ:
            each stage sets its own, and no weight depends on them.
    """
    name, _, commit = where.partition("@")
    directory = Path(where)
    if commit:
        from huggingface_hub import snapshot_download

        organisation, repository, *subfolder = name.split("/")
        inside = "/".join([*subfolder, "*"])
        snapshot = snapshot_download(f"{organisation}/{repository}", revision=commit, allow_patterns=[inside])
        directory = Path(snapshot, *subfolder)
    stored, recipe = (x.model_dump(mode="json") for x in (read_config(directory), config))
    differing = [
        key for key in recipe if key not in ("capacity_factors", "use_grouped_mm") and stored.get(key) != recipe[key]
    ]
    if differing:
        differences = ", ".join(f"{key} {stored.get(key)!r} there, {recipe[key]!r} here" for key in differing)
        raise ValueError(f"train.init_from={where} is another model: {differences}")
    return directory
