"""The MoE diffusion transformer: pure PyTorch, no Flyte. Heavy modules load on first use."""

from __future__ import annotations

import importlib
from typing import Any

from model.config import TransformerConfig

__all__ = ["NucleusTransformer", "TransformerConfig"]


def __getattr__(name: str) -> Any:
    if name == "NucleusTransformer":
        return importlib.import_module("model.transformer").NucleusTransformer
    raise AttributeError(f"module 'model' has no attribute {name!r}")
