"""A limit of words that the user chose applies to own images; one that came with a recipe for made images does not."""

from __future__ import annotations

import logging

import pytest
import yaml

from model.recipe_yaml import read_recipe
from tasks.planning import task, word_limit
from tasks.recipe import RECIPES, recipe_text


def resolved(recipe: str, overrides: list[str], tmp_path, monkeypatch, caplog) -> tuple[int, str]:
    """The limit of a run with own images, and the line that it prints."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    with caplog.at_level(logging.INFO):
        sections = task.resolve_recipe.task_function(
            recipe=recipe, overrides=overrides, source=str(tmp_path), ends_in="curated"
        )
    (line,) = (record.getMessage() for record in caplog.records if "captions of up to" in record.getMessage())
    return sections.curation.captions.max_words, line


@pytest.mark.parametrize(("override", "words"), [
    ("curation.captions.max_words=10", 10),
    ("curation.captions.max_words=14", 14),  # also the shipped one, if it is asked for
    ("curation.captions.max_words=100", 100),
    ("curation.captions={max_words: 9, per_tier: {A1: 1, A2: 1, A3: 1, A4: 1, A5: 1}}", 9),
])  # fmt: skip
def test_an_override_applies_to_own_images_as_it_is(override, words, tmp_path, monkeypatch, caplog):
    limit, line = resolved("smoke", [override], tmp_path, monkeypatch, caplog)
    assert limit == words and f"up to {words} words are kept (curation.captions.max_words as you set it)" in line


@pytest.mark.parametrize("overrides", [[], ["curation.captions.required=true"], ["curation.filters.min_side_px=32"]])
def test_the_limit_of_a_shipped_recipe_for_made_images_is_raised_and_the_line_says_so(
    overrides, tmp_path, monkeypatch, caplog
):
    limit, line = resolved("smoke", overrides, tmp_path, monkeypatch, caplog)
    assert limit == 60 and "up to 60 words are kept (not 14, which the recipe sets for made images" in line


@pytest.mark.parametrize(("values", "words"), [
    ({"curation": {"captions": {"max_words": 8}}}, 8),
    ({"curation": {"captions": {"max_words": 14}}}, 14),
    ({"curation": {"filters": {"min_side_px": 32}}}, 60),
    ({}, 60),
])  # fmt: skip
def test_an_overlay_that_sets_the_limit_keeps_it(values, words, tmp_path, monkeypatch, caplog):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(yaml.safe_dump({"base": str(RECIPES / "smoke.yaml"), "name": "mine", **values}))
    above = tmp_path / "above.yaml"
    above.write_text(yaml.safe_dump({"base": "mine.yaml", "name": "above"}))
    for recipe in (overlay, above):
        assert word_limit.is_chosen(str(recipe), []) == (words != 60)
    assert resolved(str(above), [], tmp_path, monkeypatch, caplog)[0] == words


@pytest.mark.parametrize(("words", "chosen"), [(8, True), (14, False), (12, False)])
def test_a_whole_recipe_keeps_its_limit_unless_it_is_a_copy_of_a_shipped_one(words, chosen, tmp_path):
    data = read_recipe(RECIPES / "smoke.yaml")
    data["curation"]["captions"]["max_words"] = words
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    assert word_limit.is_chosen(str(path), []) == chosen
    assert word_limit.is_chosen(recipe_text(str(path)), []) == chosen  # as a cluster gets it


@pytest.mark.slow
def test_check_applies_the_limit_of_a_run_and_says_which(tmp_path, monkeypatch, capsys):
    from own_images import write_folder

    from tasks.curation import check

    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    write_folder(tmp_path / "source", range(2), "a picture of one {}")
    small = ["--overrides", "curation.filters.min_side_px=32"]
    assert check.main([str(tmp_path / "source"), *small, "--overrides", "curation.captions.max_words=4"]) == 1
    printed = capsys.readouterr()
    assert "caption_too_long 2" in printed.out and "up to 4 words are kept (curation.captions.max" in printed.err
    assert check.main([str(tmp_path / "source"), *small]) == 0
    assert "up to 60 words are kept (not 14" in capsys.readouterr().err
