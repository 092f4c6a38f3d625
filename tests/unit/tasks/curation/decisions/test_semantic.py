"""Pairs of embeddings within a cosine are found cell by cell, whatever the order of the corpus."""

from __future__ import annotations

import contextlib
import tempfile

import numpy as np
import pyarrow as pa
import pytest

from tasks.curation.decisions import semantic
from tasks.curation.decisions.engines import open_engine, rows_of

EMBEDDED = pa.schema([("position", pa.int64()), ("tie", pa.string()), ("embedding", pa.list_(pa.float32()))])


def embeddings(count: int, copies: int) -> np.ndarray:
    """float32 [count + copies, 64] around 12 directions; the last are near copies of the first."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 64))
    base = centres[rng.integers(12, size=count)] + 0.7 * rng.normal(size=(count, 64))
    near = base[:copies] + 0.1 * rng.normal(size=(copies, 64))
    return np.concatenate([base, near]).astype(np.float32)


def pairs_of(vectors: np.ndarray, order: np.ndarray, similarity: float) -> set[tuple[int, int]]:
    """Pairs of rows of `vectors`, read in this order."""
    rows = [{"position": place, "tie": f"{i:05d}", "embedding": vectors[i].tolist()} for place, i in enumerate(order)]
    with tempfile.TemporaryDirectory() as work, contextlib.closing(open_engine("duckdb", work)) as engine:
        engine.load("embedded", EMBEDDED, rows)
        semantic.match_by_embeddings(engine, similarity)
        result = [(row["a"], row["b"]) for row in rows_of(engine, "SELECT a, b FROM embedding_pairs")]
    assert len(result) == len(set(result)), "a pair is given twice"
    return {tuple(sorted((int(order[a]), int(order[b])))) for a, b in result}


@pytest.mark.parametrize("cell", [50, 10**6], ids=["many cells", "one cell"])
def test_nearly_every_pair_of_comparing_all_is_found_and_no_other(cell, monkeypatch):
    monkeypatch.setattr(semantic, "CELL", cell)
    vectors = embeddings(1500, 200)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = np.argwhere(np.triu(unit @ unit.T >= 0.95, 1))
    want = {(int(i), int(j)) for i, j in near}
    result = pairs_of(vectors, np.arange(len(vectors)), 0.95)
    assert len(want) >= 200
    assert len(result & want) >= 0.99 * len(want)
    assert all(unit[i] @ unit[j] >= 0.949 for i, j in result)  # float16 rounds


def test_the_order_of_the_corpus_does_not_matter(monkeypatch):
    monkeypatch.setattr(semantic, "CELL", 50)
    vectors = embeddings(400, 60)
    orders = (np.arange(460), np.random.default_rng(1).permutation(460))
    first, second = (pairs_of(vectors, order, 0.95) for order in orders)
    assert first == second


def test_a_cell_with_too_many_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(semantic, "MAX_CELL", 10)
    with pytest.raises(
        ValueError, match=r"min_embedding_similarity=0.9: 20 pictures are in one cell .* 10 can be compared"
    ):
        pairs_of(embeddings(20, 0), np.arange(20), 0.9)


def test_no_embedding_is_no_pair():
    assert pairs_of(np.zeros((0, 4)), np.arange(0), 0.9) == set()
