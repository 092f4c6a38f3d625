"""Chooses the records that a report shows: bounded samples that do not depend on the order of shards.

Only positions are chosen; pictures are fetched at the end, from at most `PICTURE_SHARDS` shards, spread evenly over the corpus.
"""

# ruff: noqa: S608 (SQL of our own names and numbers)
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tasks.curation.decisions.engines import PART, Engine, rows_of

PICTURE_SHARDS = 64  # the thumbnails of a shard of 10,000 images are about 80 MB
NEAREST = 4  # on each side of a threshold
MOSAIC = 24
GROUPS, GROUP_SIZE = 12, 6  # near-duplicate groups, and members of one


class Shown(NamedTuple):
    """A record in the report: position in the corpus, file, and caption on the page."""

    position: int
    file: str
    note: str = ""


def picture_shards(count: int) -> list[int]:
    """The numbers of the shards whose pictures are shown."""
    return sorted(
        {i * count // PICTURE_SHARDS for i in range(PICTURE_SHARDS)} if count > PICTURE_SHARDS else range(count)
    )


def nearest(
    engine: Engine, column: str, cut: float, table: str, shards: Sequence[int]
) -> tuple[list[Shown], list[Shown]]:
    """The records of a table just below and just above a threshold, nearest first; equal values count as above."""
    sides = []
    for sign in ("<", ">="):
        query = (
            f"SELECT position, file, {column} AS value FROM ({table}) t WHERE {column} {sign} CAST({float(cut)!r} AS DOUBLE) "
            f"AND NOT isnan({column}) AND part IN ({_listed(shards)}) "
            f"ORDER BY abs({column} - CAST({float(cut)!r} AS DOUBLE)), record_id, position LIMIT {NEAREST}"
        )
        sides.append([Shown(row["position"], row["file"], f"{row['value']:.4g}") for row in rows_of(engine, query)])
    return sides[0], sides[1]


def mosaic(engine: Engine, table: str, where: str, shards: Sequence[int]) -> list[Shown]:
    """The records with the smallest ids: a random sample, since ids are hashes."""
    query = (
        f"SELECT position, locator AS file FROM ({table}) t WHERE {where} AND part IN ({_listed(shards)}) "
        f"ORDER BY record_id, position LIMIT {MOSAIC}"
    )
    return [Shown(row["position"], row["file"]) for row in rows_of(engine, query)]


def duplicate_groups(engine: Engine) -> list[tuple[int, int, list[Shown]]]:
    """(keeper, number of records dropped for it, the first of them) of the first near-duplicate groups, by keeper."""
    query = (
        "SELECT m.keeper, g.n, m.position, m.how, m.measure FROM (SELECT keeper, position, how, measure, row_number() OVER "
        "(PARTITION BY keeper ORDER BY position) AS place FROM near) m JOIN (SELECT keeper, count(*) AS n FROM near "
        f"GROUP BY keeper ORDER BY keeper LIMIT {GROUPS}) g ON m.keeper = g.keeper WHERE m.place <= {GROUP_SIZE} "
        "ORDER BY m.keeper, m.position"
    )
    groups: dict[int, tuple[int, int, list[Shown]]] = {}
    for row in rows_of(engine, query):
        group = groups.setdefault(row["keeper"], (row["keeper"], row["n"], []))
        group[2].append(Shown(row["position"], "", f"{row['how']} {row['measure']:.4g}"))
    return list(groups.values())


def shard_of(position: int) -> int:
    return position // PART


def _listed(shards: Sequence[int]) -> str:
    return ", ".join(str(shard) for shard in shards) or "-1"
