"""File format of latents and texts: one latents part and one texts part per shard of the corpus.

    latents part   meta.json                                  LatentMeta
                   rows.parquet                               one row per image, see ROWS
                   bucket-{W}x{H}/latents-{i:05d}.safetensors "latents" [n, C, H/8, W/8], normalised: (z - mean) / std
    texts part     meta.json                                  TextMeta
                   captions.parquet                           one row per record, see CAPTIONS
                   texts.parquet                              one row per distinct text, see TEXTS
                   text/texts-{i:05d}.safetensors             "texts": unpadded tokens of many texts, concatenated

Every prompt begins with the same tokens (the system message), for which a causal text encoder always computes the same
states. The part named PREFIX stores these once: prefix.safetensors has "prefix", and "empty", the tokens of the empty
prompt after the prefix. All other texts are stored without the prefix. See docs/decisions/encoding.md.

A texts part has the form "states" (hidden states [n, D] of the text encoder) or "tokens" (token ids [n]; training computes
the states).
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors.torch import save_file

from model import storage
from model.config import Positive, Section
from model.constants import PIPELINE_TEXT_STATE, VAE_SCALE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
META = "meta.json"
ROWS_FILE, CAPTIONS_FILE, TEXTS_FILE = "rows.parquet", "captions.parquet", "texts.parquet"
PREFIX, PREFIX_FILE = "prefix", "prefix.safetensors"
ROWS = pa.schema(
    [
        ("row", pa.int64()),  # of the record in the shard
        ("record_id", pa.string()),
        ("bucket", pa.string()),
        ("place", pa.int32()),  # in the bucket: row place % rows_per_file of file place // rows_per_file
        ("crc32", pa.uint32()),  # of the latent's bytes
    ]
)
CAPTIONS = pa.schema(
    [
        ("row", pa.int64()),  # of the record in the shard
        ("tier", pa.string()),
        ("episode", pa.string()),  # the record's episode
        ("texts", pa.list_(pa.int32())),  # rows of texts.parquet; an empty list means the empty prompt
    ]
)
TEXTS = pa.schema(
    [
        ("tokens", pa.int32()),  # without the prefix
        ("file", pa.int32()),
        ("begin", pa.int64()),  # in tokens, within the file
        ("crc32", pa.uint32()),  # of the text's bytes
    ]
)
TEXT_FILE_BYTES = 256 << 20  # a file of texts is written when it reaches this size; until then it is in memory


class LatentMeta(Section):
    """meta.json of a latents part."""

    latent_channels: Positive = 16
    vae_scale: Positive = VAE_SCALE  # pixels per latent, along each side
    patch_size: Positive = 2
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rows_per_file: Positive = 4096
    buckets: dict[str, int] = {}  # number of images by bucket; set by the writer


class TextMeta(Section):
    """meta.json of a texts part. `max_tokens` and `hidden_state_index` are settings of its text encoder."""

    form: Literal["states", "tokens"] = "states"
    text_dim: Positive
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the states, stored or computed
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    max_tokens: Positive = 1024
    hidden_state_index: int = PIPELINE_TEXT_STATE


def latent_file(bucket: str, file: int) -> str:
    return f"bucket-{bucket}/latents-{file:05d}.safetensors"


def text_file(file: int) -> str:
    return f"text/texts-{file:05d}.safetensors"


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes. It detects corruption of single rows, not tampering: whoever can replace a row can also
    replace the manifest with its SHA-256."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    storage.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


class LatentPartWriter:
    """Writes one latents part. Memory holds at most one file of each bucket.

    Use as a context manager: it writes meta.json and rows.parquet if the block ends without an error.
    """

    def __init__(self, out_dir: str | Path, meta: LatentMeta):
        self.out_dir, self.meta = Path(out_dir), meta
        self._pending: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._rows: dict[str, list] = {name: [] for name in ROWS.names}

    def __enter__(self) -> LatentPartWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def add(self, row: int, record_id: str, latent: torch.Tensor) -> None:
        """Adds one normalised latent [C, h, w].

        Raises:
            ValueError: wrong number of channels, or a size that is not a multiple of the patch size.
        """
        channels, height, width = latent.shape
        if channels != self.meta.latent_channels:
            raise ValueError(f"latent of {record_id} has {channels} channels, expected {self.meta.latent_channels}")
        if height % self.meta.patch_size or width % self.meta.patch_size:
            raise ValueError(f"latent of {record_id} is {height}x{width}: not a multiple of the patch size")
        bucket = f"{width * self.meta.vae_scale}x{height * self.meta.vae_scale}"
        place = self._counts.get(bucket, 0)
        stored = latent.detach().to("cpu", DTYPES[self.meta.dtype])
        for name, value in zip(ROWS.names, (row, record_id, bucket, place, checksum(stored)), strict=True):
            self._rows[name].append(value)
        pending = self._pending.setdefault(bucket, [])
        pending.append(stored)
        self._counts[bucket] = place + 1
        if len(pending) == self.meta.rows_per_file:
            self._flush(bucket)

    def close(self) -> LatentMeta:
        for bucket in sorted(self._pending):
            if self._pending[bucket]:
                self._flush(bucket)
        pq.write_table(pa.table(self._rows, schema=ROWS), self.out_dir / ROWS_FILE)
        self.meta = self.meta.model_copy(update={"buckets": dict(sorted(self._counts.items()))})
        write_json(self.out_dir / META, self.meta.model_dump())
        return self.meta

    def _flush(self, bucket: str) -> None:
        path = self.out_dir / latent_file(bucket, (self._counts[bucket] - 1) // self.meta.rows_per_file)
        path.parent.mkdir(exist_ok=True)
        save_file({"latents": torch.stack(self._pending[bucket]).contiguous()}, path)
        self._pending[bucket] = []


class TextPartWriter:
    """Writes one texts part. Memory holds at most one file. Use as a context manager, like `LatentPartWriter`."""

    def __init__(self, out_dir: str | Path, meta: TextMeta):
        self.out_dir, self.meta = Path(out_dir), meta
        self._dtype = DTYPES[meta.dtype] if meta.form == "states" else torch.int32
        self._texts: dict[str, list] = {name: [] for name in TEXTS.names}
        self._captions: dict[str, list] = {name: [] for name in CAPTIONS.names}
        self._pending: list[torch.Tensor] = []
        self._file, self._begin = 0, 0

    def __enter__(self) -> TextPartWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def add_text(self, tokens: torch.Tensor) -> int:
        """Adds one text without the prefix, states [L, D] or ids [L]. Returns its row in texts.parquet."""
        width = self.meta.text_dim if self.meta.form == "states" else None
        if not len(tokens) or tokens.shape[1:] != ((width,) if width else ()):
            raise ValueError(f"a text of shape {list(tokens.shape)} does not fit [1 or more, {width}]")
        stored = tokens.detach().to("cpu", self._dtype)
        for name, value in zip(TEXTS.names, (len(stored), self._file, self._begin, checksum(stored)), strict=True):
            self._texts[name].append(value)
        self._pending.append(stored)
        self._begin += len(stored)
        if self._begin * stored[0].numel() * stored.element_size() >= TEXT_FILE_BYTES:
            self._flush()
        return len(self._texts["tokens"]) - 1

    def add_captions(self, row: int, tier: str, texts: Sequence[int], episode: str = "rest") -> None:
        """Adds a record whose captions are these rows of texts.parquet. `episode`: of the record."""
        rows = [int(text) for text in texts]
        known = len(self._texts["tokens"])
        if any(not 0 <= text < known for text in rows):
            raise ValueError(f"row {row}: text rows {rows} must be of the {known} rows added so far")
        for name, value in zip(CAPTIONS.names, (row, tier, episode, rows), strict=True):
            self._captions[name].append(value)

    def close(self) -> None:
        if self._pending:
            self._flush()
        pq.write_table(pa.table(self._texts, schema=TEXTS), self.out_dir / TEXTS_FILE)
        pq.write_table(pa.table(self._captions, schema=CAPTIONS), self.out_dir / CAPTIONS_FILE)
        write_json(self.out_dir / META, self.meta.model_dump())

    def _flush(self) -> None:
        path = self.out_dir / text_file(self._file)
        path.parent.mkdir(exist_ok=True)
        save_file({"texts": torch.cat(self._pending).contiguous()}, path)
        self._pending, self._file, self._begin = [], self._file + 1, 0


def write_prefix(out_dir: str | Path, meta: TextMeta, prefix: torch.Tensor, empty: torch.Tensor) -> None:
    """Writes the part named PREFIX: states [P, D] or ids [P] of the common prefix, and of the rest of the empty prompt."""
    dtype = DTYPES[meta.dtype] if meta.form == "states" else torch.int32
    assert len(prefix) == meta.prefix_tokens and len(empty), (prefix.shape, empty.shape)
    tensors = {"prefix": prefix, "empty": empty}
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}, Path(out_dir) / PREFIX_FILE)
    write_json(Path(out_dir) / META, meta.model_dump())


def map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file as views of a memory map. Data is read when it is accessed.

    The safetensors library copies whole tensors (or ranges of rows), but a batch needs scattered rows.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch refuses read-only buffers
    header_bytes = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if begin == end:
                tensors[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            flat = torch.frombuffer(
                mapped, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=8 + header_bytes + begin
            )
            tensors[name] = flat.view(entry["shape"])
    return tensors
