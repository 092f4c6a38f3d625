"""The interface of scorers, which add columns to records. Rules, tiers and episodes read columns; a scorer never rejects."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image


@dataclass(frozen=True)
class Column:
    """A column that scorers fill. `unit` and the range from `low` to `high` are also in the metadata of its tables."""

    name: str
    type: pa.DataType
    unit: str
    low: float
    high: float

    @property
    def is_vector(self) -> bool:
        return pa.types.is_list(self.type)

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, metadata={"unit": self.unit, "range": f"{self.low:g} to {self.high:g}"})


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("watermark", pa.float32(), "probability or score, 1 is marked", 0, 1),
        Column("aesthetic", pa.float32(), "score, 10 is best", 0, 10),
        Column("nsfw", pa.float32(), "probability", 0, 1),
        Column("similarity", pa.float32(), "cosine of the image and its best caption", -1, 1),
        Column("quality", pa.float32(), "BRISQUE, 0 is best", 0, 100),
        Column("text_area", pa.float32(), "share of the image under text", 0, 1),
        Column("faces", pa.float32(), "faces", 0, 1000),
        Column("embedding", pa.list_(pa.float16()), "components of a vector of length 1", -1, 1),
    )
}
SCALARS = tuple(name for name, column in COLUMNS.items() if not column.is_vector)

Need = Literal["image", "pixels", "embedding", "captions"]


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer that recipes can name (`SCORERS`).

    columns: names of `COLUMNS` that it fills.
    build: `module:function` that builds it; the function gets the recipe's settings if `settings` is not empty.
    needs: the fields of a `Sample` that it reads. With "embedding" no image is decoded for it; "pixels" (with `gray`)
        is cheaper than "image".
    batch: maximum number of records in a call.
    resources: the kind of task that runs it (tasks.envs): "shard" has no GPU, "gpu_single" has one.
    dtype: of its computation; scores are stored in the type of the column.
    settings: keys of `ScorerChoice` that it accepts; those in `required` must be set.
    weights: {path below an installed package: SHA-256}; the first component of the path is the package.
    code: further modules whose code determines its numbers.
    """

    name: str
    columns: tuple[str, ...]
    build: str
    needs: frozenset[Need] = frozenset({"image"})
    batch: int = 64
    resources: Literal["shard", "gpu_single"] = "shard"
    dtype: str = "float32"
    settings: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    code: tuple[str, ...] = ()

    def code_digest(self) -> str:
        """A digest of the code of its modules, 16 hex digits, that ignores comments, docstrings and layout."""
        modules = (self.build.partition(":")[0], *self.code)
        return hashlib.sha256("".join(map(_code_digest, modules)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """The input of a scorer for one record. Fields that it does not need may be None.

    image: RGB, upright, shorter side at most 384 px (enough for the CLIP family), or as small as `pixels` if no running
    scorer needs it. pixels: uint8 [H, W, 3] and gray: uint8 [H, W], longer side at most 256 px. captions: cleaned, of
    any length. embedding: float16 [D].
    """

    image: Image.Image
    pixels: np.ndarray
    gray: np.ndarray
    captions: tuple[str, ...]
    embedding: np.ndarray | None = None


class Scorer(Protocol):
    """Scores a batch of at most `ScorerSpec.batch` records: an array [N] or, for a vector, [N, D] for each of its columns.
    NaN means no score. Loads its model on first use, not at construction."""

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]: ...


def check_range(scorer: str, column: Column, values: np.ndarray) -> None:
    """
    Raises:
        ValueError: a value is outside the column's range: the scorer is broken, or fills another column.
    """
    outside = values[(values < column.low - 1e-3) | (values > column.high + 1e-3)]  # NaN passes
    if outside.size:
        raise ValueError(
            f"scorer {scorer!r} gives {column.name} the value {float(outside.flat[0]):.4g}; its range is {column.low:g} to "
            f"{column.high:g} ({column.unit})"
        )


@functools.cache
def _code_digest(module: str) -> str:
    file = getattr(importlib.import_module(module), "__file__", None)
    if file is None:
        return hashlib.sha256(module.encode()).hexdigest()  # a module without a file
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
