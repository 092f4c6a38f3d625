"""Covers: no pair within the distance is missed, and the work for a hash hardly grows with the corpus."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from tasks.curation.decisions import covers


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 6])
def test_every_choice_of_so_many_blocks_leaves_a_key_untouched(distance):
    for cover in covers._covers(distance):
        if math.comb(cover.blocks, distance) > 300_000:
            continue
        keys = np.array([sum(1 << block for block in key) for key in cover.keys], np.uint64)
        chosen = np.array(list(combinations(range(cover.blocks), distance)), np.uint64)
        touched = np.bitwise_or.reduce(np.uint64(1) << chosen, axis=1)
        assert ((touched[:, None] & keys) == 0).any(axis=1).all(), cover.blocks


@pytest.mark.parametrize("count", [10**4, 10**6, 10**7, 10**8, 7 * 10**8])
@pytest.mark.parametrize("distance", [2, 4])
def test_hashes_within_the_distance_agree_in_a_key(count, distance):
    rng = np.random.default_rng(0)
    cover = covers.plan_cover(count, distance)
    for _ in range(300):
        turned = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        assert any(turned & mask == 0 for mask in cover.masks())


def test_the_bits_are_dealt_out_evenly_and_each_is_in_one_block():
    for cover in covers._covers(4):
        bits = [(mask & (2**64 - 1)).bit_count() for mask in cover.masks()]
        assert all(abs(n - cover.key_bits) <= len(cover.keys[0]) for n in bits)
        assert len({len(key) for key in cover.keys}) == 1
        assert len(set(cover.masks())) == len(cover.keys)


def test_the_table_of_the_module_has_the_sizes_at_which_the_keys_change():
    sizes = (20_000, 30_000, 3_000_000, 5_000_000, 50_000_000, 70_000_000)
    assert [len(covers.plan_cover(size, 4).keys) for size in sizes] == [5, 12, 12, 20, 20, 30]
    for text in ("5   12.8            up to about 20 thousand", "12   21.3            up to about 3 million"):
        assert text in covers.__doc__


def test_larger_corpora_have_longer_keys_so_that_work_grows_hardly_faster_than_the_corpus():
    sizes = [10**5, 10**6, 10**7, 10**8, 7 * 10**8]
    plans = [covers.plan_cover(size, 4) for size in sizes]
    assert [len(plan.keys) for plan in plans] == [12, 12, 20, 30, 30]
    assert [round(plan.key_bits) for plan in plans] == [21, 21, 26, 32, 32]
    work = [plan.work(size) for plan, size in zip(plans, sizes)]
    assert math.log(work[-1] / work[1]) / math.log(sizes[-1] / sizes[1]) < 1.2


def test_a_radius_that_is_too_wide_for_the_corpus_is_refused_with_the_figures():
    with pytest.raises(
        ValueError,
        match=r"max_hamming_distance=14: near duplicates among 700000000 .* 1e\+12 are allowed; 4 takes about 2\.3e\+10",
    ):
        covers.plan_cover(700_000_000, 14)
