"""Latents and texts whose tensors stay where they are, an object store or a folder: a batch reads its rows alone.

    directory/          the index, and the prefix of all texts     here
    part locations      *.safetensors                              there, read by byte ranges

Part of a file cannot be checked against the file's SHA-256. The index has a CRC-32 of each latent and text, taken from
tables that the manifests of the parts cover; so is, by them, every byte that is read.
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

HEADER_BYTES = 1024  # read at a file's beginning; the headers, of one tensor, have some 100
HEADERS_KEPT = 1 << 20  # 0.2 kB each; when there are more, all are forgotten


class StreamedLatents(LatentDataset):
    """Reads the same as `LatentDataset`, to the bit. Several threads may read, and a fork of this process.

    Args:
        directory: the index.
        location: a folder or URI that relative locations of parts start from.

    Raises:
        ValueError: parts in several stores; when read, a row that is not what was written.
        ConnectionError, FileNotFoundError, PermissionError: when read, see `storage.read_ranges`.
    """

    def __init__(self, directory: str | Path, location: str | Path):
        super().__init__(directory)
        self._data_begin: dict[str, int] = {}
        at = [_absolute(str(location), place) for part in self.parts for place in (part.latents_at, part.texts_at)]
        self.location = common_folder(at)
        inside = [place[len(self.location) :].strip("/") for place in at]
        self._latents_at, self._texts_at = inside[::2], inside[1::2]

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
        kind = self.prefix["empty"]
        token = kind[0].numel() * kind.element_size()
        part, file, begin, tokens = self.text_places(text_rows)
        stored = np.flatnonzero(part >= 0)
        found = [kind] * len(text_rows)
        if len(stored):
            pieces = self._rows(
                "texts",
                [
                    (storage.join(self._texts_at[part[i]], text_file(int(file[i]))), b, b + int(tokens[i]) * token)
                    for i, b in zip(stored, (begin[stored] * token).tolist(), strict=True)
                ],
                self.text_crc32[text_rows[stored]],
                lambda i: f"text row {text_rows[stored[i]]}",
            )
            for i, piece in zip(stored, pieces, strict=True):
                found[i] = torch.frombuffer(bytearray(piece), dtype=kind.dtype).view(-1, *kind.shape[1:])
        return found

    def _rows(
        self, tensor: str, ranges: Sequence[tuple[str, int, int]], checksums: np.ndarray, name: Callable[[int], str]
    ) -> list[bytes]:
        """The bytes [begin, end) within a tensor of each (file, begin, end); `name(i)` is for the error's message."""
        first = self._first_bytes(tensor, {file for file, _, _ in ranges})
        ranges = [(file, first[file] + begin, first[file] + end) for file, begin, end in ranges]
        pieces = storage.read_ranges(self.location, ranges)
        for i, (piece, checksum, (file, begin, end)) in enumerate(zip(pieces, checksums.tolist(), ranges, strict=True)):
            if zlib.crc32(piece) != checksum:
                raise ValueError(
                    f"{name(i)}: bytes {begin} to {end} of {storage.join(self.location, file)} are not what was written: "
                    "their CRC-32 is not the index's"
                )
        return pieces

    def _first_bytes(self, tensor: str, files: set[str]) -> dict[str, int]:
        """Where a tensor's data begins in each file, by the files' headers, which are read once."""
        known = self._data_begin  # another thread may forget them all
        found = {file: known[file] for file in files if file in known}
        missing = sorted(files - found.keys())
        if missing:
            headers = storage.read_ranges(self.location, [(file, 0, HEADER_BYTES) for file in missing])
            for file, header in zip(missing, headers, strict=True):
                found[file] = _data_begin(header, tensor, storage.join(self.location, file))
            if len(known) + len(missing) > HEADERS_KEPT:
                known = self._data_begin = {}
            known |= {file: found[file] for file in missing}
        return found


def _absolute(location: str, place: str) -> str:
    return place if storage.is_remote(place) or place.startswith("/") else storage.join(location, place)


def common_folder(places: Sequence[str]) -> str:
    """The longest folder that all paths or URIs are in: their bytes are asked for in one call.

    Raises:
        ValueError: they are in several stores.
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
    """Where a tensor's data begins, by the first bytes of a safetensors file."""
    end = 8 + int.from_bytes(header[:8], "little")
    try:
        return end + json.loads(header[8:end])[tensor]["data_offsets"][0]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is no safetensors file of {tensor} that was written here") from error
