import hashlib

import pytest
from pydantic import ValidationError

from tasks.curation.captions import choose_captions, clean_captions, count_words, merge_captions
from tasks.curation.config import CaptionConfig

PER_TIER = {"A1": 4, "A2": 3, "A3": 3, "A4": 2, "A5": 1}
CONFIG = CaptionConfig(per_tier=PER_TIER)
TEXTS = ["one", "one two", "one two three", "a b c d", "a b c d e", "a b c d e f", "a b c d e f g h i j"]
ID = "0123456789abcdef" * 4


def test_characters_that_python_or_nobody_names_are_kept_and_invisible_ones_are_not():
    new, private, flag = (
        "a \U0001fa77 card",
        "\ue000",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    )
    assert clean_captions([new, private, flag, "\u06dd 1"]) == [new, private, flag, "\u06dd 1"]
    assert clean_captions(["a\u200b\u2066b\u2069\x07\ud800"]) == ["ab"]


def test_whitespace_is_normalised_and_empties_and_repeats_go():
    texts = ["  a\tred \n circle ", "a red circle", "A RED circle", "", "   ", "a\x00 b", None, "caf\u0065\u0301"]
    assert merge_captions([], texts, CONFIG) == ["a red circle", "a b", "caf\u00e9"]
    assert clean_captions(None) == []


def test_joiners_are_part_of_words_and_marks_of_direction_are_not():
    family, plant = "a \U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0646\u06cc\u200c\u0634\u06a9\u0631"
    assert merge_captions([], [family, plant, "\u202eleft\ufeff"], CONFIG) == [family, plant, "left"]


def test_a_caption_over_the_limit_is_dropped_not_cut():
    config = CaptionConfig(per_tier=PER_TIER, max_words=3)
    assert merge_captions([], ["one two three", "one two three four"], config) == ["one two three"]


@pytest.mark.parametrize(("tier", "count"), PER_TIER.items())
def test_each_tier_keeps_its_number(tier, count):
    assert len(choose_captions(TEXTS, tier, ID, CONFIG)) == count
    assert choose_captions(TEXTS[:1], tier, ID, CONFIG) == TEXTS[:1]


def test_the_whole_range_of_lengths_is_kept():
    assert choose_captions(TEXTS, "A1", ID, CONFIG) == [TEXTS[0], TEXTS[2], TEXTS[4], TEXTS[6]]
    assert choose_captions(TEXTS, "A4", ID, CONFIG) == [TEXTS[0], TEXTS[6]]


def test_the_order_that_captions_come_in_does_not_matter():
    assert choose_captions(TEXTS[::-1], "A2", ID, CONFIG) == choose_captions(TEXTS, "A2", ID, CONFIG)


def test_where_one_stays_the_corpus_still_has_every_length():
    ids = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    assert {choose_captions(TEXTS, "A5", record_id, CONFIG)[0] for record_id in ids} == set(TEXTS)


def test_a_tier_without_a_number_is_refused():
    with pytest.raises(ValidationError, match="must name each of A1, A2, A3, A4, A5"):
        CaptionConfig(per_tier={"A1": 2})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a photo of two cats", 5),
        ("a well-known café, at noon - 5 pm", 8),
        ("一只红色的猫在椅子旁边", 11),
        ("一只红色的猫\uff0c在椅子旁边\u3002", 11),
        ("赤い猫が椅子の横にいる", 11),
        ("แมวสีแดงอยู่ข้างเก้าอี้", 6),
        ("빨간 고양이가 의자 옆에 있다", 5),
        ("a cat 猫 on a chair", 6),
    ],
)
def test_words_are_counted_in_languages_without_spaces_too(text, words):
    assert count_words(text) == words


def test_a_long_sentence_without_spaces_is_over_the_limit():
    config = CaptionConfig(per_tier=PER_TIER, max_words=12)
    assert merge_captions([], ["一只红色的猫在椅子旁边" * 36], config) == []
    assert merge_captions([], ["一只红色的猫在椅子旁边"], config) == ["一只红色的猫在椅子旁边"]
