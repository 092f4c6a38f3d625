"""The index of a stage's latents and texts on one node: fixed-width columns, memory-mapped by all ranks of the node.

    index.json          IndexMeta
    parts.json          paths or URIs of each part's files
    place.npy crc32.npy tier.npy              one entry per image
    caption_begin.npy caption_texts.npy       the captions of image i are caption_texts[caption_begin[i]:caption_begin[i + 1]]
    by_tier.npy                               the images of each bucket, sorted by tier
    by_group.npy                              the same by (tier, episode), if there are several episodes
    text_tokens.npy text_begin.npy text_crc32.npy     one entry per text; text 0 is the empty prompt
    runs.npy text_runs.npy                    the part (and file) of each range of images (of texts)

Images are numbered bucket by bucket, and within a bucket in the order of the corpus. So the sample order needs only the
counts in index.json, and opening the index reads only that file: a rank's private memory does not grow with the corpus.
Each node builds the index once from the tables of the parts, one part at a time.
The reasons are in docs/decisions/encoding.md.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from model.config import Positive, Section
from model.constants import VAE_SCALE
from model.data.files import CAPTIONS_FILE, META, PREFIX_FILE, ROWS_FILE, TEXTS_FILE, LatentMeta, TextMeta, write_json

INDEX, LOCATIONS = "index.json", "parts.json"
IMAGES = ("place", "crc32", "tier", "caption_begin", "caption_texts", "by_tier")
TEXTS = ("text_tokens", "text_begin", "text_crc32")
RUNS = ("runs", "text_runs")


class IndexMeta(Section):
    """index.json."""

    content: str  # identifies the latents and texts, independently of their location
    latent_channels: Positive = 16
    vae_scale: Positive = VAE_SCALE
    patch_size: Positive = 2
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rows_per_file: Positive = 4096
    text_dim: Positive
    text_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    text_form: Literal["states", "tokens"] = "states"
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    text_rows: Positive  # including the empty prompt
    tiers: tuple[str, ...]
    buckets: dict[str, tuple[int, ...]]  # number of images of each tier
    weights: dict[str, float] = {}  # factors on tier weights; 1 for other tiers (see `build_index`)
    groups: tuple[tuple[str, str], ...] = ()  # (tier, episode); none if there is one episode
    group_counts: dict[str, tuple[int, ...]] = {}  # of each bucket: number of images of each group


class PartFiles(NamedTuple):
    """A shard's latents and texts: local directories with their tables, and paths or URIs with their tensors. Paths may be
    relative to the index."""

    latents: str
    texts: str
    latents_at: str
    texts_at: str


def read_index_meta(directory: str | os.PathLike) -> IndexMeta:
    """Reads index.json.

    Raises:
        ValueError: the directory is not a finished index.
    """
    path = Path(directory) / INDEX
    if not path.is_file():
        raise ValueError(f"{directory} is not a finished index of latents: it has no {INDEX}")
    return IndexMeta(**json.loads(path.read_text()))


class _Table(NamedTuple):
    """Images of one part that have a row in its captions.parquet, in the part's order."""

    bucket: np.ndarray  # names
    place: np.ndarray
    crc32: np.ndarray
    tier: np.ndarray  # names
    episode: np.ndarray  # names
    caption_counts: np.ndarray
    caption_texts: np.ndarray  # rows of the part's texts


def _read_part(root: Path, part: PartFiles) -> _Table:
    rows = pq.read_table(root / part.latents / ROWS_FILE, columns=["row", "bucket", "place", "crc32"])
    captions = pq.read_table(root / part.texts / CAPTIONS_FILE)
    where = pc.index_in(rows["row"], captions["row"].combine_chunks())
    present = where.is_valid()
    rows, captions = rows.filter(present), captions.take(where.filter(present))
    lists = captions["texts"].combine_chunks()
    return _Table(
        bucket=rows["bucket"].to_numpy(),
        place=rows["place"].to_numpy(),
        crc32=rows["crc32"].to_numpy(),
        tier=captions["tier"].to_numpy(),
        episode=captions["episode"].to_numpy(),
        caption_counts=pc.list_value_length(lists).to_numpy(),
        caption_texts=pc.list_flatten(lists).to_numpy(),
    )


def build_index(
    out_dir: str | os.PathLike,
    parts: Sequence[PartFiles],
    prefix: str | os.PathLike,
    content: str,
    weights: dict[str, float] | None = None,
) -> IndexMeta:
    """Writes an index into `out_dir`. index.json is written last.

    Args:
        parts: in the order of the corpus. Their tables are read twice, one part at a time.
        prefix: the directory of the texts' PREFIX part, absolute or relative to `out_dir`.
        content: an identifier of the content of all parts, such as a digest.
        weights: 1 / f for tiers of which only a fraction f was encoded. The sample order multiplies the tier's weight by
            it, so that the tier is drawn as often as if all of its images were encoded.

    Raises:
        ValueError: no image has captions, or the parts differ in their settings.
    """
    out_dir = Path(out_dir)
    latents, texts = _settings(out_dir, parts, prefix)
    counts: dict[str, Counter[tuple[str, str]]] = {}
    captions = text_rows = 0
    for part in parts:
        table = _read_part(out_dir, part)
        for bucket, *group in zip(table.bucket.tolist(), table.tier.tolist(), table.episode.tolist(), strict=True):
            counts.setdefault(bucket, Counter())[group[0], group[1]] += 1
        captions += len(table.caption_texts) + int((table.caption_counts == 0).sum())
        text_rows += pq.read_metadata(out_dir / part.texts / TEXTS_FILE).num_rows
    if not counts:
        raise ValueError("there is no image to train on: no record has both a latent and a caption")
    groups = sorted({group for bucket in counts.values() for group in bucket})
    tiers = tuple(sorted({tier for tier, _ in groups}))
    several = len({episode for _, episode in groups}) > 1
    meta = IndexMeta(
        content=content,
        **latents.model_dump(exclude={"buckets"}),
        text_dim=texts.text_dim,
        text_dtype=texts.dtype,
        text_form=texts.form,
        prefix_tokens=texts.prefix_tokens,
        text_rows=text_rows + 1,
        tiers=tiers,
        buckets={
            name: tuple(sum(counts[name][group] for group in groups if group[0] == tier) for tier in tiers)
            for name in sorted(counts)
        },
        weights=weights or {},
        groups=tuple(groups) if several else (),
        group_counts={name: tuple(counts[name][group] for group in groups) for name in sorted(counts)}
        if several
        else {},
    )
    _fill(out_dir, parts, prefix, meta, captions)
    places = [part._asdict() for part in parts]
    write_json(out_dir / LOCATIONS, {"prefix": str(prefix), "parts": places})
    write_json(out_dir / INDEX, meta.model_dump())
    return meta


def _settings(out_dir: Path, parts: Sequence[PartFiles], prefix: str | os.PathLike) -> tuple[LatentMeta, TextMeta]:
    texts = TextMeta(**json.loads((out_dir / prefix / META).read_text()))
    latents: LatentMeta | None = None
    for part in parts:
        mine = LatentMeta(**json.loads((out_dir / part.latents / META).read_text()) | {"buckets": {}})
        theirs = TextMeta(**json.loads((out_dir / part.texts / META).read_text()))
        if (latents is not None and mine != latents) or theirs != texts:
            raise ValueError(f"{part.latents} and {part.texts} were encoded with other settings than earlier parts")
        latents = mine
    if latents is None:
        raise ValueError("there is no part to train on")
    return latents, texts


def _fill(out_dir: Path, parts: Sequence[PartFiles], prefix: str | os.PathLike, meta: IndexMeta, captions: int) -> None:
    images = sum(map(sum, meta.buckets.values()))
    texts = meta.text_rows

    def column(name: str, size: int, largest: int) -> np.ndarray:
        dtype = np.min_scalar_type(largest)
        return np.lib.format.open_memmap(out_dir / f"{name}.npy", mode="w+", dtype=dtype, shape=(size,))

    place, crc32 = column("place", images, 2**31), column("crc32", images, 2**32 - 1)
    tier, by_tier = column("tier", images, len(meta.tiers)), column("by_tier", images, images)
    counts = column("caption_begin", images + 1, captions)  # counts, replaced by cumulative sums below
    rows = column("caption_texts", captions, texts)
    text_tokens, text_begin = column("text_tokens", texts, 65535), column("text_begin", texts, 2**32 - 1)
    text_crc32 = column("text_crc32", texts, 2**32 - 1)
    empty = empty_prompt_tokens(out_dir / prefix)
    text_tokens[0], text_begin[0], text_crc32[0] = empty, 0, 0

    codes = {name: i for i, name in enumerate(meta.tiers)}
    sizes = np.array([meta.buckets[name] for name in sorted(meta.buckets)], dtype=np.int64)  # [buckets, tiers]
    cursor = dict(zip(sorted(meta.buckets), np.concatenate([[0], np.cumsum(sizes.sum(1))[:-1]]).tolist(), strict=True))
    tiers_in_order = _Sorted(by_tier, meta.buckets)
    groups_in_order = _Sorted(column("by_group", images, images), meta.group_counts) if meta.groups else None
    group_codes = {group: i for i, group in enumerate(meta.groups)}
    runs: list[tuple[int, int]] = []  # first image, part
    for number, table in enumerate(_read_part(out_dir, part) for part in parts):
        for bucket in np.unique(table.bucket):
            inside = np.flatnonzero(table.bucket == bucket)
            inside = inside[np.argsort(table.place[inside], kind="stable")]
            begin = cursor[bucket]
            end = cursor[bucket] = begin + len(inside)
            tiers = np.array([codes[name] for name in table.tier[inside]], dtype=np.int64)
            place[begin:end], crc32[begin:end], tier[begin:end] = table.place[inside], table.crc32[inside], tiers
            counts[begin + 1 : end + 1] = np.maximum(table.caption_counts[inside], 1)  # at least the empty prompt
            runs.append((begin, number))
            tiers_in_order.add(bucket, begin, tiers)
            if groups_in_order is not None:
                pairs = zip(table.tier[inside].tolist(), table.episode[inside].tolist(), strict=True)
                groups_in_order.add(bucket, begin, np.array([group_codes[pair] for pair in pairs]))
    counts[0] = 0
    for begin in range(0, images, 1 << 22):  # cumulative sums, in blocks
        end = min(begin + (1 << 22), images)
        counts[begin + 1 : end + 1] = np.cumsum(counts[begin + 1 : end + 1], dtype=np.int64) + int(counts[begin])
    runs.sort()
    np.save(out_dir / "runs.npy", np.array(runs, dtype=np.int64))
    _fill_texts(out_dir, parts, runs, counts, rows, text_tokens, text_begin, text_crc32)
    for written in (place, crc32, tier, by_tier, counts, rows, text_tokens, text_begin, text_crc32):
        written.flush()
    if groups_in_order is not None:
        groups_in_order.column.flush()


class _Sorted:
    """Fills a column with the images of each bucket, sorted by class (tier or group), in the order of the corpus.

    Args:
        sizes: bucket -> number of images of each class.
    """

    def __init__(self, column: np.ndarray, sizes: dict[str, tuple[int, ...]]) -> None:
        self.column = column
        self._order = {name: i for i, name in enumerate(sorted(sizes))}
        counts = np.array([sizes[name] for name in sorted(sizes)], dtype=np.int64)  # [buckets, classes]
        self._next = np.concatenate([[0], np.cumsum(counts.ravel())[:-1]]).reshape(counts.shape)

    def add(self, bucket: str, begin: int, codes: np.ndarray) -> None:
        """Adds images `begin`, `begin` + 1, ... of a bucket, of the classes `codes`."""
        for code in np.unique(codes):
            members = begin + np.flatnonzero(codes == code)
            first = self._next[self._order[bucket], code]
            self.column[first : first + len(members)] = members
            self._next[self._order[bucket], code] += len(members)


def _fill_texts(
    out_dir: Path,
    parts: Sequence[PartFiles],
    runs: list[tuple[int, int]],
    caption_begin: np.ndarray,
    caption_texts: np.ndarray,
    text_tokens: np.ndarray,
    text_begin: np.ndarray,
    text_crc32: np.ndarray,
) -> None:
    """Fills the columns of texts and `caption_texts`."""
    runs_by_part: dict[int, list[int]] = {}
    for begin, number in runs:
        runs_by_part.setdefault(number, []).append(begin)
    base, text_runs = 1, [(0, -1, 0)]  # first text, part (-1: the prefix), file
    for number, part in enumerate(parts):
        table = _read_part(out_dir, part)
        ends = np.cumsum(table.caption_counts)
        begins = iter(runs_by_part.get(number, ()))
        for bucket in np.unique(table.bucket):
            inside = np.flatnonzero(table.bucket == bucket)
            inside = inside[np.argsort(table.place[inside], kind="stable")]
            at = int(caption_begin[next(begins)])
            captions = [
                table.caption_texts[ends[i] - table.caption_counts[i] : ends[i]].astype(np.int64) + base for i in inside
            ]
            flat = np.concatenate([rows if len(rows) else np.zeros(1, np.int64) for rows in captions])
            caption_texts[at : at + len(flat)] = flat
        texts = pq.read_table(out_dir / part.texts / TEXTS_FILE)
        end = base + len(texts)
        text_tokens[base:end] = texts["tokens"].to_numpy()
        text_begin[base:end] = texts["begin"].to_numpy()
        text_crc32[base:end] = texts["crc32"].to_numpy()
        files = texts["file"].to_numpy()
        for first in np.flatnonzero(np.diff(files, prepend=-1)):
            text_runs.append((base + int(first), number, int(files[first])))
        base = end
    np.save(out_dir / "text_runs.npy", np.array(text_runs, dtype=np.int64))


def empty_prompt_tokens(directory: Path) -> int:
    """Number of tokens of the empty prompt after the prefix."""
    from safetensors import safe_open

    with safe_open(directory / PREFIX_FILE, framework="pt") as file:
        return file.get_slice("empty").get_shape()[0]
