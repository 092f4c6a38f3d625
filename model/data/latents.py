"""Reads latents and texts through the index of a node (model/data/index.py). Every random read costs O(1).

Text row 0 is the empty prompt, for dropped captions and for the unconditional prediction of guidance.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from model.constants import PAD_MULTIPLE
from model.data.files import (
    CAPTIONS_FILE,
    PREFIX_FILE,
    ROWS_FILE,
    TEXTS_FILE,
    LatentMeta,
    LatentPartWriter,
    TextMeta,
    TextPartWriter,
    latent_file,
    map_safetensors,
    text_file,
    write_prefix,
)
from model.data.index import IMAGES, LOCATIONS, RUNS, TEXTS, IndexMeta, PartFiles, build_index, read_index_meta

EMPTY_TEXT_ROW = 0


class LatentDataset:
    """Latents and texts of a stage, with random access.

    Files are memory-mapped at their first read. The MAPPED_FILES most recently used stay mapped: each mapping takes a file
    descriptor, and the limit of a process is commonly 1024. Thread-safe.
    """

    MAPPED_FILES = 256

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.meta: IndexMeta = read_index_meta(self.directory)
        self.bucket_names = list(self.meta.buckets)
        self.tier_names = list(self.meta.tiers)
        # Number of images [buckets, tiers]. Images of bucket b are rows bucket_begin[b] to bucket_begin[b + 1].
        self.counts = np.array(list(self.meta.buckets.values()), dtype=np.int64)
        self.bucket_begin = np.concatenate([[0], np.cumsum(self.counts.sum(1))])
        for name in (*IMAGES, *TEXTS):
            setattr(self, name, np.load(self.directory / f"{name}.npy", mmap_mode="r"))
        self.group_counts = np.array(list(self.meta.group_counts.values()), dtype=np.int64)  # [buckets, groups]
        self.by_group = np.load(self.directory / "by_group.npy", mmap_mode="r") if self.meta.groups else None
        self.runs, self.text_runs = (np.load(self.directory / f"{name}.npy") for name in RUNS)
        places = json.loads((self.directory / LOCATIONS).read_text())
        self.parts = [PartFiles(**part) for part in places["parts"]]
        self.prefix = map_safetensors(self.directory / places["prefix"] / PREFIX_FILE)
        self._map = functools.lru_cache(self.MAPPED_FILES)(map_safetensors)

    def __len__(self) -> int:
        return int(self.bucket_begin[-1])

    def bucket_of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """The bucket of each row, as an index into `bucket_names`."""
        return np.searchsorted(self.bucket_begin, np.asarray(rows), "right") - 1

    def bucket_tokens(self, bucket: str) -> tuple[int, int]:
        """(rows, columns) of image tokens of a bucket named WxH in pixels."""
        width, height = (int(side) // (self.meta.vae_scale * self.meta.patch_size) for side in bucket.split("x"))
        return height, width

    def latents(self, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Latents [n, C, h, w] float32 of rows that share one bucket."""
        rows = np.asarray(rows, dtype=np.int64)
        bucket = self.bucket_of(rows)
        assert (bucket == bucket[0]).all(), "rows of one batch must share a bucket"
        return self._read_latents(rows, self.bucket_names[bucket[0]]).float()

    def text(
        self, text_rows: np.ndarray | Sequence[int], tokens: int | None = None, widen: bool = True
    ) -> tuple[torch.Tensor, Any]:
        """Texts, and their mask [n, T] bool or None if no text is padded.

        Args:
            text_rows: global text rows.
            tokens: T; None takes the longest of these texts, rounded up to a multiple of 8 as the pipeline does.
            widen: convert states to float32; False keeps the stored type.

        Returns:
            states [n, T, D], padded with zeros; for texts of form "tokens" the ids [n, T - P] int64 after the prefix of P
            tokens, padded with zeros.
        """
        text_rows = np.asarray(text_rows, dtype=np.int64)
        if tokens is None:
            tokens = self.padded_length(text_rows)
        distinct, where = np.unique(text_rows, return_inverse=True)
        lengths = self.text_lengths(text_rows)
        prefix = self.prefix["prefix"]
        begin = self.meta.prefix_tokens if self.meta.text_form == "states" else 0
        length = tokens - self.meta.prefix_tokens + begin
        out = torch.zeros(len(distinct), length, *prefix.shape[1:], dtype=prefix.dtype)
        out[:, :begin] = prefix[:begin]
        for row, text in zip(out, self._read_texts(distinct), strict=True):
            row[begin : begin + len(text)] = text[: tokens - self.meta.prefix_tokens]
        text = out if len(distinct) == len(text_rows) and (where == np.arange(len(where))).all() else out[where]
        if self.meta.text_form == "tokens":
            text = text.long()
        elif widen:
            text = text.float()
        if (lengths == tokens).all():
            return text, None
        return text, torch.arange(tokens) < torch.from_numpy(lengths)[:, None]

    def text_lengths(self, text_rows: np.ndarray) -> np.ndarray:
        """Number of tokens of each text, including the prefix."""
        return np.asarray(self.text_tokens[text_rows], dtype=np.int64) + self.meta.prefix_tokens

    def padded_length(self, text_rows: np.ndarray) -> int:
        longest = int(self.text_lengths(text_rows).max())
        return -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE

    def captions(self, row: int) -> np.ndarray:
        """Text rows of an image's captions."""
        return np.asarray(self.caption_texts[int(self.caption_begin[row]) : int(self.caption_begin[row + 1])])

    def latent_places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(part, file, row in the file) of each image."""
        part = self.runs[np.searchsorted(self.runs[:, 0], rows, "right") - 1, 1]
        file, offset = np.divmod(np.asarray(self.place[rows], dtype=np.int64), self.meta.rows_per_file)
        return part, file, offset

    def text_places(self, text_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(part, file, first token in the file, number of tokens) of each text; part -1 is the PREFIX part."""
        part, file = self.text_runs[np.searchsorted(self.text_runs[:, 0], text_rows, "right") - 1, 1:].T
        begin, tokens = (np.asarray(column[text_rows], np.int64) for column in (self.text_begin, self.text_tokens))
        return part, file, begin, tokens

    def _read_latents(self, rows: np.ndarray, bucket: str) -> torch.Tensor:
        part, file, offset = self.latent_places(rows)
        out: torch.Tensor | None = None
        for part_number, file_number in np.unique(np.stack([part, file], 1), axis=0):
            where = np.flatnonzero((part == part_number) & (file == file_number))
            path = self.directory / self.parts[part_number].latents_at / latent_file(bucket, int(file_number))
            stored = self._map(path)["latents"]
            chosen = stored.index_select(0, torch.from_numpy(offset[where]))
            if len(where) == len(rows):
                return chosen
            out = torch.empty(len(rows), *stored.shape[1:], dtype=stored.dtype) if out is None else out
            out[torch.from_numpy(where)] = chosen
        assert out is not None
        return out

    def _read_texts(self, text_rows: np.ndarray) -> list[torch.Tensor]:
        """Each text without the prefix: states [L, D] or ids [L]."""
        texts = []
        for part, file, begin, tokens in zip(*(column.tolist() for column in self.text_places(text_rows)), strict=True):
            if part < 0:
                texts.append(self.prefix["empty"])
                continue
            stored = self._map(self.directory / self.parts[part].texts_at / text_file(file))["texts"]
            texts.append(stored[begin : begin + tokens])
        return texts

    def record_ids(self, rows: Iterable[int]) -> list[str]:
        """Record ids of rows. They are not in the index, as training does not need them; reads the parts' tables."""
        rows = np.asarray(list(rows), dtype=np.int64)
        part = self.latent_places(rows)[0]
        record_ids: dict[int, str] = {}
        for number in np.unique(part):
            path = self.directory / self.parts[number].latents / ROWS_FILE
            table = pq.read_table(path, columns=["record_id", "bucket", "place"])
            keys = zip(table["bucket"].to_pylist(), table["place"].to_pylist(), strict=True)
            ids = dict(zip(keys, table["record_id"].to_pylist(), strict=True))
            for row in rows[part == number]:
                bucket = self.bucket_names[int(self.bucket_of(row))]
                record_ids[int(row)] = ids[bucket, int(self.place[row])]
        return [record_ids[int(row)] for row in rows]


class LatentWriter:
    """Writes latents and texts of one part, and their index, into one directory that `LatentDataset` opens.

    Use as a context manager: it writes the index if the block ends without an error. The first text must be the empty
    prompt. Texts are stored in full, with an empty prefix.
    """

    def __init__(
        self,
        out_dir: str | Path,
        text_dim: int,
        dtype: str = "float32",
        rows_per_file: int = 4096,
        latent_channels: int = 16,
        form: str = "states",
    ):
        self.out_dir = Path(out_dir)
        self._latents_dir, self._texts_dir, self._prefix_dir = (
            self.out_dir / n for n in ("latents", "texts", "prefix")
        )
        for path in (self._latents_dir, self._texts_dir, self._prefix_dir):
            path.mkdir(parents=True)
        self._text_meta = TextMeta(text_dim=text_dim, dtype=dtype, form=form)
        meta = LatentMeta(dtype=dtype, rows_per_file=rows_per_file, latent_channels=latent_channels)
        self._latents = LatentPartWriter(self._latents_dir, meta)
        self._texts = TextPartWriter(self._texts_dir, self._text_meta)
        self._images = self._text_count = 0

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def add_text(self, tokens: torch.Tensor) -> int:
        """Adds one prompt, states [L, D] or ids [L] without padding, and returns its text row."""
        if self._text_count == EMPTY_TEXT_ROW:
            write_prefix(self._prefix_dir, self._text_meta, tokens[:0], tokens)
        else:
            self._texts.add_text(tokens)
        self._text_count += 1
        return self._text_count - 1

    def add_image(
        self, record_id: str, latent: torch.Tensor, tier: str, text_rows: Sequence[int], episode: str = "rest"
    ) -> None:
        """Adds one normalised latent [C, h, w] with the text rows of its captions."""
        if not text_rows or any(not 0 <= row < self._text_count for row in text_rows):
            raise ValueError(f"{record_id}: text rows {text_rows} must be of the {self._text_count} rows added so far")
        self._latents.add(self._images, record_id, latent)
        texts = [row - 1 for row in text_rows if row != EMPTY_TEXT_ROW]
        self._texts.add_captions(self._images, tier, texts, episode)
        self._images += 1

    def close(self) -> IndexMeta:
        """Writes the remaining files, then the index."""
        self._latents.close()
        self._texts.close()
        parts = [PartFiles("latents", "texts", "latents", "texts")]
        digest = hashlib.sha256()
        for name in (f"latents/{ROWS_FILE}", f"texts/{TEXTS_FILE}", f"texts/{CAPTIONS_FILE}"):
            digest.update((self.out_dir / name).read_bytes())
        return build_index(self.out_dir, parts, "prefix", digest.hexdigest())
