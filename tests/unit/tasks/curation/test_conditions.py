"""Conditions of recipes: a small language over columns, checked when a recipe is loaded, and evaluated as SQL."""

import numpy as np
import pyarrow as pa
import pytest

from tasks.curation import conditions
from tasks.curation.conditions import Condition
from tasks.curation.config import BucketConfig
from tasks.curation.tiers import assign_buckets

TABLE = pa.table(
    {
        "source": ["scenes", "o'clock", "photos", None],
        "synthetic": [True, False, False, False],
        "width": [100, 640, 2000, 64],
        "height": [100, 480, 1000, 64],
        "aesthetic": [np.nan, 4.0, 6.5, 5.0],
        "faces": pa.array([0.0, 2.0, None, 1.0]),
    }
)


def holds(text):
    return conditions.evaluate(TABLE, Condition(text).sql).tolist()


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
def test_a_condition_holds_where_its_columns_say_so(text, expected):
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
        import re

        assert re.search(why, str(error)), error
    else:
        assert "^$" in why, f"{text[:40]} is accepted"


def test_a_quote_in_a_text_stays_a_text():
    assert holds('source == "\' OR TRUE --"') == [False] * 4


def test_a_record_is_in_the_first_bucket_whose_condition_holds_and_else_in_the_rest():
    buckets = (
        BucketConfig(name="large", where="short_side >= 400"),
        BucketConfig(name="beautiful", where="aesthetic >= 4"),
    )
    assert assign_buckets(TABLE, buckets).tolist() == ["rest", "large", "large", "beautiful"]
    assert assign_buckets(TABLE, buckets[::-1]).tolist() == ["rest", "beautiful", "beautiful", "beautiful"]
    assert assign_buckets(TABLE, ()).tolist() == ["rest"] * 4


def test_a_bucket_has_a_name_of_its_own():
    with pytest.raises(ValueError, match="'rest' is the bucket of records that are in no other"):
        BucketConfig(name="rest", where="width > 1")
    with pytest.raises(ValueError, match="names 'a' twice"):
        assign_buckets(TABLE, (BucketConfig(name="a", where="width > 1"), BucketConfig(name="a", where="width > 2")))
