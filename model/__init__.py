"""The MoE diffusion transformer: pure PyTorch, no Flyte. Heavy modules load on first use."""

from __future__ import annotations

import importlib
import os
from typing import Any

# cuBLAS reads this variable only at a process's first matrix product on CUDA. Deterministic training requires this
# value, and in a local run the same process encodes on the GPU before it trains.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = ["NucleusTransformer", "TransformerConfig"]
_MODULES = {"NucleusTransformer": "model.transformer", "TransformerConfig": "model.config"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
