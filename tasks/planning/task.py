"""Reads the recipe and hands each task its section."""

from __future__ import annotations

from typing import NamedTuple, Union

from flytekit import task
from flytekit.core.local_cache import CACHE_LOCATION

from eval.config import EvalConfig
from model.config import MergeConfig
from tasks import envs
from tasks.artifacts import is_local, plain_errors
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.planning.local_cache import forget_lost_artifacts
from tasks.planning.sections import (
    EncodeStage,
    TrainStage,
    check_ranks,
    check_workflow,
    encode_stage,
    for_own_images,
    train_stage,
)
from tasks.planning.source import check_source
from tasks.publishing.config import PublishConfig
from tasks.recipe import load_recipe


class Sections(NamedTuple):
    """The recipe, cut into what each task depends on."""

    name: str
    source: SourceConfig
    source_path: str
    curation: CurationConfig
    components: ComponentsConfig
    encoding: EncodingConfig
    encode1: EncodeStage
    encode2: EncodeStage
    encode3: EncodeStage
    train1: TrainStage
    train2: TrainStage
    train3: TrainStage
    merge: MergeConfig
    eval: EvalConfig
    seeds: list[int]
    publish: PublishConfig
    recipe_json: str


@task(**envs.planner())
def resolve_recipe(recipe: str, overrides: Union[list[str], str], source: str, ends_in: str) -> Sections:
    """Checks the whole recipe before any work. Not cached: it also forgets artifacts that are gone.

    `ends_in`: the artifact that the workflow ends in, "pipeline", "scorecard", "merged" or "curated".
    """
    with plain_errors():
        loaded = load_recipe(recipe, [overrides] if isinstance(overrides, str) else overrides)
        check_workflow(loaded, ends_in)
        path = source or loaded.source.path or ""
        check_source(path, is_local())
        if ends_in != "curated":
            check_ranks(loaded.train, envs.TRAIN_NNODES, envs.TRAIN_NPROC, is_local())
    if source:
        loaded = for_own_images(loaded)
        words = loaded.curation.captions.max_words
        print(
            f"own images: captions of up to {words} words are kept; the VAE's PSNR is reported, not required",
            flush=True,
        )
    forget_lost_artifacts(CACHE_LOCATION)
    return Sections(
        name=loaded.name,
        source=loaded.source.model_copy(update={"path": None}),
        source_path=path,
        curation=loaded.curation,
        components=loaded.components,
        encoding=loaded.encoding,
        encode1=encode_stage(loaded, 0),
        encode2=encode_stage(loaded, 1),
        encode3=encode_stage(loaded, 2),
        train1=train_stage(loaded, 0),
        train2=train_stage(loaded, 1),
        train3=train_stage(loaded, 2),
        merge=loaded.merge,
        eval=loaded.eval,
        seeds=list(loaded.eval.seeds),
        publish=loaded.publish,
        recipe_json=loaded.model_dump_json(),
    )
