"""The `source` and `curation` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model.config import Fraction, Positive, Section


class SourceConfig(Section):
    """Where records come from. `path` (a user's own images) replaces the made ones."""

    scenes: Annotated[int, Field(ge=0)] = 0  # rendered scenes, planted defects apart
    scene_size_px: Positive = 128  # shorter side of a rendered scene
    defect_fraction: Fraction = 0.03  # of `scenes`, for each kind of defect together
    digits: Annotated[int, Field(ge=0)] = 0  # at most 1,797
    path: str | None = None
    shards: Positive = 4
    seed: int = 0


class FilterConfig(Section):
    """Thresholds of passes 1 to 3. A record is rejected by the first rule that it breaks."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
    min_side_px: Positive = 256
    max_pixels: Positive = 100_000_000
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 3.0
    min_bytes_per_pixel: Annotated[float, Field(ge=0)] = 0.0
    min_entropy_bits: Annotated[float, Field(ge=0)] = 0.5
    max_single_color_fraction: Fraction = 0.99
    max_border_fraction: Fraction = 0.5
    max_watermark_score: Fraction = 0.5
    min_aesthetic: float = 0.0  # of 10
    max_nsfw: Fraction = 0.5
    min_image_text_similarity: float = -1.0


class DedupConfig(Section):
    """SHA-256 for exact, pHash for near duplicates within a Hamming distance (bits of hash_size^2)."""

    hash_size: Positive = 8
    max_hamming_distance: Annotated[int, Field(ge=0)] = 4


class TierConfig(Section):
    """Tiers A1 (best) to A5 by falling aesthetic score; synthetic records bypass the score."""

    thresholds: tuple[float, float, float, float] = (6.5, 6.0, 5.5, 5.0)  # lowest score of A1, A2, A3, A4
    synthetic_tier: Literal["A1", "A2", "A3", "A4", "A5"] = "A3"


class CaptionConfig(Section):
    """How many captions each tier keeps, and the longest in words."""

    per_tier: dict[str, Positive] = {"A1": 4, "A2": 3, "A3": 3, "A4": 2, "A5": 1}
    max_words: Positive = 200


class CurationConfig(Section):
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    tiers: TierConfig = TierConfig()
    captions: CaptionConfig = CaptionConfig()
