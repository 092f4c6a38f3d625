"""Our weights as a diffusers transformer directory: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.config import TransformerConfig
from model.transformer import NucleusTransformer

CLASS_NAME = "NucleusMoEImageTransformer2DModel"
DIFFUSERS_VERSION = "0.42.1"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    """What diffusers writes into config.json for this model."""
    return {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION, **config.model_dump(mode="json")}


def check_state(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are not exactly the model's.

    Raises:
        ValueError: it names missing and unknown tensors, and wrong shapes.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in NucleusTransformer(config).state_dict().items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"unknown {name}" for name in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(shapes[name])}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(problems[:5])}{more}")


def write_config(config: TransformerConfig, out: Path) -> None:
    (out / "config.json").write_text(json.dumps(diffusers_config(config), indent=2, sort_keys=True) + "\n")


def export_transformer(
    source: NucleusTransformer | Mapping[str, torch.Tensor],
    out: str | Path,
    config: TransformerConfig | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `out`, which diffusers' `from_pretrained(out)` and `load_transformer(out)` load.

    Args:
        source: a model, or a state dict with diffusers' names; then `config` is needed.
        dtype: of floating-point weights in the file; None keeps each as it is.

    Raises:
        ValueError: weights that do not fit the configuration.
    """
    if isinstance(source, NucleusTransformer):
        config, source = config or source.config, source.state_dict()
    if config is None:
        raise ValueError("export_transformer of a state dict needs its config")
    check_state(config, {name: tuple(tensor.shape) for name, tensor in source.items()})
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in source.items()
    }
    write_config(config, out)
    save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})


def read_config(directory: str | Path) -> TransformerConfig:
    """The configuration in a transformer directory's config.json.

    Raises:
        ValueError: no such file, another class, or a key that this model does not know.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a transformer directory: it has no config.json")
    values = json.loads(path.read_text())
    if values.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise ValueError(f"{path} is of class {values['_class_name']}, not {CLASS_NAME}")
    with torch.device("meta"):
        return NucleusTransformer.from_config(values).config


def load_transformer(directory: str | Path, dtype: torch.dtype | None = None) -> NucleusTransformer:
    """The model in a transformer directory (ours or the released one, also in several files), in eval mode."""
    from safetensors import safe_open

    directory = Path(directory)
    with torch.device("meta"):
        model = NucleusTransformer(read_config(directory))
    files = sorted(directory.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no {WEIGHTS_NAME}")
    state = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():
                state[name] = reader.get_tensor(name).to(dtype)
    check_state(model.config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    model.load_state_dict(state, assign=True)
    return model.eval()
