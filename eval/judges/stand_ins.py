"""Imports a judge's library without packages that the library imports but the judge does not use.

torchvision needs one exact build of torch. modelscope and dreamsim import it, or packages that import it, for functions
that their judges never call. During one import, small modules replace it:

    with importable({"torchvision": ...}, library="dreamsim"):   # sys.modules as it was before, at the end
        importlib.import_module("dreamsim.model")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any


def module(name: str, **attributes: Any) -> ModuleType:
    """A module with these attributes, which other modules can be imported from."""
    made = ModuleType(name)
    made.__path__ = []
    vars(made).update(attributes)
    return made


def package_of(name: str, folder: str) -> ModuleType:
    """A package whose modules are those of `folder`, and whose own __init__ does not run."""
    made = ModuleType(name)
    made.__path__ = [folder]
    return made


@contextmanager
def importable(stand_ins: Mapping[str, ModuleType], library: str) -> Iterator[None]:
    """Inside the block, imports of these names give `stand_ins`, and `library` is imported again.

    Afterwards sys.modules is restored, without the stand-ins and the library's modules, so that later checks for these
    packages are not affected. Imported classes stay usable.
    """
    tops = {library, *(name.partition(".")[0] for name in stand_ins)}

    def ours() -> dict[str, ModuleType]:
        return {name: loaded for name, loaded in sys.modules.items() if name.partition(".")[0] in tops}

    before = ours()
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    for name, stand_in in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent in stand_ins:
            setattr(stand_ins[parent], child, stand_in)
    try:
        yield
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


class Normalize:
    """torchvision.transforms.Normalize of a [..., 3, height, width] tensor."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std

    def __call__(self, pixels: Any) -> Any:
        import torch

        mean, std = (
            torch.tensor(x, dtype=pixels.dtype, device=pixels.device)[:, None, None] for x in (self.mean, self.std)
        )
        return (pixels - mean) / std


def torchvision() -> dict[str, ModuleType]:
    """torchvision's stand-ins; empty where the real one is installed and imports, which is used then."""
    try:
        importlib.import_module("torchvision.transforms")
    except Exception:  # not installed; or its operators are of another build of torch: RuntimeError, OSError, ...
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what a failed import leaves
        transforms = module("torchvision.transforms", Normalize=Normalize, InterpolationMode=SimpleNamespace(BICUBIC=3))
        return {"torchvision": module("torchvision"), "torchvision.transforms": transforms}
    return {}
