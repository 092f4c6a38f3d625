"""The `source` and `curation` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from model.config import Fraction, Positive, Section, Seed
from model.storage import check_path


class SourceConfig(Section):
    """Where records come from. `path` (a user's own images) replaces the made ones."""

    scenes: Annotated[int, Field(ge=0)] = 0  # rendered scenes, planted defects apart
    scene_size_px: Annotated[int, Field(ge=32, le=4096)] = 128  # shorter side of a rendered scene, and of a digit
    defect_fraction: Fraction = 0.03  # of `scenes`, all kinds of defects together; if above 0, one of each at least
    digits: Annotated[int, Field(ge=0, le=1797)] = 0
    path: str | None = None
    shards: Positive = 4  # of the made sources
    images_per_shard: Positive = (
        1000  # of a user's loose images (about so many) and Parquet rows (at most, if row groups allow)
    )
    encoding: str | None = None  # of captions without a byte order mark that are not UTF-8, such as cp1252 or shift_jis
    caption_columns: tuple[str, ...] = ()  # read instead of caption, captions, text, texts, prompt and raw
    captions_folder: str | None = None  # below the source: captions_folder/a.txt describes a.png, or FOLDER/a.png
    seed: Seed = 0

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str | None) -> str | None:
        return None if path is None else check_path(path)

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            try:
                b"caption.".decode(encoding)
            except UnicodeError:
                pass
            except LookupError as error:
                raise ValueError(
                    f"{encoding!r} is not a text encoding; use a name that Python knows, such as cp1252, shift_jis or "
                    "utf-16-le"
                ) from error
        return encoding

    @field_validator("caption_columns")
    @classmethod
    def _check_columns(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in columns):
            raise ValueError(f"{columns} names an empty column")
        return columns

    @field_validator("captions_folder")
    @classmethod
    def _check_folder(cls, folder: str | None) -> str | None:
        if folder is None:
            return None
        parts = folder.strip("/").split("/")
        if folder.startswith("/") or not all(parts) or {".", ".."} & set(parts):
            raise ValueError(f"{folder!r} must be a folder inside the source, such as captions")
        return "/".join(parts)


class FilterConfig(Section):
    """Thresholds of passes 1 to 3. A record is rejected by the first rule that it breaks."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
    modes: tuple[str, ...] = ("L", "LA", "P", "PA", "RGB", "RGBA")  # CMYK needs a colour profile
    animated: Literal["reject", "first_frame"] = "reject"  # images of several frames
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


class ScorerConfig(Section):
    """Which scorer fills each column of pass 3 (tasks/curation/scorers); none leaves it empty, and rejects nothing."""

    watermark: str = "classical"
    aesthetic: str = "proxy"
    nsfw: str = "none"
    similarity: str = "none"


class DedupConfig(Section):
    """SHA-256 for exact duplicates. Near ones: two pictures of which either 64-bit hash (pHash, dHash) is within
    `max_hamming_distance` bits are proposed; pHash-256, or both 64-bit hashes together, confirm.

    Made pictures are too plain for hashes: a thumbnail confirms theirs (dedup.py).
    """

    # pHash's distances are even, since half of its bits are set. 4 grows with the corpus; a wider net does with its square.
    max_hamming_distance: Annotated[int, Field(ge=0, le=64)] = 4
    max_fine_distance: Annotated[int, Field(ge=0, le=256)] = 64  # of pHash-256
    max_both_distances: Annotated[int, Field(ge=0, le=64)] = 10  # of pHash and of dHash
    # Of flat pictures the hashes are noise: below this margin (hashes.py) only equal bytes count.
    min_hash_margin: Annotated[float, Field(ge=0)] = 4.0
    # Cosine of the column `embedding` from which two pictures are one, such as 0.97; null compares no embeddings.
    min_embedding_similarity: Annotated[float, Field(gt=0, le=1)] | None = None
    thumbnail_sources: tuple[str, ...] = ("scenes", "digits")
    # A shift by 2 px of 128 changes up to 14 of 64 bits (97 % of scenes); the thumbnail makes so wide a net safe.
    thumbnail_hamming_distance: Annotated[int, Field(ge=0, le=64)] = 14
    thumbnail_px: Annotated[int, Field(ge=16, le=256)] = 64  # shorter side; a shift by one is forgiven
    max_thumbnail_difference: Annotated[float, Field(ge=0, le=255)] = 45.0  # of 255, see dedup.thumbnail_difference


class TierConfig(Section):
    """Tiers A1 (best) to A5 by falling aesthetic score; synthetic records bypass the score."""

    thresholds: tuple[float, float, float, float] = (6.5, 6.0, 5.5, 5.0)  # lowest score of A1, A2, A3, A4
    synthetic_tier: Literal["A1", "A2", "A3", "A4", "A5"] = "A3"
    episodic_buckets: dict[str, Positive] = {"scenes": 4, "digits": 1, "user": 4}  # per source; 1 for any other


class CaptionConfig(Section):
    """How many captions each tier keeps, and the longest in words."""

    per_tier: dict[str, Positive] = {"A1": 4, "A2": 3, "A3": 3, "A4": 2, "A5": 1}
    max_words: Annotated[int, Field(gt=0, le=10_000)] = 200

    @field_validator("per_tier")
    @classmethod
    def _every_tier(cls, value: dict[str, int]) -> dict[str, int]:
        if sorted(value) != ["A1", "A2", "A3", "A4", "A5"]:
            raise ValueError(f"must name each of A1, A2, A3, A4, A5 once, got {', '.join(value) or 'nothing'}")
        return value


class CurationConfig(Section):
    filters: FilterConfig = FilterConfig()
    scorers: ScorerConfig = ScorerConfig()
    dedup: DedupConfig = DedupConfig()
    tiers: TierConfig = TierConfig()
    captions: CaptionConfig = CaptionConfig()
    engine: Literal["duckdb", "spark"] = "duckdb"  # of the tables; spark for more than one machine holds
    max_groups: Annotated[int, Field(ge=1, le=5000)] = 2000  # sub-tasks of a map task; each takes a group of shards
    concurrency: Annotated[int, Field(ge=0)] = 0  # sub-tasks at a time; 0 leaves it to Flyte
    min_success_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0  # of shards that must be made and scored

    def scoring(self) -> CurationConfig:
        """What scores depend on. Every threshold is left at its default, so that a new one needs no new scores."""
        return CurationConfig(
            scorers=self.scorers,
            filters=FilterConfig(formats=self.filters.formats, max_pixels=self.filters.max_pixels),
            dedup=DedupConfig(thumbnail_px=self.dedup.thumbnail_px),
        )

    def deciding(self) -> CurationConfig:
        """What decisions depend on: neither the engine nor how many sub-tasks there are changes them."""
        return self.model_copy(
            update={"engine": "duckdb", "max_groups": 2000, "concurrency": 0, "min_success_ratio": 1.0}
        )
