"""Checks a recipe's curation before any work: thresholds, tiers and episodes must read columns that scorers fill."""

from __future__ import annotations

from tasks.curation.captioning import chosen_captioner
from tasks.curation.config import CaptionerConfig, CurationConfig
from tasks.curation.decisions.tiers import best_condition, check_cuts, episode_conditions
from tasks.curation.scorers import COLUMNS, chosen_scorers

# Threshold of `FilterConfig` -> the column that its rule reads.
CUTS = {
    "max_watermark_score": "watermark",
    "min_aesthetic": "aesthetic",
    "max_nsfw": "nsfw",
    "min_image_text_similarity": "similarity",
    "max_quality": "quality",
    "max_text_area": "text_area",
}
PROXY = "proxy"  # the placeholder aesthetic scorer, which has no model


def check_curation(config: CurationConfig) -> None:
    """
    Raises:
        ValueError: an unknown captioner, or one whose captions would be too long; an unknown scorer or a wrong setting
            of one; a threshold, a tier or an episode on a column that no scorer fills; tiers by the proxy without
            `accept_proxy`; invalid conditions.
    """
    chosen = chosen_scorers(config.scorers)
    filled = {column for one in chosen for column in one.columns}
    for limit, column in CUTS.items():
        value = getattr(config.filters, limit)
        if value is not None and column not in filled:
            raise ValueError(
                f"curation.filters.{limit}={value:g} cuts on the column {column}, which nothing fills: name a scorer under "
                f"curation.scorers.{column}, or set curation.filters.{limit} to null"
            )
    if config.dedup.min_embedding_similarity is not None and "embedding" not in filled:
        raise ValueError(
            f"curation.dedup.min_embedding_similarity={config.dedup.min_embedding_similarity:g} compares the column embedding, "
            "which nothing fills: name a scorer under curation.scorers.embedding, or set it to null"
        )
    aesthetic = config.scorers.choice("aesthetic")
    if aesthetic is not None and aesthetic.name == PROXY and not config.tiers.accept_proxy:
        raise ValueError(
            "curation.scorers.aesthetic='proxy' sets the tiers by contrast, colour and sharpness, which do not measure quality: name a "
            "scorer with a model, or set curation.tiers.accept_proxy to true"
        )
    if config.captioner is not None:
        _check_captioner(config.captioner, config.captions.max_words)
    check_cuts(config.tiers)
    conditions = episode_conditions(config.buckets)
    best = best_condition(config.tiers)
    for _, condition in [*conditions, *([("", best)] if best else [])]:
        for column in condition.columns:
            if column in COLUMNS and column not in filled:
                raise ValueError(
                    f"{condition.key}={condition.text!r} reads the column {column}, which nothing fills: name a scorer under "
                    f"curation.scorers.{column}"
                )
    if best is not None and (late := {"tier"} & set(best.columns)):
        raise ValueError(f"{best.key}={best.text!r} reads {min(late)}, which is known only after tiers are")


def _check_captioner(captioner: CaptionerConfig, max_words: int) -> None:
    chosen_captioner(captioner)
    asked = {name for names in captioner.per_tier.values() for name in names}
    for name, length in captioner.lengths.items():
        if name in asked and length.max_words > max_words:
            raise ValueError(
                f"curation.captioner.lengths.{name}.max_words={length.max_words} is over curation.captions.max_words="
                f"{max_words}: such captions would be left out"
            )
