"""What all table engines must do, on Parquet files as in a run."""

from __future__ import annotations

import contextlib
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import good_row

from tasks.curation.config import CurationConfig, FilterConfig
from tasks.curation.decisions import decide, engines, rules, tiers
from tasks.curation.decisions.engines import PART, open_engine, quoted, rows_of
from tasks.curation.scoring import score, workers


@pytest.fixture
def engine(tmp_path):
    with contextlib.closing(open_engine("duckdb", tmp_path)) as opened:
        yield opened


def write(path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows, score.SCORES), path)
    return str(path)


def test_a_missing_score_in_a_parquet_file_is_no_large_number(engine, tmp_path):
    """The file's statistics are 0.1 to 0.9, without NaN."""
    scores = [0.1, math.nan, 0.9, 0.2]
    rows = [good_row(i, nsfw=value, aesthetic=10 * value) for i, value in enumerate(scores)]
    engine.scan("scores", {write(tmp_path / "a.parquet", rows): 0})
    config = CurationConfig(filters=FilterConfig(max_nsfw=0.5))
    query = f"SELECT {rules.rule_sql(config)} AS rule FROM scores ORDER BY row"
    assert [row["rule"] for row in rows_of(engine, query)] == ["", "", "nsfw", ""]
    records = decide.records_sql(config, tiers.tier_cuts(engine, config))
    result = rows_of(engine, f"SELECT tier, points FROM ({records}) r ORDER BY position")
    assert [tuple(row.values()) for row in result] == [("A5", 2), ("A5", 0), ("A1", 18), ("A5", 4)]


def test_a_histogram_leaves_missing_scores_out(engine, tmp_path):
    rows = [good_row(i, nsfw=value) for i, value in enumerate([6.1, math.nan, 6.2, 6.6])]
    engine.scan("scores", {write(tmp_path / "a.parquet", rows): 0})
    bins = "bin_of(nsfw, CAST(0 AS DOUBLE), CAST(8 AS DOUBLE), 24)"
    result = rows_of(
        engine, f"SELECT {bins} AS k, count(*) AS n FROM scores WHERE NOT isnan(nsfw) GROUP BY 1 ORDER BY 1"
    )
    assert [tuple(row.values()) for row in result] == [(18, 2), (19, 1)]


def test_a_row_has_the_number_of_its_file(engine, tmp_path):
    files = {write(tmp_path / f"it's {i}.parquet", [good_row(j, row=j) for j in range(2)]): i for i in range(3)}
    engine.scan("scores", files)
    result = rows_of(engine, f"SELECT part * {PART} + row AS position FROM scores ORDER BY position")
    assert [divmod(row["position"], PART) for row in result] == [(i, j) for i in range(3) for j in range(2)]


def test_a_path_is_no_pattern(engine, tmp_path):
    files = {}
    for number, name in enumerate(("runs1", "runs[12]", "run*", "run?1")):
        (tmp_path / name).mkdir()
        files[write(tmp_path / name / "a.parquet", [good_row(number)])] = number
    engine.scan("scores", {path: number for path, number in files.items() if number})
    result = rows_of(engine, "SELECT part, row FROM scores ORDER BY part")
    assert [tuple(row.values()) for row in result] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("text", ["", "'", "\\", "it's", "a\\", "\\'", "a'b\\c''d\\\\e", "é\n"])
def test_a_text_is_itself_in_sql(engine, text):
    assert list(rows_of(engine, f"SELECT {quoted(text)} AS it")) == [{"it": text}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("number_text(CAST(0.5 AS DOUBLE))", "0.5"),
        ("number_text(CAST(30 AS DOUBLE))", "30"),
        ("number_text(CAST(0.12345 AS DOUBLE))", "0.1235"),
        ("hex_to_int('ffffffff')", 2**32 - 1),
        ("hamming(CAST(-1 AS BIGINT), CAST(0 AS BIGINT))", 64),
        ("hamming(CAST(-1 AS BIGINT), CAST(0 AS BIGINT)) + hamming(CAST(-1 AS BIGINT), CAST(0 AS BIGINT))", 128),
        ("round_half_even(CAST(2.5 AS DOUBLE))", 2),
        ("round_half_even(CAST(1.5 AS DOUBLE))", 2),
    ],
)
def test_functions_that_both_engines_register(engine, text, value):
    ((result,),) = (row.values() for row in rows_of(engine, f"SELECT {text} AS value"))
    assert result == value


@pytest.mark.parametrize(
    ("limit", "limit_v1", "megabytes"),
    [
        ("137438953472", "", 68719),
        ("1000000", "", 1000),
        ("max", "", 1000),
        ("", "", 1000),
        ("", "137438953472", 68719),
        ("", "9223372036854771712", 1000),
    ],
)
def test_duckdb_has_half_of_the_containers_memory_and_1_gb_elsewhere(limit, limit_v1, megabytes, tmp_path, monkeypatch):
    for name, text, file in (("CONTAINER_LIMIT", limit, "max"), ("CONTAINER_LIMIT_V1", limit_v1, "limit_in_bytes")):
        monkeypatch.setattr(workers, name, tmp_path / file)
        if text:
            (tmp_path / file).write_text(text + "\n")
    assert engines.buffers() == f"{megabytes}MB"
    with contextlib.closing(open_engine("duckdb", tmp_path)) as opened:
        (row,) = rows_of(opened, "SELECT current_setting('memory_limit') AS memory")
    number, unit = row["memory"].split()
    assert float(number) * {"GiB": 2**30, "MiB": 2**20}[unit] == pytest.approx(megabytes * 1e6, rel=0.01)


def test_a_pod_without_a_readable_limit_of_memory_is_warned_about(tmp_path, monkeypatch, caplog):
    for name in ("CONTAINER_LIMIT", "CONTAINER_LIMIT_V1"):
        monkeypatch.setattr(workers, name, tmp_path / name)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert engines.buffers() == "1000MB" and not caplog.messages
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert engines.buffers() == "1000MB"
    assert "no memory limit of the container was read" in caplog.text
