"""Stateless random numbers: hashes and permutations that cost O(1) per element.

Training must know the sample order at any step without replaying earlier steps, and without a table of all rows (700
million at full size). So each random number is a hash of its purpose and position.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """Hashes tuples of integers, broadcast against each other, to uint64 [n]."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for word in words:
            if isinstance(word, int):
                word = np.array([word % 2**64], dtype=np.uint64)
            state = _mix((state ^ word.astype(np.uint64)) + _GOLDEN)
    return state


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Maps hashes to float64 in [0, 1)."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def permuted_index(index: np.ndarray, size: int, key: np.ndarray, rounds: int = 4) -> np.ndarray:
    """Applies a pseudo-random permutation of range(size), selected by `key`, to indices, without a table.

    A Feistel network permutes pairs (left, right) of a grid of about sqrt(size) x sqrt(size). Results of `size` or more
    are permuted again until they are in range (cycle walking, Black and Rogaway 2002), which keeps it a bijection.

    Args:
        index: int64 [n] in [0, size).
        key: uint64 [n] or [1]; equal keys give the same permutation.
    """
    columns = int(np.ceil(np.sqrt(size)))
    rows = -(-size // columns)
    out = np.asarray(index, dtype=np.int64).copy()
    key = np.broadcast_to(key, out.shape)
    walking = np.arange(len(out))
    while len(walking):
        left, right = np.divmod(out[walking], columns)
        keys = key[walking]
        for i in range(rounds):
            if i % 2 == 0:
                left = (left + (hash_words(keys, i, right) % np.uint64(rows)).astype(np.int64)) % rows
            else:
                right = (right + (hash_words(keys, i, left) % np.uint64(columns)).astype(np.int64)) % columns
        moved = left * columns + right
        out[walking] = moved
        walking = walking[moved >= size]
    return out
