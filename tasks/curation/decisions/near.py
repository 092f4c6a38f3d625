r"""Near duplicates by perceptual hashes, as SQL: propose, confirm, keep one. Memory and time grow as the corpus does.

    compared --equal hashes--> nodes --within max_hamming_distance--> proposed --pHash-256--> matched --star--> near
                                           of either 64-bit hash                    ^
                                          pairs of other rules (thumbnails, embeddings)

Propose: two hashes within r of 64 bits agree in a key (covers.py), and a pair is counted at the first key that it shares. No
pair within r bits is missed (but see MAX_EQUAL). Records with equal hashes are one node, and equal values of a hash are searched
once. Spark joins; in one process, pairs.py sorts.

Keep: stars, not components. Records are taken in order of preference (more pixels, then the better aesthetic score in half
points, then record id, then key), and a record is dropped if it matches one that is kept. So every dropped record resembles
its keeper directly; A~B~C merges A with C only if A~C. In SQL, each round decides all records whose better matches are
decided. Neither preference nor rounds depend on the corpus's order, except for made sources, whose order is their recipe's.
"""

# ruff: noqa: S608 (SQL of our own names and numbers; texts are quoted by engines.quoted)
from __future__ import annotations

import pyarrow as pa

from tasks.curation.config import DedupConfig
from tasks.curation.decisions.covers import plan_cover
from tasks.curation.decisions.engines import Engine, one
from tasks.curation.decisions.pairs import pairs_within
from tasks.curation.scoring.hashes import HASHES, PHASH256

KINDS = ("phash", "dhash")
VALUE_PAIRS = pa.schema([("a", pa.int64()), ("b", pa.int64())])
MAX_EQUAL = 100  # nodes of one value of a hash that are compared with all others of it
PREFERENCE = "pixels DESC, points DESC, tie, name, position"  # of several, the first is kept


def match_by_hashes(engine: Engine, config: DedupConfig) -> None:
    """Tables `same` (position, leader) of records with the hashes of a better one, and `matched` (a, b, how, measure) of
    pairs of the others; measure is the distance of their pHash-256, in bits.

    Reads `compared`: position, the columns of PREFERENCE and HASHES, and by_hashes: false for records of other rules.

    Raises:
        ValueError: see `covers.plan_cover`.
    """
    all_hashes = ", ".join(f"c.{name}" for name in HASHES)
    engine.create(
        "same",
        "SELECT position, leader FROM (SELECT c.position, first_value(c.position) OVER "
        f"(PARTITION BY {all_hashes} ORDER BY {PREFERENCE}) AS leader FROM compared c JOIN "
        "(SELECT phash FROM compared WHERE by_hashes GROUP BY phash HAVING count(*) > 1) r ON c.phash = r.phash "
        "WHERE c.by_hashes) x WHERE position <> leader",
    )
    engine.create(
        "nodes",
        f"SELECT c.position, {all_hashes} FROM compared c LEFT JOIN same s ON c.position = s.position "
        "WHERE c.by_hashes AND s.position IS NULL",
    )
    _propose(engine, config.max_hamming_distance)
    fine = " + ".join(f"hamming(a.{name}, b.{name})" for name in PHASH256)
    engine.create(
        "matched",
        "SELECT a, b, 'hashes' AS how, CAST(fine AS DOUBLE) AS measure FROM (SELECT p.a, p.b, p.kind, "
        f"hamming(a.phash, b.phash) AS coarse, hamming(a.dhash, b.dhash) AS steps, {fine} AS fine "
        "FROM proposed p JOIN nodes a ON p.a = a.position JOIN nodes b ON p.b = b.position) x "
        f"WHERE ((fine <= {config.max_fine_distance} AND greatest(coarse, steps) <= {config.max_far_distance}) "
        f"OR greatest(coarse, steps) <= {config.max_both_distances} "
        f"OR (steps <= {config.max_hamming_distance} AND fine <= {config.max_marked_distance})) "
        f"AND NOT (kind = 'dhash' AND coarse <= {config.max_hamming_distance})",  # proposed by pHash as well
    )


def _propose(engine: Engine, distance: int) -> None:
    """Table `proposed` (a, b, kind): pairs within `distance` bits of a hash, once for each kind of hash.

    All pairs, but where over `MAX_EQUAL` nodes have one value of the hash: of these, the others are compared with the
    best `MAX_EQUAL` alone, so that a picture of which there are many thousand versions does not cost their number squared.
    """
    order = ", ".join(f"c.{column}" for column in PREFERENCE.split(", "))
    for number, kind in enumerate(KINDS):
        engine.create(
            "hash_values", f"SELECT {kind} AS hash, min(position) AS id, count(*) AS n FROM nodes GROUP BY {kind}"
        )
        masks = plan_cover(count := one(engine, "SELECT count(*) AS n FROM hash_values"), distance).masks()
        if engine.in_process:
            values = engine.batches("SELECT id AS position, hash FROM hash_values")
            found = (
                pa.table([p[:, 0], p[:, 1]], VALUE_PAIRS)
                for p in pairs_within(values, count, masks, distance, engine.work_dir)
            )
            engine.load("value_pairs", VALUE_PAIRS, found)
        else:
            _join(engine, masks, distance)
        engine.create(
            "repeated",
            f"SELECT v.id, n.position, row_number() OVER (PARTITION BY v.id ORDER BY {order}) AS place FROM nodes n "
            f"JOIN hash_values v ON n.{kind} = v.hash JOIN compared c ON n.position = c.position WHERE v.n > 1",
        )
        engine.create(
            "members",
            "SELECT id, position, place FROM repeated UNION ALL "
            "SELECT p.id, p.id AS position, 1 AS place FROM (SELECT a AS id FROM value_pairs UNION SELECT b AS id FROM value_pairs) p "
            "LEFT JOIN (SELECT DISTINCT id FROM repeated) r ON p.id = r.id WHERE r.id IS NULL",
        )
        pairs = (
            f"SELECT least(a.position, b.position) AS a, greatest(a.position, b.position) AS b, '{kind}' AS kind FROM "
        )
        between = f"{pairs} value_pairs p JOIN members a ON p.a = a.id JOIN members b ON p.b = b.id"
        (engine.append if number else engine.create)(
            "proposed",
            f"{pairs} repeated a JOIN repeated b ON a.id = b.id AND a.place > b.place WHERE b.place <= {MAX_EQUAL} "
            f"UNION ALL {between} WHERE b.place <= {MAX_EQUAL} "
            f"UNION ALL {between} WHERE b.place > {MAX_EQUAL} AND a.place <= {MAX_EQUAL}",
        )


def _join(engine: Engine, masks: list[int], distance: int) -> None:
    """Table `value_pairs` (a, b) as `pairs_within` gives them, by SQL that several machines can share."""
    engine.create("value_pairs", "SELECT id AS a, id AS b FROM hash_values WHERE FALSE")
    for place, mask in enumerate(masks):
        sides = (f"(SELECT id, hash, hash & CAST({mask} AS BIGINT) AS key FROM hash_values) {s}" for s in "ab")
        first = "".join(
            f" AND hamming(a.hash & CAST({m} AS BIGINT), b.hash & CAST({m} AS BIGINT)) > 0" for m in masks[:place]
        )
        engine.append(
            "value_pairs",
            f"SELECT a.id AS a, b.id AS b FROM {' JOIN '.join(sides)} "
            f"ON a.key = b.key AND a.id < b.id WHERE hamming(a.hash, b.hash) <= {distance}{first}",
        )


def keep_stars(engine: Engine) -> None:
    """Table `near` (position, keeper, how, measure) of the records to drop, from `compared`, `same` and `matched`."""
    order = (
        "a.pixels > b.pixels",
        "a.points > b.points",
        "a.tie < b.tie",
        "a.name < b.name",
        "a.position < b.position",
    )
    better = order[-1]
    for rule in reversed(order[:-1]):
        better = f"({rule} OR ({rule.replace('>', '=').replace('<', '=')} AND {better}))"
    engine.create(
        "edges",
        f"SELECT CASE WHEN {better} THEN a.position ELSE b.position END AS better, "
        f"CASE WHEN {better} THEN b.position ELSE a.position END AS worse, m.how, m.measure "
        "FROM matched m JOIN compared a ON m.a = a.position JOIN compared b ON m.b = b.position",
    )
    engine.create("lost", "SELECT worse AS position FROM edges WHERE FALSE")
    engine.create("undecided", "SELECT better, worse FROM edges")
    while one(engine, "SELECT count(*) AS n FROM undecided"):
        engine.create(
            "tops",
            "SELECT DISTINCT u.better AS position FROM undecided u LEFT JOIN (SELECT DISTINCT worse FROM undecided) w "
            "ON u.better = w.worse WHERE w.worse IS NULL",
        )
        engine.create(
            "losing", "SELECT DISTINCT u.worse AS position FROM undecided u JOIN tops t ON u.better = t.position"
        )
        engine.append("lost", "SELECT position FROM losing")
        engine.create(
            "undecided",
            "SELECT u.better, u.worse FROM undecided u LEFT JOIN (SELECT position FROM tops UNION SELECT position FROM losing) d "
            "ON u.better = d.position LEFT JOIN losing l ON u.worse = l.position "
            "WHERE d.position IS NULL AND l.position IS NULL",
        )
    of_better = ", ".join(f"c.{column}" for column in PREFERENCE.split(", "))
    engine.create(
        "starred",
        "SELECT worse AS position, better AS keeper, how, measure FROM (SELECT e.worse, e.better, e.how, e.measure, row_number() OVER "
        f"(PARTITION BY e.worse ORDER BY {of_better}, e.how) AS place FROM edges e JOIN lost l ON e.worse = l.position "
        "JOIN compared c ON e.better = c.position LEFT JOIN lost k ON e.better = k.position WHERE k.position IS NULL) x "
        "WHERE place = 1",
    )
    # Whoever has a leader's hashes has its matches, too.
    engine.create(
        "near",
        "SELECT position, keeper, how, measure FROM starred UNION ALL "
        "SELECT s.position, coalesce(t.keeper, s.leader) AS keeper, coalesce(t.how, 'hashes') AS how, "
        "coalesce(t.measure, 0) AS measure "
        "FROM same s LEFT JOIN starred t ON s.leader = t.position",
    )
