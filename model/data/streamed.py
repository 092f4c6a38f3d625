"""Streams latents and texts: tensors stay in an object store or folder, and a batch reads only the byte ranges of its rows.

    directory/          the index, and the prefix of all texts     local
    part locations      *.safetensors                              remote, read by byte ranges

A part of a file cannot be checked against the file's SHA-256. Every read is checked against the CRC-32 of its latent or
text instead, which the index has from tables that the manifests of the parts cover.
The reasons are in docs/decisions/checkpoints.md.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from model import storage
from model.data.files import DTYPES, latent_file, text_file
from model.data.latents import LatentDataset

HEADER_BYTES = 1024  # read from the beginning of a file; headers with one tensor have about 100 bytes
HEADERS_KEPT = 1 << 20  # of about 0.2 kB each in memory; the cache is cleared when it is full


class StreamedLatents(LatentDataset):
    """Returns the same bits as `LatentDataset`. Safe for threads and after a fork.

    Args:
        directory: the index.
        location: the base folder or URI of relative part locations.

    Raises:
        ValueError: parts are in several stores; when reading, a row does not match its checksum.
        ConnectionError, FileNotFoundError, PermissionError: when reading, see `storage.read_ranges`.
    """

    def __init__(self, directory: str | Path, location: str | Path):
        super().__init__(directory)
        self._data_begin: dict[str, int] = {}
        locations = [_absolute(str(location), path) for part in self.parts for path in (part.latents_at, part.texts_at)]
        self.location = common_folder(locations)
        relative = [path[len(self.location) :].strip("/") for path in locations]
        self._latents_at, self._texts_at = relative[::2], relative[1::2]

    def _read_latents(self, rows: np.ndarray, bucket: str) -> torch.Tensor:
        columns, lines = (side * self.meta.patch_size for side in reversed(self.bucket_tokens(bucket)))
        shape = (self.meta.latent_channels, lines, columns)
        dtype = DTYPES[self.meta.dtype]
        size = dtype.itemsize * int(np.prod(shape))
        part, file, offset = (column.tolist() for column in self.latent_places(rows))
        pieces = self._rows(
            "latents",
            [
                (storage.join(self._latents_at[p], latent_file(bucket, f)), o * size, (o + 1) * size)
                for p, f, o in zip(part, file, offset, strict=True)
            ],
            self.crc32[rows],
            lambda i: f"record {self.record_ids(rows[i : i + 1])[0]} (row {rows[i]})",
        )
        return torch.frombuffer(bytearray().join(pieces), dtype=dtype).view(len(rows), *shape)

    def _read_texts(self, text_rows: np.ndarray) -> list[torch.Tensor]:
        empty = self.prefix["empty"]
        token_bytes = empty[0].numel() * empty.element_size()
        part, file, begin, tokens = self.text_places(text_rows)
        stored = np.flatnonzero(part >= 0)
        texts = [empty] * len(text_rows)
        if len(stored):
            pieces = self._rows(
                "texts",
                [
                    (
                        storage.join(self._texts_at[part[i]], text_file(int(file[i]))),
                        b,
                        b + int(tokens[i]) * token_bytes,
                    )
                    for i, b in zip(stored, (begin[stored] * token_bytes).tolist(), strict=True)
                ],
                self.text_crc32[text_rows[stored]],
                lambda i: f"text row {text_rows[stored[i]]}",
            )
            for i, piece in zip(stored, pieces, strict=True):
                texts[i] = torch.frombuffer(bytearray(piece), dtype=empty.dtype).view(-1, *empty.shape[1:])
        return texts

    def _rows(
        self, tensor: str, ranges: Sequence[tuple[str, int, int]], checksums: np.ndarray, name: Callable[[int], str]
    ) -> list[bytes]:
        """The bytes [begin, end) of a tensor's data, for each (file, begin, end). `name(i)` names row i in an error."""
        first = self._first_bytes(tensor, {file for file, _, _ in ranges})
        ranges = [(file, first[file] + begin, first[file] + end) for file, begin, end in ranges]
        pieces = storage.read_ranges(self.location, ranges)
        for i, (piece, checksum, (file, begin, end)) in enumerate(zip(pieces, checksums.tolist(), ranges, strict=True)):
            if zlib.crc32(piece) != checksum:
                raise ValueError(
                    f"{name(i)}: bytes {begin} to {end} of {storage.join(self.location, file)} are corrupt: their CRC-32 "
                    "differs from the index's"
                )
        return pieces

    def _first_bytes(self, tensor: str, files: set[str]) -> dict[str, int]:
        """The offset of a tensor's data in each file, from the files' headers, which are read once and cached."""
        known = self._data_begin  # another thread may replace the cache
        begins = {file: known[file] for file in files if file in known}
        missing = sorted(files - begins.keys())
        if missing:
            headers = storage.read_ranges(self.location, [(file, 0, HEADER_BYTES) for file in missing])
            for file, header in zip(missing, headers, strict=True):
                begins[file] = _data_begin(header, tensor, storage.join(self.location, file))
            if len(known) + len(missing) > HEADERS_KEPT:
                known = self._data_begin = {}
            known |= {file: begins[file] for file in missing}
        return begins


def _absolute(location: str, place: str) -> str:
    return place if storage.is_remote(place) or place.startswith("/") else storage.join(location, place)


def common_folder(places: Sequence[str]) -> str:
    """The deepest folder that contains all paths or URIs, so that one call can read from all of them.

    Raises:
        ValueError: the URIs are in several stores.
    """
    steps = [place.rstrip("/").split("/") for place in places]
    shortest = min(map(len, steps))
    same = next((i for i in range(shortest) if len({step[i] for step in steps}) > 1), shortest)
    folder = "/".join(steps[0][:same])
    if any(map(storage.is_remote, places)) and same < 3:
        raise ValueError(
            f"latents and texts are in several stores, such as {places[0]} and {places[-1]}; stream from one"
        )
    return folder or "/"


def _data_begin(header: bytes, tensor: str, file: str) -> int:
    """The offset of a tensor's data in a safetensors file, from the file's first bytes."""
    end = 8 + int.from_bytes(header[:8], "little")
    try:
        return end + json.loads(header[8:end])[tensor]["data_offsets"][0]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is not a safetensors file with a tensor {tensor!r}") from error
