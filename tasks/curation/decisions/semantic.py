"""Near duplicates by embeddings: the cosine of two pictures' embeddings reaches a threshold.

Only pictures of one cell are compared. Cells are those of the nearest centre, of centres that k-means finds in a sample, and
each picture is in its two nearest cells. So a pair is missed only if the two share none of their two nearest centres, which
near duplicates rarely do: tests/unit/tasks/curation/decisions/test_semantic.py has the measured share.
"""

# ruff: noqa: S608 (SQL of our own names and numbers)
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tasks.curation.decisions.engines import Engine, one

CELL = 2_000  # records of a cell, on average
SAMPLE = 50_000
CELLS_OF_RECORD = 2
ROUNDS = 8  # of k-means
MAX_CELL = 50_000  # records of one cell that are compared at once
CELLS = pa.schema([("cell", pa.int64()), ("position", pa.int64()), ("vector", pa.binary())])
PAIRS = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("measure", pa.float64())])


def match_by_embeddings(engine: Engine, min_similarity: float) -> None:
    """Table `embedding_pairs` (a, b, measure) of the pairs whose cosine is at least `min_similarity`.

    Reads `embedded`: position, tie (decides the sample, so that the corpus's order does not), embedding.

    Raises:
        ValueError: so many pictures are alike that a cell cannot be compared.
    """
    centres = _centres(engine)
    engine.load("cells", CELLS, _assigned(engine, centres))
    largest = one(engine, "SELECT coalesce(max(n), 0) AS n FROM (SELECT count(*) AS n FROM cells GROUP BY cell) c")
    if largest > MAX_CELL:
        raise ValueError(
            f"curation.dedup.min_embedding_similarity={min_similarity:g}: {largest} pictures are in one cell of the embedding, "
            f"{MAX_CELL} can be compared; set it to null"
        )
    engine.load("cell_pairs", PAIRS, _pairs(engine, min_similarity))
    # A pair may share both cells.
    engine.create("embedding_pairs", "SELECT a, b, max(measure) AS measure FROM cell_pairs GROUP BY a, b")


def _vectors(table: pa.Table) -> np.ndarray:
    """float32 [N, D], of length 1."""
    lists = table["embedding"].combine_chunks()
    vectors = np.asarray(lists.flatten(), np.float32).reshape(len(lists), -1)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _centres(engine: Engine) -> np.ndarray:
    """float32 [K, D]: spherical k-means over a sample, its start spread evenly over it."""
    count = one(engine, "SELECT count(*) AS n FROM embedded")
    if not count:
        return np.zeros((1, 1), np.float32)
    query = f"SELECT embedding FROM embedded ORDER BY tie, position LIMIT {SAMPLE}"
    sample = np.concatenate([_vectors(table) for table in engine.batches(query)])
    cells = min(len(sample), max(1, round(count / CELL)))
    centres = sample[np.linspace(0, len(sample) - 1, cells).astype(int)]
    for _ in range(ROUNDS):
        nearest = (sample @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
    return centres


def _assigned(engine: Engine, centres: np.ndarray) -> Iterator[dict]:
    for table in engine.batches("SELECT position, embedding FROM embedded"):
        vectors = _vectors(table)
        nearest = np.argsort(-(vectors @ centres.T), axis=1)[:, :CELLS_OF_RECORD]
        for position, cells, vector in zip(table["position"].to_pylist(), nearest.tolist(), vectors.astype(np.float16)):
            for cell in cells:
                yield {"cell": cell, "position": position, "vector": vector.tobytes()}


def _pairs(engine: Engine, min_similarity: float) -> Iterator[dict]:
    def compared(positions: list[int], vectors: list[bytes]) -> Iterator[dict]:
        matrix = np.frombuffer(b"".join(vectors), np.float16).reshape(len(vectors), -1).astype(np.float32)
        for start in range(0, len(matrix), 1024):
            similar = matrix[start : start + 1024] @ matrix[start:].T
            rows, columns = np.nonzero(similar >= min_similarity)
            for i, j in zip(rows.tolist(), columns.tolist()):
                if j > i:
                    yield {"a": positions[start + i], "b": positions[start + j], "measure": float(similar[i, j])}

    cell, positions, vectors = -1, [], []
    for table in engine.batches("SELECT cell, position, vector FROM cells ORDER BY cell, position"):
        for row in table.to_pylist():
            if row["cell"] != cell:
                yield from compared(positions, vectors) if vectors else ()
                cell, positions, vectors = row["cell"], [], []
            positions.append(row["position"])
            vectors.append(row["vector"])
    yield from compared(positions, vectors) if vectors else ()
