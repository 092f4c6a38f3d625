"""Which answers are captions."""

# ruff: noqa: RUF001 (captions in Chinese)
from __future__ import annotations

import pytest

from tasks.curation.captioning import checks
from tasks.curation.captioning.base import Answer
from tasks.curation.captions import count_words, tokens
from tasks.curation.config import LengthConfig

LENGTH = LengthConfig(prompt="-", min_words=4, max_words=60, max_tokens=100)
GOOD = "A brown dog runs along a wide beach while two children watch from a wooden boat."


def status(text: str, finish_reason: str = "stop", language: str | None = "en") -> str:
    return checks.judge(Answer(text, finish_reason), LENGTH, language)[1]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.", "I’m sorry, I cannot describe people in images.",
        "Sorry, I am not able to view this picture at the moment.", "I cannot provide a description of this image.",
        "As an AI language model, I do not see images.", "Unfortunately, I am unable to assist with this request.",
        "This image may be unsafe, so I am unable to help with this request.", "抱歉，我无法描述这张图片。", "I can't assist with that request.",
    ],
)  # fmt: skip
def test_refusals_are_recognised(text):
    assert status(text, language=None) == "refused"


@pytest.mark.parametrize(
    "text",
    [
        GOOD, 'A sign that reads "Sorry, we are closed" hangs on a glass door.',
        "A sorry looking dog sits in the rain next to a car.", "A man who cannot see over the wall stands on a box.",
        "Unfortunate weather: rain falls on an outdoor wedding with white chairs.",
        "A poster with the words I can't stop dancing above a crowd.",
    ],
)  # fmt: skip
def test_captions_about_refusing_are_captions(text):
    assert status(text) == "ok"


@pytest.mark.parametrize(
    "text",
    [
        "the box is red and " * 20, "very very very very very nice dog on a beach", "红色的盒子" * 6,
        "A dog. A cat. " + "There is a tree in the park near the lake. " * 4,
        "A red car, a blue car, a green car. " * 3 + "A red car, a blue car, a green car.",
    ],
)  # fmt: skip
def test_loops_are_repetitive_also_without_spaces_between_words(text):
    assert status(text, language=None) == "repetitive"


@pytest.mark.parametrize(
    "text",
    [
        GOOD, "Two red squares and two red circles and two blue squares on a gray background.",
        "一只棕色的狗在宽阔的海滩上奔跑，两个孩子从一条木船上看着它。", "No, no, no! says a sign beside the road.",
    ],
)  # fmt: skip
def test_plain_prose_is_not_repetitive(text):
    assert not checks.is_repetitive(text)


def test_a_cut_answer_an_empty_one_and_wrong_lengths_are_not_kept():
    assert status(GOOD, "length") == "truncated"
    assert status(" \n ") == status('""') == "empty"
    assert status("A dog.") == "too_short"
    assert status(" ".join(f"thing{i}" for i in range(61)), language=None) == "too_long"
    assert status("anything", "rejected") == "rejected" and status("anything", "content_filter") == "refused"


def test_words_are_counted_in_languages_without_spaces():
    chinese = "一只棕色的狗在海滩上奔跑"
    assert count_words(chinese) == len(tokens(chinese)) == 12
    short = LENGTH.model_copy(update={"max_words": 8})
    assert checks.judge(Answer(chinese), short, None)[1] == "too_long"
    assert tokens("Ein Hund läuft, d'un 狗b") == ["Ein", "Hund", "läuft", "d'un", "狗", "b"]


def test_the_language_is_checked_where_there_are_words_enough():
    assert status("Ein brauner Hund läuft an einem breiten Strand entlang.") == "language"
    assert status("一只棕色的狗在宽阔的海滩上奔跑") == "language"
    assert status("一只棕色的狗在宽阔的海滩上奔跑", language="zh") == "ok"
    assert status("Ein Hund am Strand", language="en") == "ok"  # four words prove little
    assert status("A bowl of macaroni al forno with parmigiano beside a menu in Italian") == "ok"
    checks.check_language("de")
    with pytest.raises(ValueError, match="language='xx' is not one of .*en"):
        checks.check_language("xx")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('"A dog on a beach"', "A dog on a beach"), ("Caption: A dog\non a  beach.", "A dog on a beach."),
        ("Sure! Here is a caption for this image: A dog on a beach.", "A dog on a beach."),
        ("Here's the description:\n\nA dog.", "A dog."), ('A sign says "stop" here', 'A sign says "stop" here'),
        ("“A dog”", "A dog"), ("Here is a dog on a beach.", "Here is a dog on a beach."),
    ],
)  # fmt: skip
def test_text_around_a_caption_is_removed(text, cleaned):
    assert checks.clean(text) == cleaned
