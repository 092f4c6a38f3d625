"""The sample order of a run, a function of (seed, step), and the batches that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from model.data.hashing import hash_words, permuted_index, uniform
from model.data.latents import EMPTY_TEXT_ROW, LatentDataset


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one step, or of a rank's slice of it.

    rows [n], captions [n] (index of the caption, -1 if it is dropped), text_rows [n], noise_seeds [n]. `start` is the
    slice's position in the global batch of `global_batch` samples. `text_tokens` is the padded length of the longest text
    of the global batch, so that the slices of all ranks have the same shape.
    """

    step: int
    bucket: str
    rows: np.ndarray
    captions: np.ndarray
    text_rows: np.ndarray
    noise_seeds: np.ndarray
    timestep_seed: int
    text_tokens: int
    start: int
    global_batch: int

    def __len__(self) -> int:
        return len(self.rows)

    def share(self, index: int, shares: int) -> BatchPlan:
        """Share `index` of `shares` equal, consecutive slices: that of a rank, or a micro-batch of it."""
        if len(self) % shares:
            raise ValueError(f"a batch of {len(self)} cannot be cut into {shares} equal shares")
        size = len(self) // shares
        cut = slice(index * size, (index + 1) * size)
        return replace(
            self,
            rows=self.rows[cut],
            captions=self.captions[cut],
            text_rows=self.text_rows[cut],
            noise_seeds=self.noise_seeds[cut],
            start=self.start + index * size,
        )


class SampleOrder:
    """The samples of each step: a pure function of (seed, step), independent of ranks and workers.

    All samples of a step are from one bucket. In every CYCLE consecutive steps a bucket gets steps in proportion to its
    weight (the sum of its images' tier weights), in an order that changes from cycle to cycle. Within a bucket, images
    are drawn by systematic sampling: with equal weights, each image once per epoch, in a new order each epoch; otherwise
    the count of an image per epoch differs from its expectation by less than one.

    Needs only the counts of the index, and no table of images.

    Args:
        tier_weights: weight of each tier; tiers without a weight are not read. The weights are multiplied by the
            index's `weights`, which compensate for tiers of which only a fraction was encoded.
        caption_dropout: share of samples whose caption is replaced by the empty prompt.
        episode_weights: factor on the weight of images of an episode; 1 for the others.
        caption_weights: (longest number of tokens without the prefix, weight), ascending: one of an image's captions is
            drawn in proportion to these weights. Longer captions have the last weight. Images whose captions all have
            weight 0 draw them equally.
    """

    CYCLE = 1024

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        seed: int,
        tier_weights: Mapping[str, float] | None = None,
        caption_dropout: float = 0.0,
        episode_weights: Mapping[str, float] | None = None,
        caption_weights: Sequence[tuple[int, float]] = (),
    ):
        self.caption_weights = caption_weights
        self.dataset, self.batch_size, self.seed, self.caption_dropout = dataset, batch_size, seed, caption_dropout
        if tier_weights is None:
            tier_weights = dict.fromkeys(dataset.tier_names, 1.0)
        scale = dataset.meta.weights
        classes, sizes, by_class = [(tier, None) for tier in dataset.tier_names], dataset.counts, dataset.by_tier
        if episode_weights and dataset.by_group is not None:
            classes, sizes, by_class = list(dataset.meta.groups), dataset.group_counts, dataset.by_group
        factors = episode_weights or {}
        weights = np.array(
            [float(tier_weights.get(t, 0.0)) * scale.get(t, 1.0) * factors.get(episode, 1.0) for t, episode in classes]
        )
        self._buckets: list[_Bucket] = []
        for name, counts, begin in zip(dataset.bucket_names, sizes, dataset.bucket_begin, strict=False):
            if (counts * weights).sum() > 0:
                self._buckets.append(_Bucket.of(name, int(begin), counts, weights, by_class))
        if not self._buckets and factors:
            there = ", ".join(f"{tier} in {episode}" for tier, episode in dataset.meta.groups) or "one episode"
            raise ValueError(
                f"tier weights {dict(tier_weights)} with episode weights {dict(factors)} leave no image: this stage's images "
                f"are of {there}"
            )
        if not self._buckets:
            raise ValueError(
                f"tier weights {dict(tier_weights)} leave no image: this stage's images are of the tiers "
                f"{', '.join(sorted(dataset.tier_names))}"
            )
        self._slots = _slots_by_share(np.array([bucket.weight for bucket in self._buckets]), self.CYCLE)
        self._cycle: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> BatchPlan:
        """The plan of a step (counted from 0): `batch_size` samples of one bucket."""
        number, turn = self._bucket_of(step)
        bucket, size = self._buckets[number], self.batch_size
        position = np.arange(size, dtype=np.int64) + turn * size
        epoch, place = np.divmod(position, bucket.images)
        place = permuted_index(place, bucket.images, hash_words(self.seed, 1, number, epoch))
        rows = bucket.rows(place, uniform(hash_words(self.seed, 2, number, epoch)))

        sample = np.arange(size, dtype=np.int64)
        begin = np.asarray(self.dataset.caption_begin[rows], dtype=np.int64)
        count = np.asarray(self.dataset.caption_begin[rows + 1], dtype=np.int64) - begin
        captions = self._captions(begin, count, uniform(hash_words(self.seed, 3, step, sample)))
        text_rows = np.asarray(self.dataset.caption_texts[begin + captions], dtype=np.int64)
        dropped = uniform(hash_words(self.seed, 4, step, sample)) < self.caption_dropout
        captions[dropped] = -1
        text_rows[dropped] = EMPTY_TEXT_ROW
        return BatchPlan(
            step=step,
            bucket=bucket.name,
            rows=rows,
            captions=captions,
            text_rows=text_rows,
            noise_seeds=hash_words(self.seed, 5, step, sample),
            timestep_seed=int(hash_words(self.seed, 6, step, 0)[0]),
            text_tokens=self.dataset.padded_length(text_rows),
            start=0,
            global_batch=size,
        )

    def _captions(self, begin: np.ndarray, count: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The caption [n] of each image, as an index into its captions, drawn by `at` [n] in [0, 1)."""
        if not self.caption_weights:
            return (at * count).astype(np.int64)
        limits, weights = (np.array(values, float) for values in zip(*self.caption_weights, strict=True))
        place = np.arange(count.max())
        present = place < count[:, None]  # [n, most captions]
        texts = self.dataset.caption_texts[np.where(present, begin[:, None] + place, 0)]
        tokens = np.asarray(self.dataset.text_tokens[texts], np.int64)
        weight = np.where(present, weights[np.minimum(np.searchsorted(limits, tokens), len(limits) - 1)], 0.0)
        weight = np.where(weight.sum(1, keepdims=True) > 0, weight, present)
        ends = np.cumsum(weight, axis=1)
        return np.minimum((ends <= at[:, None] * ends[:, -1:]).sum(1), count - 1)

    def first_steps(self) -> list[int]:
        """The first step (counted from 0) of each bucket, in ascending order."""
        first: dict[int, int] = {}
        for step in range(self.CYCLE if len(self._slots) > 1 else 1):
            first.setdefault(self._bucket_of(step)[0], step)
        return list(first.values())

    def _bucket_of(self, step: int) -> tuple[int, int]:
        """(bucket of the step, number of earlier steps with this bucket)."""
        if len(self._slots) == 1:
            return 0, step
        cycle, place = divmod(step, self.CYCLE)
        if self._cycle is None or self._cycle[0] != cycle:
            schedule = np.repeat(np.arange(len(self._slots)), self._slots)
            order = permuted_index(np.arange(self.CYCLE), self.CYCLE, hash_words(self.seed, 7, cycle, 0))
            self._cycle = (cycle, schedule[order])
        schedule = self._cycle[1]
        bucket = int(schedule[place])
        return bucket, cycle * int(self._slots[bucket]) + int((schedule[:place] == bucket).sum())


class _Bucket(NamedTuple):
    """The images of one bucket that are drawn, and a map from places 0..images-1 to them."""

    name: str
    begin: int  # first row of the bucket in the index and in `by_class`
    images: int
    weight: float
    equal: bool  # all images of the bucket are drawn with the same weight
    offsets: np.ndarray  # first position of each drawn class (tier, or tier and episode) in `by_class`
    counts: np.ndarray  # images of each drawn class
    ends: np.ndarray  # cumulative share of the drawn classes' weight
    by_class: np.ndarray

    @classmethod
    def of(cls, name: str, begin: int, counts: np.ndarray, weights: np.ndarray, by_class: np.ndarray) -> _Bucket:
        present = counts > 0
        drawn = present & (weights > 0)
        shares = (counts * weights)[drawn]
        ends = np.cumsum(shares) / shares.sum()
        equal = bool((present == drawn).all()) and len(set(weights[drawn].tolist())) == 1
        offsets = begin + (np.cumsum(counts) - counts)[drawn]
        return cls(
            name, begin, int(counts[drawn].sum()), float(shares.sum()), equal, offsets, counts[drawn], ends, by_class
        )

    def rows(self, place: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Rows [n] for places [n] of an epoch. `shift` in [0, 1) offsets the grid of systematic sampling."""
        if self.equal:
            return self.begin + place
        at = (place + shift) / self.images
        tier = np.minimum(np.searchsorted(self.ends, at, "right"), len(self.ends) - 1)
        first = np.concatenate([[0.0], self.ends[:-1]])[tier]
        inside = ((at - first) / (self.ends[tier] - first) * self.counts[tier]).astype(np.int64)
        inside = np.clip(inside, 0, self.counts[tier] - 1)
        return np.asarray(self.by_class[self.offsets[tier] + inside], dtype=np.int64)


def _slots_by_share(sizes: np.ndarray, slots: int) -> np.ndarray:
    """Integers near sizes / sum * slots with sum `slots`, each at least 1 (largest remainder method)."""
    assert len(sizes) <= slots, "more buckets than steps in a cycle"
    exact = sizes / sizes.sum() * slots
    rounded = np.maximum(np.floor(exact), 1).astype(np.int64)
    while rounded.sum() > slots:  # because of the minimum of 1: take from the largest bucket
        rounded[np.argmax(rounded)] -= 1
    for i in np.argsort(-(exact - rounded), kind="stable")[: slots - rounded.sum()]:
        rounded[i] += 1
    return rounded


@dataclass
class Batch:
    """latents [B, C, h, w] float32; noise, of the same shape; text [B, T, D] in float32 or the stored type, or ids
    [B, T - P] int64 for texts of form "tokens"; mask [B, T] bool or None."""

    plan: BatchPlan
    latents: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    noise: torch.Tensor


def read_batch(dataset: LatentDataset, plan: BatchPlan, widen_text: bool = True) -> Batch:
    """Reads the samples of a plan. A sample's noise depends only on (seed, step, position in the global batch)."""
    latents = dataset.latents(plan.rows)
    text, mask = dataset.text(plan.text_rows, plan.text_tokens, widen_text)
    noise = torch.empty_like(latents)
    generator = torch.Generator()
    for i, seed in enumerate(plan.noise_seeds.tolist()):
        generator.manual_seed(seed)
        noise[i].normal_(generator=generator)
    return Batch(plan=plan, latents=latents, text=text, mask=mask, noise=noise)
