"""The `source` and `curation` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from model.config import TIERS, Fraction, Positive, Section, Seed
from model.names import COMMIT
from model.storage import check_path

MAX_WORDS = 10_000  # of a caption that is kept


class UrlConfig(Section):
    """A source whose tables (Parquet, CSV, TSV) have URLs of images, and settings of the download."""

    column: Annotated[str, Field(min_length=1)] = "url"  # captions are in `source.caption_columns`
    allow_http: bool = False  # in addition to https
    obey_robots: bool = True  # robots.txt, and X-Robots-Tag with one of `robots_directives`
    robots_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    user_agent: Annotated[str, Field(pattern=r"^[\x20-\x7e]{3,200}$")] = "nucleus-flyte/0.1"  # add a contact address
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 256  # requests at a time of each task
    per_host: Positive = 4  # requests at a time to one host
    timeout_s: Annotated[float, Field(gt=0)] = 30.0  # from the request to the last byte
    max_retries: Annotated[int, Field(ge=0)] = 4  # after 429, 5xx, a timeout or a lost connection
    max_redirects: Annotated[int, Field(ge=0)] = 5
    max_bytes: Annotated[int, Field(ge=1, le=256 * 2**20)] = 32 * 2**20  # of an image
    content_types: tuple[str, ...] = ("image/",)  # prefix of the Content-Type of an image
    download: Annotated[int, Field(ge=0)] = 0  # another number downloads everything again, failures included

    def content(self) -> dict[str, Any]:
        """The settings that determine which images are downloaded."""
        return self.model_dump(mode="json", exclude={"concurrency", "per_host"})


class SourceConfig(Section):
    """The source of records. `path` (a user's own images) replaces the made ones."""

    scenes: Annotated[int, Field(ge=0)] = 0  # number of rendered scenes, without planted defects
    scene_size_px: Annotated[int, Field(ge=32, le=4096)] = 128  # shorter side of a rendered scene, and of a digit
    defect_fraction: Fraction = 0.03  # share of `scenes`, all kinds together; if above 0, at least one of each
    digits: Annotated[int, Field(ge=0, le=1797)] = 0
    made: dict[str, Positive] = {}  # number of records of other made sources (sources/made/registry.py)
    path: str | None = None
    shards: Positive = 4  # of the made sources
    images_per_shard: Positive = 1000  # loose images (approximate) or Parquet rows (at most, if row groups allow)
    encoding: str | None = None  # of captions without a byte order mark that are not UTF-8, such as cp1252
    caption_columns: tuple[str, ...] = ()  # read instead of caption, captions, text, texts, prompt and raw
    urls: UrlConfig | None = None  # the tables at `path` have URLs, which are downloaded
    # In the source or its tars; CAPTIONS/x/a.txt describes x/a.png and FOLDER/x/a.png.
    captions_folder: str | None = None
    seed: Seed = 0

    @property
    def is_made(self) -> bool:
        """Whether the recipe makes its own images."""
        return bool(self.scenes or self.digits or self.made)

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
    animated: Literal["reject", "first_frame"] = "reject"  # images with several frames
    min_side_px: Positive = 256
    max_pixels: Positive = 178_956_970  # as Pillow warns from; memory has a separate limit, by format: docs/security.md
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 3.0
    min_bytes_per_pixel: Annotated[float, Field(ge=0)] = 0.0
    min_entropy_bits: Annotated[float, Field(ge=0)] = 0.5
    max_single_color_fraction: Fraction = 0.99
    max_border_fraction: Fraction = 0.5
    # Pass 3; null: no threshold. A threshold on a column that no scorer fills is refused.
    max_watermark_score: Fraction | None = 0.5
    min_aesthetic: float | None = None  # of 10
    max_nsfw: Fraction | None = None
    min_image_text_similarity: float | None = None
    max_quality: Annotated[float, Field(ge=0, le=100)] | None = None  # BRISQUE: 0 is best
    max_text_area: Fraction | None = None  # share of the image


def is_path(repo_id: str) -> bool:
    """Whether `repo_id` is a directory: only ./NAME and /PATH are, so that a folder OWNER/NAME cannot replace a Hub
    id."""
    return repo_id.startswith(("./", "../", "/"))


class HubModel(Section):
    """A model of the Hub at a commit, or in a directory (./NAME or /PATH) that all tasks can read."""

    repo_id: str
    revision: str | None = None  # a commit: 40 hex digits; none for a directory

    @property
    def is_directory(self) -> bool:
        return is_path(self.repo_id)

    @model_validator(mode="after")
    def _check_commit(self) -> HubModel:
        _check_commit(self.revision)
        return self


def _check_commit(revision: str | None) -> None:
    if revision is not None and not COMMIT.fullmatch(revision):
        raise ValueError(
            f"revision {revision!r} is not a commit of 40 hex digits: a branch or tag can move, and scores are kept under "
            "the revision"
        )


class ScorerChoice(Section):
    """A scorer by name, with settings of scorers whose weights are on the Hub."""

    name: str
    repo_id: str | None = None  # or a directory with the repository's files, as ./NAME or /PATH
    revision: str | None = None  # a commit: 40 hex digits
    encoder: HubModel | None = None  # encoder of a head that does not read the column `embedding`
    label: str | int | None = None  # of a classifier: the class whose probability is the score
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def is_directory(self) -> bool:
        return self.repo_id is not None and is_path(self.repo_id)

    @model_validator(mode="after")
    def _check_commit(self) -> ScorerChoice:
        _check_commit(self.revision)
        return self


class ScorerConfig(Section):
    """The scorer of each column of pass 3 (tasks/curation/scorers); "none" leaves it empty, which rejects nothing."""

    watermark: str | ScorerChoice = "classical"
    aesthetic: str | ScorerChoice = "proxy"
    nsfw: str | ScorerChoice = "none"
    similarity: str | ScorerChoice = "none"
    quality: str | ScorerChoice = "none"
    text_area: str | ScorerChoice = "none"
    faces: str | ScorerChoice = "none"
    embedding: str | ScorerChoice = "none"

    def choice(self, column: str) -> ScorerChoice | None:
        """The scorer of a column; None if nothing fills it."""
        value = getattr(self, column)
        choice = ScorerChoice(name=value) if isinstance(value, str) else value
        return None if choice.name == "none" else choice


class DedupConfig(Section):
    """SHA-256 for exact duplicates. Near duplicates: pairs with either 64-bit hash (pHash, dHash) within
    `max_hamming_distance` bits are proposed; pHash-256 and both 64-bit hashes together confirm.

    Made pictures are too plain for hashes: thumbnails confirm them (dedup.py).
    """

    # pHash's distances are even, since half of its bits are set. Work grows with the corpus at 4, with its square at
    # larger radii.
    max_hamming_distance: Annotated[int, Field(ge=0, le=64)] = 4
    # Any of these confirms a pair; docs/scale.md has the recall.
    max_fine_distance: Annotated[int, Field(ge=0, le=256)] = 64  # of pHash-256, with both 64-bit hashes ...
    max_far_distance: Annotated[int, Field(ge=0, le=64)] = 20  # ... within this
    max_both_distances: Annotated[int, Field(ge=0, le=64)] = 10  # of pHash and of dHash
    max_marked_distance: Annotated[int, Field(ge=0, le=256)] = (
        96  # of pHash-256, if dHash proposes: a logo changes pHash
    )
    # Hashes of flat pictures are noise: below this margin (hashes.py) only equal bytes count. docs/scale.md has results
    # of 4 to 16 on photographs.
    min_hash_margin: Annotated[float, Field(ge=0)] = 14.0
    # Minimum cosine of the column `embedding` of duplicates, such as 0.97; null compares no embeddings.
    min_embedding_similarity: Annotated[float, Field(gt=0, le=1)] | None = None
    thumbnail_sources: tuple[str, ...] = ("scenes", "digits")
    # A shift by 2 px of 128 changes up to 14 of 64 bits (97 % of scenes); the thumbnail makes so large a radius safe.
    thumbnail_hamming_distance: Annotated[int, Field(ge=0, le=64)] = 14
    thumbnail_px: Annotated[int, Field(ge=16, le=256)] = 64  # shorter side; a shift by one pixel is tolerated
    max_thumbnail_difference: Annotated[float, Field(ge=0, le=255)] = 45.0  # of 255, see dedup.thumbnail_difference


class TierConfig(Section):
    """Tiers A1 (best) to A5 by falling aesthetic score; synthetic records bypass the score."""

    thresholds: tuple[float, float, float, float] = (6.5, 6.0, 5.5, 5.0)  # lowest score of A1, A2, A3, A4
    # Instead of thresholds: the share of records in A1, in A1 and A2, ..., among those that have a score, are not
    # synthetic, and pass the filters.
    quantiles: tuple[Fraction, Fraction, Fraction, Fraction] | None = None
    synthetic_tier: Literal["A1", "A2", "A3", "A4", "A5"] = "A3"
    best_where: str | None = None  # a condition (conditions.py): other records are A3 at best, such as quality < 45
    accept_proxy: bool = False  # allow tiers by the classical proxy, which measures only contrast, colour and sharpness


class EpisodeConfig(Section):
    """An episode: the records that meet a condition over columns (conditions.py). The paper's "episodic bucket"."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    where: str

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "rest":
            raise ValueError("'rest' is the episode of records that are in no other; choose another name")
        return name


class CaptionConfig(Section):
    """Number of captions that each tier keeps, and the maximum number of words."""

    per_tier: dict[str, Positive] = {"A1": 4, "A2": 3, "A3": 3, "A4": 2, "A5": 1}
    max_words: Annotated[int, Field(gt=0, le=MAX_WORDS)] = 200
    required: bool = True  # False keeps records without a caption

    @field_validator("per_tier")
    @classmethod
    def _every_tier(cls, value: dict[str, int]) -> dict[str, int]:
        return _named_by_tier(value)


def _named_by_tier(value: dict) -> dict:
    if sorted(value) != sorted(TIERS):
        raise ValueError(f"must name each of {', '.join(TIERS)} once, got {', '.join(value) or 'nothing'}")
    return value


class LengthConfig(Section):
    """A length class of captions: the prompt, and the answers that are kept."""

    prompt: Annotated[str, Field(min_length=1)]
    min_words: Positive
    max_words: Positive
    max_tokens: Positive  # a longer answer is truncated and not kept


LENGTHS = {
    "short": LengthConfig(
        prompt="Write a caption for this image: one phrase of 5 to 12 words. Reply with the caption only.",
        min_words=3,
        max_words=20,
        max_tokens=64,
    ),
    "medium": LengthConfig(
        prompt="Describe this image in one or two sentences of about 30 words in all: the main subjects, what they do, "
        "and where. Reply with the description only.",
        min_words=15,
        max_words=70,
        max_tokens=192,
    ),
    "long": LengthConfig(
        prompt="Describe this image in one paragraph of about 120 words: every subject with its number, colour, "
        "position and action, then background, light, viewpoint and style; quote any visible text. Do not guess what "
        "is not visible. Reply with the description only.",
        min_words=50,
        max_words=200,
        max_tokens=512,
    ),
}


class CaptionerConfig(Section):
    """A model that writes captions (tasks/curation/captioning), and its prompts by tier."""

    name: str  # an entry of tasks.curation.captioning.CAPTIONERS
    model: str = ""  # qwen3-vl: a Hub repository, or a directory that begins with ./ or /; openai: the name that the endpoint serves
    revision: str = ""  # qwen3-vl: the commit; openai: distinguishes these weights from others of the same name
    lengths: dict[str, LengthConfig] = LENGTHS
    # Length classes to request for each image of a tier.
    per_tier: dict[str, tuple[str, ...]] = {
        "A1": ("short", "medium", "long"),
        "A2": ("medium", "long"),
        "A3": ("short", "medium"),
        "A4": ("short", "medium"),
        "A5": ("short",),
    }
    tier_prompts: dict[str, dict[str, str]] = {}  # tier -> class -> a prompt instead of that of `lengths`
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] | None = "en"  # None: any
    use_originals: bool = True  # keep the owner's captions next to the new ones; they also stay if no answer is kept
    attempts: Positive = 3  # per caption, until an answer is kept
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.2
    image_px: Annotated[int, Field(ge=64, le=4096)] = 1024  # longer side of the model's input
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # qwen3-vl
    # From here on settings of requests, on which captions do not depend.
    device: str = "auto"  # qwen3-vl; auto: a GPU if there is one
    batch_size: Positive = 8  # qwen3-vl
    endpoint: str | None = None  # openai: such as http://vllm-captioner:8000/v1, which NUCLEUS_ENDPOINTS must list
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*_API_KEY$")] | None = (
        None  # environment variable with the key
    )
    concurrency: Annotated[int, Field(ge=1, le=512)] = 32  # requests at a time of each task
    timeout_s: Annotated[float, Field(gt=0)] = 120.0  # of one request
    max_retries: Annotated[int, Field(ge=0)] = 8  # after 429, 5xx or a timeout

    @field_validator("per_tier")
    @classmethod
    def _every_tier(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return _named_by_tier(value)

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"{endpoint!r} must be an http(s) URL without query, such as http://vllm-captioner:8000/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"the URL of {parts.hostname} has a login; name the key's variable in api_key_env")
        return endpoint.rstrip("/")

    @model_validator(mode="after")
    def _check_lengths(self) -> CaptionerConfig:
        asked = [(f"per_tier.{tier}", name) for tier, names in self.per_tier.items() for name in names]
        asked += [(f"tier_prompts.{tier}", name) for tier, prompts in self.tier_prompts.items() for name in prompts]
        for key, name in asked:
            if name not in self.lengths:
                raise ValueError(f"{key} names the class {name!r}; lengths has {', '.join(self.lengths) or 'none'}")
        if unknown := sorted(set(self.tier_prompts) - set(self.per_tier)):
            raise ValueError(f"tier_prompts names the tier {unknown[0]!r}; tiers are {', '.join(self.per_tier)}")
        for name, length in self.lengths.items():
            if length.min_words > length.max_words:
                raise ValueError(f"lengths.{name}: min_words={length.min_words} is over max_words={length.max_words}")
        return self

    def prompt(self, tier: str, length: str) -> str:
        return self.tier_prompts.get(tier, {}).get(length) or self.lengths[length].prompt

    def content(self) -> dict[str, Any]:
        """The settings that captions depend on."""
        how = {"device", "batch_size", "endpoint", "api_key_env", "concurrency", "timeout_s", "max_retries"}
        return self.model_dump(mode="json", exclude=how)


class CurationConfig(Section):
    filters: FilterConfig = FilterConfig()
    scorers: ScorerConfig = ScorerConfig()
    dedup: DedupConfig = DedupConfig()
    tiers: TierConfig = TierConfig()
    # A record is in the first episode whose condition it meets, else in `rest`.
    buckets: tuple[EpisodeConfig, ...] = ()
    captions: CaptionConfig = CaptionConfig()
    takedown: str | None = None  # a list of records that must not be used: see tasks/curation/takedown.py
    captioner: CaptionerConfig | None = None  # None: only the owners' captions
    engine: Literal["duckdb", "spark"] = "duckdb"  # of the tables; spark if they do not fit on one machine
    max_groups: Annotated[int, Field(ge=1, le=5000)] = 2000  # sub-tasks of a map task; each processes a group of shards
    concurrency: Annotated[int, Field(ge=0)] = 0  # sub-tasks at a time; 0 leaves it to Flyte
    min_success_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of shards that must be made and scored

    @field_validator("takedown")
    @classmethod
    def _check_takedown(cls, takedown: str | None) -> str | None:
        return None if takedown is None else check_path(takedown)

    def measuring(self) -> CurationConfig:
        """The settings that passes 1 and 2 depend on."""
        dedup = DedupConfig(thumbnail_px=self.dedup.thumbnail_px)
        return self.scoring().model_copy(update={"scorers": ScorerConfig(), "dedup": dedup})

    def scoring(self) -> CurationConfig:
        """The settings that scores depend on. Thresholds are at their defaults, so that a new threshold needs no new
        scores."""
        return CurationConfig(
            scorers=self.scorers,
            filters=FilterConfig(formats=self.filters.formats, max_pixels=self.filters.max_pixels),
            dedup=DedupConfig(
                thumbnail_px=self.dedup.thumbnail_px,
                min_embedding_similarity=None if self.dedup.min_embedding_similarity is None else 1.0,
            ),
        )

    def deciding(self) -> CurationConfig:
        """The settings that decisions depend on: not the engine, nor the number of sub-tasks. New captions and
        takedowns are already in the parts."""
        return self.model_copy(
            update={
                "captioner": None,
                "takedown": None,
                "engine": "duckdb",
                "max_groups": 2000,
                "concurrency": 0,
                "min_success_ratio": 1.0,
            }
        )

    @property
    def needs_captions(self) -> bool:
        """Whether images without a caption of their owner are left out."""
        return self.captions.required and self.captioner is None

    def before_captions(self) -> CurationConfig:
        """These settings for the draft decision: all captions, and images without a caption, are kept."""
        captions = self.captions.model_copy(update={"max_words": MAX_WORDS, "required": False})
        return self.model_copy(update={"captions": captions, "captioner": None})
