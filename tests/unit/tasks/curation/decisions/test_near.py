"""Near duplicates by hashes: nothing within the radius is missed, one of each star is kept, and order does not matter."""

from __future__ import annotations

import shutil
import tempfile
import tracemalloc
from itertools import combinations
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from score_tables import duplicates, good_row, random_hashes, tables_of
from skimage import data as photographs

from tasks.curation.config import CurationConfig, DedupConfig
from tasks.curation.decisions import covers, near, pairs
from tasks.curation.decisions.engines import PART, one, rows_of
from tasks.curation.scoring.hashes import HASHES, PHASH256, picture_hashes


def flipped(value: int, bits) -> int:
    """A signed 64-bit integer with some bits flipped."""
    word = np.array([value]).view(np.uint64)[0]
    for bit in bits:
        word ^= np.uint64(1) << np.uint64(bit)
    return int(np.array([word]).view(np.int64)[0])


def planted(groups: int, copies: int, seed: int, most: int = 6) -> list[dict]:
    """Records in groups of copies, whose hashes differ from the first's in a few bits."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        base = dict(zip(HASHES, random_hashes(len(HASHES), seed=1000 * seed + group).tolist()))
        for _ in range(copies):
            turned = {name: rng.choice(64, rng.integers(0, most + 1), replace=False) for name in HASHES}
            hashes = {name: flipped(value, turned[name]) for name, value in base.items()}
            size = {"width": int(rng.choice([512, 640])), "aesthetic": float(rng.choice([4.0, 5.0, 6.0]))}
            rows.append(good_row(len(rows), record_id=rng.bytes(32).hex(), **hashes, **size))
    return rows


def distance(a: dict, b: dict, names=("phash",)) -> int:
    return sum(((a[name] ^ b[name]) & (2**64 - 1)).bit_count() for name in names)


def is_match(a: dict, b: dict, radius: int) -> bool:
    """Whether two records match, by definition."""
    coarse, steps = distance(a, b), distance(a, b, ["dhash"])
    fine, far = distance(a, b, PHASH256), max(coarse, steps)
    confirmed = (fine <= 64 and far <= 20) or far <= 10 or (steps <= radius and fine <= 96)
    return min(coarse, steps) <= radius and confirmed


def sequential(rows: list[dict], radius: int) -> dict[int, int]:
    """position -> keeper, record by record in the order of preference."""
    order = sorted(rows, key=lambda r: (-r["width"] * r["height"], -int(2 * r["aesthetic"]), r["record_id"]))
    kept, dropped = [], {}
    for row in order:
        keeper = next((other for other in kept if is_match(row, other, radius)), None)
        if keeper is None:
            kept.append(row)
        else:
            dropped[row["row"]] = keeper["row"]
    return dropped


@pytest.mark.parametrize("radius, count", [(2, 0), (4, 0), (6, 0), (4, 10**6), (4, 10**7), (4, 10**8)])
def test_pairs_are_those_of_comparing_all_with_all(radius, count, monkeypatch):
    """With the keys for `count` hashes, if given, instead of the keys for the actual number."""
    if count:
        monkeypatch.setattr(near, "plan_cover", lambda _, distance: covers.plan_cover(count, distance))
    rows = planted(groups=40, copies=6, seed=radius)
    with tables_of(rows) as tables:
        duplicates(tables, CurationConfig(dedup=DedupConfig(max_hamming_distance=radius)))
        result = [tuple(sorted((row["a"], row["b"]))) for row in rows_of(tables, "SELECT a, b FROM matched")]
    want = {(a["row"], b["row"]) for a, b in combinations(rows, 2) if is_match(a, b, radius)}
    assert len(result) == len(set(result)), "a pair is proposed twice"
    assert set(result) == want and len(want) > 20


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_dropped_and_for_whom_is_as_if_records_were_taken_one_by_one(seed):
    rows = planted(groups=30, copies=8, seed=seed, most=4)
    with tables_of(rows) as tables:
        result = {i: keeper for i, (_, keeper) in duplicates(tables, CurationConfig()).items()}
    assert result == sequential(rows, 4) and len(result) > 50


def test_a_shuffled_corpus_gives_the_same_result():
    rows = planted(groups=30, copies=5, seed=3)
    order = np.random.default_rng(0).permutation(len(rows))
    results = []
    for arrangement in (range(len(rows)), order):
        moved = [rows[i] | {"row": place, "locator": f"{i}.png"} for place, i in enumerate(arrangement)]
        with tables_of(moved) as tables:
            result = duplicates(tables, CurationConfig())
        names = {place: row["locator"] for place, row in enumerate(moved)}
        results.append({names[i]: names[keeper] for i, (_, keeper) in result.items()})
    assert results[0] == results[1] and len(results[0]) > 30


def test_equal_hashes_are_one_node_and_cost_no_pairs():
    """3,000 equal ones have 4.5 million pairs."""
    rows = [good_row(i, **dict.fromkeys(HASHES, 5)) for i in range(3000)]
    with tables_of(rows) as tables:
        result = duplicates(tables, CurationConfig())
        assert one(tables, "SELECT count(*) AS n FROM proposed") == 0
    assert len(result) == 2999 and set(result.values()) == {("near_duplicate", 0)}


def test_near_hashes_of_pictures_whose_finer_hashes_are_opposite_are_no_match():
    """A distance of 256 bits does not fit into a byte."""
    rows = [good_row(i, phash=7, dhash=[0, -1][i], **dict.fromkeys(PHASH256, [0, -1][i])) for i in range(2)]
    with tables_of(rows) as tables:
        assert duplicates(tables, CurationConfig()) == {}


def test_flat_pictures_are_duplicates_only_if_their_bytes_are_equal():
    rows = [good_row(i, record_id=f"{i // 2:064x}", hash_margin=[1.0, None, float("nan")][i % 3]) for i in range(6)]
    with tables_of(rows) as tables:
        assert duplicates(tables, CurationConfig()) == {i: ("exact_duplicate", i - 1) for i in (1, 3, 5)}


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (256, 256), "teal"),
        Image.linear_gradient("L"),
        Image.effect_noise((256, 256), 3),
    ],
    ids=["one colour", "gradient", "noise"],
)
def test_flat_pictures_have_a_low_margin_and_photographs_have_not(image):
    limit = DedupConfig().min_hash_margin
    assert picture_hashes(image)["hash_margin"] < limit / 2
    assert picture_hashes(Image.fromarray(photographs.coffee()))["hash_margin"] > 5 * limit


def test_hashes_are_imagehashs():
    image = Image.fromarray(photographs.astronaut())
    result = picture_hashes(image)

    def number(bits: np.ndarray) -> int:
        return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)

    assert result["phash"] == number(imagehash.phash(image).hash.ravel())
    assert result["dhash"] == number(imagehash.dhash(image).hash.ravel())
    fine = imagehash.phash(image, hash_size=16).hash.reshape(4, 64)
    assert [result[name] for name in PHASH256] == [number(bits) for bits in fine]


@pytest.mark.slow
@pytest.mark.parametrize("count", [10**4, 10**6, 10**7, 10**8])
def test_the_joins_of_several_machines_and_the_sorts_of_one_give_the_same_pairs(count, monkeypatch):
    """With the keys for `count` hashes; sorted in pieces of some tens of rows, of which some are empty."""
    rows = planted(groups=60, copies=5, seed=2, most=3)
    masks = covers.plan_cover(count, 4).masks()
    values = {row["phash"]: PART + 7 * place for place, row in enumerate(rows)}
    table = pa.table({"position": list(values.values()), "hash": list(values)})
    with tables_of([]) as tables:
        tables.load("hash_values", table.schema, [table])
        tables.create("hash_values", "SELECT position AS id, hash FROM hash_values")
        near._join(tables, masks, 4)
        joined = [tuple(row.values()) for row in rows_of(tables, "SELECT a, b FROM value_pairs ORDER BY a, b")]
        for rows_of_a_piece in (pairs.PIECE_ROWS, 40):
            monkeypatch.setattr(pairs, "PIECE_ROWS", rows_of_a_piece)
            monkeypatch.setattr(pairs, "CHUNK_ROWS", 23)
            by_sorts = list(pairs.pairs_within([table], len(table), masks, 4, tables.work_dir))
            assert sorted(map(tuple, np.concatenate(by_sorts).tolist())) == joined
    assert len(joined) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", near.KINDS)
@pytest.mark.parametrize("value_bits", [0, 3], ids=["one value", "eight near values"])
def test_many_versions_of_one_picture_are_compared_with_the_best_of_them(kind, value_bits, monkeypatch):
    """2,000 records of one value of a hash, or of eight near ones, have 2 million pairs."""
    monkeypatch.setattr(near, "MAX_EQUAL", 10)
    rows = planted(groups=1, copies=2000, seed=4, most=12)
    for row in rows:
        row |= {name: rows[0][name] for name in HASHES if name != kind and not name.startswith("phash256")}
        row[kind] = rows[0][kind] ^ row["row"] % 2**value_bits
    for i in range(2000, 2003):  # other pictures, which have one hash in common with these
        hashes = dict(zip(HASHES, random_hashes(len(HASHES), seed=i).tolist()))
        rows.append(good_row(i, **hashes | {kind: rows[0][kind]}))
    with tables_of(rows) as tables:
        result = duplicates(tables, CurationConfig())
        proposed = one(tables, f"SELECT count(*) AS n FROM proposed WHERE kind = '{kind}'")
    assert proposed < 2003 * 10 * 2**value_bits
    assert all(is_match(rows[i], rows[keeper], 4) for i, (_, keeper) in result.items()), "a keeper that does not match"
    assert set(range(2000)) - set(result) <= {keeper for _, keeper in result.values()} and len(result) > 1900
    assert not {2000, 2001, 2002} & set(result)


@pytest.mark.slow
def test_many_records_with_one_key_are_compared_in_bounded_memory():
    """1,024 hashes that differ in their last bits alone have half a million pairs for most keys."""
    table = pa.table({"position": np.arange(1024), "hash": np.arange(1024)})
    masks = covers.plan_cover(1024, 4).masks()
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as work:
        counts = [len(some) for some in pairs.pairs_within([table], 1024, masks, 4, Path(work))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    distances = np.bitwise_count(np.arange(1024)[:, None] ^ np.arange(1024))
    assert sum(counts) == np.triu(distances <= 4, 1).sum() and peak < 2**24


# --- both engines ----------------------------------------------------------------------------------------------


def spark_rows(rows: list[dict], query: str) -> list[dict]:
    pytest.importorskip("pyspark", reason="the extra spark is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17: apt-get install openjdk-17-jre-headless")
    with tables_of(rows, "spark") as tables:
        duplicates(tables, CurationConfig(dedup=DedupConfig(max_hamming_distance=2)))
        return list(rows_of(tables, query))


@pytest.mark.slow
def test_spark_decides_as_duckdb_does(monkeypatch):
    monkeypatch.setenv(
        "NUCLEUS_SPARK_CONF",
        '{"spark.master": "local[1]", "spark.sql.shuffle.partitions": "1", "spark.driver.memory": "1g"}',
    )
    rows = planted(groups=12, copies=4, seed=5, most=3)
    rows += [good_row(len(rows) + i, record_id=rows[i]["record_id"], captions=["Another one"]) for i in range(3)]
    rows += [
        good_row(len(rows) + i, **columns)
        for i, columns in enumerate(
            [
                {"width": 10},
                {"format": "it's \\ odd"},
                {"entropy_bits": 0.03125},
                {"captions": [], "words": []},
                {"words": [300]},
                {"aesthetic": None},
                {"aesthetic": float("nan"), "nsfw": 0.75},
                {"error_rule": "undecodable", "error": "does not decode"},
            ]
        )
    ]
    columns = "r.position, r.tier, r.bucket, r.split, r.words, coalesce(d.rule, r.rule) AS rule"
    query = (
        f"SELECT {columns}, coalesce(d.detail, r.detail) AS detail, m.words AS merged, m.extra_captions "
        "FROM records r LEFT JOIN dropped d ON r.position = d.position "
        "LEFT JOIN merged m ON r.position = m.position ORDER BY r.position"
    )
    result = spark_rows(rows, query)
    with tables_of(rows) as tables:
        duplicates(tables, CurationConfig(dedup=DedupConfig(max_hamming_distance=2)))
        want = list(rows_of(tables, query))
    assert result == want
    assert {row["rule"] for row in want} > {
        "near_duplicate",
        "exact_duplicate",
        "min_side",
        "format",
        "no_caption",
    }
    assert PART > 10**9
