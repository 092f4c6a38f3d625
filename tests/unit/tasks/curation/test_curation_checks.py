"""A recipe is refused when it is loaded if its cuts, tiers or episodes read a column that nothing fills."""

import pytest

from tasks.curation.scorers import check_settings
from tasks.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("curation.filters.max_nsfw=0.2", "max_nsfw=0.2 cuts on the column nsfw, which nothing fills"),
        ("curation.filters.min_image_text_similarity=0.1", "cuts on the column similarity, which nothing fills"),
        ("curation.dedup.min_embedding_similarity=0.97", "compares the column embedding, which nothing fills"),
        ("curation.filters.max_quality=40", "cuts on the column quality, which nothing fills"),
        (
            "curation.scorers.watermark=none",
            "max_watermark_score=0.5 cuts on the column watermark, which nothing fills",
        ),
        ("curation.tiers.accept_proxy=false", "'proxy' sets the tiers by contrast, colour and sharpness"),
        ("curation.tiers.best_where=quality < 45", "reads the column quality, which nothing fills"),
        ("curation.tiers.best_where=tier == 'A1'", "reads tier, which is known only after tiers are"),
        (
            "curation.buckets=[{name: safe, where: nsfw < 0.1}]",
            r"buckets\[0\].where='nsfw < 0.1' reads the column nsfw",
        ),
        ("curation.buckets=[{name: wide, where: widht > 3}]", "did you mean 'width'"),
        ("curation.tiers.quantiles=[0.5, 0.2, 0.8, 0.9]", "must rise"),
        ("curation.tiers.thresholds=[1, 2, 3, 4]", "must fall"),
        ("train.stages[0].bucket_weights={people: 2.0}", "has the episode 'people'; curation.buckets are rest"),
        ("train.stages[0].caption_weights=[{up_to_tokens: 9, weight: 1}, {up_to_tokens: 4, weight: 1}]", "must rise"),
    ],
)
def test_a_column_that_no_scorer_fills_is_refused_by_name(override, why):
    with pytest.raises(ValueError, match=why):
        load_recipe("smoke", [override])


def test_a_cut_that_is_null_needs_no_scorer():
    recipe = load_recipe("smoke", ["curation.scorers.watermark=none", "curation.filters.max_watermark_score=null"])
    assert recipe.curation.scorers.choice("watermark") is None


def test_episodes_and_their_weights_reach_the_stages():
    overrides = [
        "curation.buckets=[{name: digits, where: source == 'digits'}]",
        "train.stages[0].bucket_weights={digits: 2.0, rest: 0.5}",
    ]
    recipe = load_recipe("smoke", overrides)
    assert recipe.train.stages[0].bucket_weights == {"digits": 2.0, "rest": 0.5}


def test_the_17b_recipe_scores_with_models_and_names_the_commit_that_it_lacks():
    recipe = load_recipe("nucleus_17b")
    scorers = recipe.curation.scorers
    assert {scorers.choice(column).name for column in ("aesthetic", "watermark")} & {"proxy", "classical"} == set()
    with pytest.raises(
        ValueError, match=r"scorers.watermark.revision is not set: give a commit of amrul-hzz/watermark"
    ):
        check_settings(scorers)
    commit = "0123456789abcdef" * 2 + "01234567"
    check_settings(load_recipe("nucleus_17b", [f"curation.scorers.watermark.revision='{commit}'"]).curation.scorers)
