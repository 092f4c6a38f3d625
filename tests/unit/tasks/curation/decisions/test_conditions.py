"""Conditions of recipes: a small language over columns, checked when a recipe is loaded, and evaluated as SQL."""

import re
import tempfile

import numpy as np
import pyarrow as pa
import pytest

from tasks.curation.decisions.conditions import Condition
from tasks.curation.decisions.engines import open_engine, rows_of

TABLE = pa.table(
    {
        "place": [0, 1, 2, 3],
        "source": ["scenes", "o'clock", "photos", None],
        "synthetic": [True, False, False, False],
        "width": [100, 640, 2000, 64],
        "height": [100, 480, 1000, 64],
        "aesthetic": [np.nan, 4.0, 6.5, 5.0],
        "faces": pa.array([0.0, 2.0, None, 1.0]),
    }
)


def holds(text):
    with tempfile.TemporaryDirectory() as work:
        engine = open_engine("duckdb", work)
        engine.load("records", TABLE.schema, TABLE.to_pylist())
        rows = list(rows_of(engine, f"SELECT {Condition(text).sql} AS holds FROM records ORDER BY place"))
        engine.close()
    return [row["holds"] for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width >= 640", [0, 1, 1, 0]),
        ("400 <= short_side < 1000", [0, 1, 0, 0]),
        ("aspect_ratio == 2", [0, 0, 1, 0]),
        ("pixels > 1e6", [0, 0, 1, 0]),
        ("width == height", [1, 0, 0, 1]),
        ("synthetic", [1, 0, 0, 0]),
        ("synthetic == False", [0, 1, 1, 1]),
        ("not synthetic and (width > 1000 or faces >= 2)", [0, 1, 1, 0]),
        ("source in ('scenes', \"photos\")", [1, 0, 1, 0]),
        ('source == "o\'clock"', [0, 1, 0, 0]),
        ("source not in ['scenes']", [0, 1, 1, 1]),
        ("aesthetic > -1.5", [0, 1, 1, 1]),  # a missing score is neither above
        ("aesthetic < 11", [0, 1, 1, 1]),  # nor below
        ("aesthetic != 4", [0, 0, 1, 1]),
        ("faces in [0, 2]", [1, 1, 0, 0]),
    ],
)
def test_a_condition_compares_the_columns_of_each_record(text, expected):
    assert holds(text) == [bool(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a condition"),
        ("width", "takes width for a condition; compare it, such as width >= 1"),
        ("widht > 3", "names the column 'widht', which there is not; did you mean 'width'"),
        ("source > 'a'", "orders source"),
        ("source == 3", "has '3' where a text is needed"),
        ("width > 'wide'", "where a number is needed"),
        ("width == source", "columns of a kind"),
        ("3 < 4", "a column and a value"),
        ("width + 1 > 3", "can be compared"),
        ("__import__('os').system('true')", "neither a comparison nor"),
        ("width.real > 3", "can be compared"),
        ("width > len(source)", "can be compared|where a number"),
        ("[x for x in source]", "neither a comparison nor"),
        ("width > 3 if synthetic else width < 3", "neither a comparison nor"),
        ("source in 'abc'", "must compare a column with a list"),
        ("width is 3", "may compare with"),
        ("(" * 3000 + "width > 3" + ")" * 3000, "at most 2000"),
        ("not " * 480 + "synthetic", "nested too deeply|not a condition|^$"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_part_that_is_wrong(text, why):
    try:
        Condition(text, "curation.buckets[0].where")
    except ValueError as error:
        assert str(error).startswith("curation.buckets[0].where=")
        assert re.search(why, str(error)), error
    else:
        assert "^$" in why, f"{text[:40]} is accepted"


def test_a_quote_in_a_text_stays_a_text():
    assert holds('source == "\' OR TRUE --"') == [False] * 4


@pytest.mark.parametrize("text", ["\\", "a\\", "'", "\\'", "it's", "\\\\'' OR TRUE --"])
def test_no_text_of_a_condition_ends_a_literal_of_sql_in_any_engine(text):
    r"""Spark reads \' as a quote within a text, DuckDB as its end; Spark reads '' as none, one or two quotes."""
    sql = Condition(f"source == {text!r} or source == ' OR reflect() --'").sql
    for literal in re.findall(r"'([^']*)'", sql):
        assert "\\" not in literal
    assert sql.count("'") % 2 == 0 and "''" not in sql
    assert holds(f"source == {text!r}") == [False] * 4


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "a\nb", "\x1b[2J"])
def test_a_text_that_cannot_be_printed_is_refused(text):
    with pytest.raises(ValueError, match="where a text is needed"):
        Condition(f"source == {text!r}")
