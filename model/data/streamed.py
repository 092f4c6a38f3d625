"""A latents directory whose tensors stay where they are, an object store or a folder: a batch reads its rows alone.

    directory/  meta.json, index.parquet, text/index.parquet   here, verified against the manifest
    location/   *.safetensors                                  there, read by byte ranges

Part of a file cannot be checked against the file's SHA-256. The indices hold a CRC-32 of each row, and are themselves
covered by the manifest; so is, by them, every byte that is read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from model import storage
from model.data.latents import DTYPES, INDEX, TEXT_INDEX, LatentDataset, latent_file, text_file

HEADER_BYTES = 1024  # read at a file's beginning; the headers, of one or two tensors, have some 150
HEADERS_KEPT = 1 << 20  # 0.2 kB each; when there are more, all are forgotten


class StreamedLatents(LatentDataset):
    """Reads the same as `LatentDataset`, to the bit. Several threads may read, and a fork of this process.

    Args:
        directory: the indices, and meta.json.
        location: a folder or URI that holds the safetensors files under the same names.

    Raises:
        ValueError: the latents were written without checksums of rows; when read, a row that is not what was written.
        ConnectionError, FileNotFoundError, PermissionError: when read, see `storage.read_ranges`.
    """

    def __init__(self, directory: str | Path, location: str | os.PathLike):
        self.location = str(location)
        self._data_begin: dict[tuple[str, str], int] = {}
        indices = (("index.parquet", INDEX), ("text/index.parquet", TEXT_INDEX))
        for name, schema in indices:
            path = Path(directory) / name
            if not path.is_file() or not set(schema.names) <= set(pq.read_schema(path).names):
                raise ValueError(
                    f"the latents in {directory} were written without checksums of their rows ({name}), and "
                    "train.latents='stream' checks what it reads by them: encode them again, or set "
                    "train.latents='download'"
                )
        super().__init__(directory)
        self.crc32, self.text_crc32 = (
            pq.read_table(Path(directory) / name, columns=["crc32"])["crc32"].to_numpy() for name, _ in indices
        )

    def _read_text_lengths(self) -> np.ndarray:
        return pq.read_table(self.directory / "text" / "index.parquet", columns=["length"])["length"].to_numpy()

    def _read_latents(self, rows: np.ndarray, bucket: str) -> torch.Tensor:
        columns, lines = (side * self.meta.patch_size for side in reversed(self.bucket_tokens(bucket)))
        shape = (self.meta.latent_channels, lines, columns)
        dtype = DTYPES[self.meta.dtype]
        size = dtype.itemsize * int(np.prod(shape))
        shard, offset = np.divmod(self.place[rows].astype(np.int64), self.meta.rows_per_shard)
        parts = self._rows(
            "latents",
            [(latent_file(bucket, s), o * size, (o + 1) * size) for s, o in zip(shard.tolist(), offset.tolist())],
            self.crc32[rows],
            lambda i: f"record {self.record_ids(rows[i : i + 1])[0]} (row {rows[i]})",
        )
        return torch.frombuffer(bytearray().join(parts), dtype=dtype).view(len(rows), *shape)

    def _read_text(self, text_rows: np.ndarray, tokens: int) -> torch.Tensor:
        """Reads the real tokens, which the checksum covers: the rest of a row are zeros. A text row is read once."""
        dtype = DTYPES[self.meta.dtype]
        token = dtype.itemsize * self.meta.text_dim
        distinct, place = np.unique(text_rows, return_inverse=True)
        shard, offset = np.divmod(distinct, self.meta.text_rows_per_shard)
        begin = offset * self.meta.text_tokens * token
        end = begin + self.text_lengths[distinct].astype(np.int64) * token
        parts = self._rows(
            "embeds",
            [(text_file(s), b, e) for s, b, e in zip(shard.tolist(), begin.tolist(), end.tolist())],
            self.text_crc32[distinct],
            lambda i: f"text row {distinct[i]}",
        )
        embeds = torch.zeros(len(parts), tokens, self.meta.text_dim, dtype=dtype)
        for row, part in zip(embeds, parts):
            real = torch.frombuffer(bytearray(part), dtype=dtype).view(-1, self.meta.text_dim)[:tokens]
            row[: len(real)] = real
        return embeds[torch.from_numpy(place)]

    def _rows(
        self, tensor: str, ranges: Sequence[tuple[str, int, int]], checksums: np.ndarray, name: Callable[[int], str]
    ) -> list[bytes]:
        """The bytes [begin, end) within a tensor of each (file, begin, end); `name(i)` is for the error's message."""
        first = self._first_bytes(tensor, {file for file, _, _ in ranges})
        ranges = [(file, first[file] + begin, first[file] + end) for file, begin, end in ranges]
        parts = storage.read_ranges(self.location, ranges)
        for i, (part, checksum, (file, begin, end)) in enumerate(zip(parts, checksums.tolist(), ranges, strict=True)):
            if zlib.crc32(part) != checksum:
                raise ValueError(
                    f"{name(i)}: bytes {begin} to {end} of {storage.join(self.location, file)} are not what was written: "
                    "their CRC-32 is not the index's"
                )
        return parts

    def _first_bytes(self, tensor: str, files: set[str]) -> dict[str, int]:
        """Where a tensor's data begins in each file, by the files' headers, which are read once."""
        known = self._data_begin  # another thread may forget them all
        found = {file: known[file, tensor] for file in files if (file, tensor) in known}
        missing = sorted(files - found.keys())
        if missing:
            headers = storage.read_ranges(self.location, [(file, 0, HEADER_BYTES) for file in missing])
            for file, header in zip(missing, headers):
                found[file] = _data_begin(header, tensor, storage.join(self.location, file))
            if len(known) + len(missing) > HEADERS_KEPT:
                known = self._data_begin = {}
            known |= {(file, tensor): found[file] for file in missing}
        return found


def _data_begin(header: bytes, tensor: str, file: str) -> int:
    """Where a tensor's data begins, by the first bytes of a safetensors file."""
    end = 8 + int.from_bytes(header[:8], "little")
    try:
        return end + json.loads(header[8:end])[tensor]["data_offsets"][0]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is no safetensors file of {tensor} that was written here") from error
