"""Latent shards: their format, a writer, and a reader with O(1) random reads.

    meta.json                                  LatentMeta; written last, so a directory without it is unfinished
    index.parquet                              one row per image: row, record_id, bucket, shard, offset, tier, text_rows,
                                               crc32 of the latent's bytes
    bucket-{W}x{H}/latents-{i:05d}.safetensors "latents" [n, C, H/8, W/8], normalised: (z - mean) / std
    text/text-{i:05d}.safetensors              "embeds" [m, T, D], right-padded with zeros; "lengths" [m] int32
    text/index.parquet                         one row per text: length, crc32 of its real tokens' bytes

Text row 0 is the empty prompt: dropped captions and the unconditional half of guidance use it.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file

from model.config import Positive, Section

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
INDEX = pa.schema(
    [
        ("row", pa.int64()),
        ("record_id", pa.string()),
        ("bucket", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int32()),
        ("tier", pa.string()),
        ("text_rows", pa.list_(pa.int32())),
        ("crc32", pa.uint32()),
    ]
)
TEXT_INDEX = pa.schema([("length", pa.int32()), ("crc32", pa.uint32())])
EMPTY_TEXT_ROW = 0
TEXT_LENGTH_MULTIPLE = 8  # the pipeline's processor pads prompts to a multiple of 8


class LatentMeta(Section):
    """`meta.json`. `buckets` (images per bucket) and `text_rows` are filled in by the writer."""

    latent_channels: Positive = 16
    vae_scale: Positive = 8
    patch_size: Positive = 2
    text_dim: Positive
    text_tokens: Positive  # T: every stored text row is padded to it
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rows_per_shard: Positive = 4096
    text_rows_per_shard: Positive = 4096
    text_rows: Annotated[int, Field(ge=0)] = 0
    buckets: dict[str, int] = {}


def latent_file(bucket: str, shard: int) -> str:
    return f"bucket-{bucket}/latents-{shard:05d}.safetensors"


def text_file(shard: int) -> str:
    return f"text/text-{shard:05d}.safetensors"


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes: 4 bytes for each row of an index that every rank holds. It is to find damage, as the
    manifest's SHA-256 does for whole files: who can replace a row can replace the manifest too."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())


class LatentWriter:
    """Writes a latents directory, shard by shard; at most one shard per bucket is held in memory.

    Use as a context manager: `meta.json` and the index are written only if the block ends without an error.
    The first text row must be the empty prompt.
    """

    def __init__(self, out_dir: str | Path, meta: LatentMeta | Mapping[str, Any]):
        self.out_dir = Path(out_dir)
        self.meta = meta if isinstance(meta, LatentMeta) else LatentMeta(**meta)
        if self.meta.text_tokens % TEXT_LENGTH_MULTIPLE:
            raise ValueError(f"text_tokens={self.meta.text_tokens} must be a multiple of {TEXT_LENGTH_MULTIPLE}")
        self._dtype = DTYPES[self.meta.dtype]
        self._pending: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._text_pending: list[torch.Tensor] = []
        self._text_count = 0
        self._index: dict[str, list] = {name: [] for name in INDEX.names}
        self._text_index: dict[str, list] = {name: [] for name in TEXT_INDEX.names}
        self._closed = False

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def add_text(self, embeds: torch.Tensor) -> int:
        """Adds one prompt's embeddings [L, D], without padding, and returns its text row."""
        length, dim = embeds.shape
        if dim != self.meta.text_dim or not 0 < length <= self.meta.text_tokens:
            raise ValueError(
                f"text embeddings of shape {list(embeds.shape)} do not fit [1..{self.meta.text_tokens}, {self.meta.text_dim}]"
            )
        stored = embeds.detach().to("cpu", self._dtype)
        self._text_pending.append(stored)
        self._text_index["length"].append(length)
        self._text_index["crc32"].append(checksum(stored))
        self._text_count += 1
        if len(self._text_pending) == self.meta.text_rows_per_shard:
            self._flush_text()
        return self._text_count - 1

    def add_image(self, record_id: str, latent: torch.Tensor, tier: str, text_rows: Sequence[int]) -> int:
        """Adds one normalised latent [C, h, w] with the text rows of its captions, and returns its row."""
        channels, height, width = latent.shape
        if channels != self.meta.latent_channels:
            raise ValueError(f"latent of {record_id} has {channels} channels, expected {self.meta.latent_channels}")
        if height % self.meta.patch_size or width % self.meta.patch_size:
            raise ValueError(f"latent of {record_id} is {height}x{width}: not a multiple of the patch size")
        rows = [int(row) for row in text_rows]
        if not rows or any(not 0 <= row < self._text_count for row in rows):
            raise ValueError(f"{record_id}: text rows {rows} must be of the {self._text_count} rows added so far")
        scale = self.meta.vae_scale
        bucket = f"{width * scale}x{height * scale}"
        shard, offset = divmod(self._counts.get(bucket, 0), self.meta.rows_per_shard)
        row = len(self._index["row"])
        stored = latent.detach().to("cpu", self._dtype)
        values = (row, record_id, bucket, shard, offset, tier, rows, checksum(stored))
        for name, value in zip(self._index, values, strict=True):
            self._index[name].append(value)
        pending = self._pending.setdefault(bucket, [])
        pending.append(stored)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        if len(pending) == self.meta.rows_per_shard:
            self._flush_bucket(bucket)
        return row

    def close(self) -> LatentMeta:
        """Writes what is pending, the index and, last, meta.json."""
        assert not self._closed, "LatentWriter.close() was called twice"
        if not self._text_count or not self._index["row"]:
            raise ValueError(
                f"a latents directory needs the empty prompt and at least one image, got {self._text_count} texts "
                f"and {len(self._index['row'])} images"
            )
        self._closed = True
        if self._text_pending:
            self._flush_text()
        for bucket in list(self._pending):
            if self._pending[bucket]:
                self._flush_bucket(bucket)
        pq.write_table(pa.table(self._index, schema=INDEX), self.out_dir / "index.parquet")
        pq.write_table(pa.table(self._text_index, schema=TEXT_INDEX), self.out_dir / "text" / "index.parquet")
        self.meta = self.meta.model_copy(
            update={"buckets": dict(sorted(self._counts.items())), "text_rows": self._text_count}
        )
        temporary = self.out_dir / "meta.json.tmp"
        temporary.write_text(json.dumps(self.meta.model_dump(), indent=2) + "\n")
        os.replace(temporary, self.out_dir / "meta.json")
        return self.meta

    def _flush_bucket(self, bucket: str) -> None:
        shard = (self._counts[bucket] - 1) // self.meta.rows_per_shard
        path = self.out_dir / latent_file(bucket, shard)
        path.parent.mkdir(exist_ok=True)
        save_file({"latents": torch.stack(self._pending[bucket]).contiguous()}, path)
        self._pending[bucket] = []

    def _flush_text(self) -> None:
        shard = (self._text_count - 1) // self.meta.text_rows_per_shard
        path = self.out_dir / text_file(shard)
        path.parent.mkdir(exist_ok=True)
        embeds = torch.zeros(len(self._text_pending), self.meta.text_tokens, self.meta.text_dim, dtype=self._dtype)
        for i, text in enumerate(self._text_pending):
            embeds[i, : len(text)] = text
        lengths = torch.tensor([len(text) for text in self._text_pending], dtype=torch.int32)
        save_file({"embeds": embeds, "lengths": lengths}, path)
        self._text_pending = []


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file as views of a memory map: nothing is read until it is used.

    safetensors' own reader copies whole tensors (or a range of rows); a batch needs scattered rows.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch refuses read-only buffers
    header_bytes = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(
                mapped, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=8 + header_bytes + begin
            )
            tensors[name] = flat.view(entry["shape"])
    return tensors


def _gather(shard_of: Callable[[int], torch.Tensor], shard_ids: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """Rows (shard_ids[i], offsets[i]) of equally shaped shards, as one tensor of their type."""
    order = torch.from_numpy(np.ascontiguousarray(offsets, dtype=np.int64))
    present = np.unique(shard_ids)
    if len(present) == 1:
        return shard_of(int(present[0])).index_select(0, order)
    out = None
    for shard_id in present:
        where = torch.from_numpy(np.flatnonzero(shard_ids == shard_id))
        shard = shard_of(int(shard_id))
        out = torch.empty(len(offsets), *shard.shape[1:], dtype=shard.dtype) if out is None else out
        out[where] = shard.index_select(0, order[where])
    return out


def read_meta(directory: str | Path) -> LatentMeta:
    """
    Raises:
        ValueError: it is not a finished latents directory.
    """
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a finished latents directory: it has no meta.json")
    return LatentMeta(**json.loads(path.read_text()))


class LatentDataset:
    """Reads a latents directory. Any row costs the same, wherever it lies.

    Files are memory-mapped when they are first read, and the MAPPED_FILES read last stay so: a mapping holds a file
    descriptor, of which a process commonly has 1024. Several threads may read.
    """

    MAPPED_FILES = 256

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        self.bucket_names = sorted(self.meta.buckets)
        # Every rank holds these, so each number takes the fewest bytes that fit, and one column is read at a time.
        self.tier_names, self.tier = _codes(self._column("tier"))
        names, codes = _codes(self._column("bucket"))
        self.bucket = packed(np.array([self.bucket_names.index(name) for name in names]))[codes]
        self.place = packed(  # in its bucket
            self._column("shard").to_numpy().astype(np.int64) * self.meta.rows_per_shard
            + self._column("offset").to_numpy()
        )
        captions = self._column("text_rows").chunks
        self.caption_rows = np.concatenate([chunk.flatten().to_numpy() for chunk in captions])
        counts = np.concatenate([[0], *(chunk.value_lengths().to_numpy() for chunk in captions)])
        self.caption_begin = packed(np.cumsum(counts))
        self._map = functools.lru_cache(self.MAPPED_FILES)(_map_safetensors)
        self.text_lengths = packed(self._read_text_lengths())

    def __len__(self) -> int:
        return len(self.bucket)

    def bucket_tokens(self, bucket: str) -> tuple[int, int]:
        """(rows, columns) of image tokens of a bucket named WxH in pixels."""
        width, height = (int(side) // (self.meta.vae_scale * self.meta.patch_size) for side in bucket.split("x"))
        return height, width

    def latents(self, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Latents [n, C, h, w] float32 of rows that share one bucket."""
        rows = np.asarray(rows, dtype=np.int64)
        bucket = int(self.bucket[rows[0]])
        assert (self.bucket[rows] == bucket).all(), "rows of one batch must share a bucket"
        return self._read_latents(rows, self.bucket_names[bucket]).float()

    def text(
        self, text_rows: np.ndarray | Sequence[int], tokens: int | None = None, widen: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """Embeddings [n, T, D] float32 and their mask [n, T] bool, or None where every token is real.

        Args:
            text_rows: global text rows.
            tokens: T; by default the longest of these rows, rounded up to a multiple of 8 as the pipeline does.
            widen: False leaves the embeddings in the type that they are stored in.
        """
        text_rows = np.asarray(text_rows, dtype=np.int64)
        lengths = self.text_lengths[text_rows].astype(np.int64)
        if tokens is None:
            tokens = self.padded_length(text_rows)
        embeds = self._read_text(text_rows, tokens)
        if widen:
            embeds = embeds.float()
        if (lengths == tokens).all():
            return embeds, None
        return embeds, torch.arange(tokens) < torch.from_numpy(lengths)[:, None]

    def padded_length(self, text_rows: np.ndarray) -> int:
        longest = int(self.text_lengths[text_rows].max())
        return -(-longest // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE

    def captions(self, row: int) -> np.ndarray:
        """Text rows of an image's captions."""
        return self.caption_rows[self.caption_begin[row] : self.caption_begin[row + 1]]

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of the index; words as codes, which hold them once."""
        return pq.ParquetFile(self.directory / "index.parquet", read_dictionary=["bucket", "tier"]).read([name])[name]

    def _read_text_lengths(self) -> np.ndarray:
        shards = range(-(-self.meta.text_rows // self.meta.text_rows_per_shard))
        lengths = [safe_open(self.directory / text_file(s), framework="pt").get_tensor("lengths") for s in shards]
        return torch.cat(lengths).numpy()

    def _read_latents(self, rows: np.ndarray, bucket: str) -> torch.Tensor:
        shard, offset = np.divmod(self.place[rows].astype(np.int64), self.meta.rows_per_shard)
        return _gather(lambda shard: self._map(self.directory / latent_file(bucket, shard))["latents"], shard, offset)

    def _read_text(self, text_rows: np.ndarray, tokens: int) -> torch.Tensor:
        shard, offset = np.divmod(text_rows, self.meta.text_rows_per_shard)
        return _gather(lambda shard: self._map(self.directory / text_file(shard))["embeds"][:, :tokens], shard, offset)

    def record_ids(self, rows: Iterable[int]) -> list[str]:
        """Record ids of rows, read when asked for, one row group at a time: training never needs the column."""
        wanted, found = np.asarray(list(rows), dtype=np.int64), {}
        index = pq.ParquetFile(self.directory / "index.parquet")
        begin = 0
        for group in range(index.num_row_groups):
            end = begin + index.metadata.row_group(group).num_rows
            here = wanted[(begin <= wanted) & (wanted < end)]
            if len(here):
                column = index.read_row_group(group, columns=["record_id"])["record_id"]
                found |= {int(row): column[int(row) - begin].as_py() for row in here}
            begin = end
        return [found[int(row)] for row in wanted]


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """The words of a dictionary-encoded column, and for each row the index of its word."""
    column = column.unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    return column.chunk(0).dictionary.to_pylist(), packed(codes)


def packed(values: np.ndarray) -> np.ndarray:
    """The same whole numbers from 0 on, in the fewest bytes that hold the largest."""
    return values.astype(np.min_scalar_type(values.max()))
