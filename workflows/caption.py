"""Captions a source with the captioner of a recipe.

pyflyte run workflows/caption.py caption --recipe my_recipe.yaml --source my_images/

source -> corpus -> scores -> draft decisions -> captions
          shards    per shard  one task           per shard

Only images that the recipe keeps are described. Curating the same source with the same recipe then uses these captions.
"""

from __future__ import annotations

from typing import Union

from flytekit import dynamic, workflow

from tasks import envs
from tasks.artifacts import CaptionsDir
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.curation.task import gather_captions
from tasks.planning.task import resolve_recipe
from workflows.curate import describe, score_source


@dynamic(**envs.dynamic("curation"))
def caption_source(source: SourceConfig, path: str, config: CurationConfig) -> CaptionsDir:
    """Describes the images at `path`, or if it is empty those that `source` makes."""
    if config.captioner is None:
        raise ValueError("the recipe has no captioner: set curation.captioner, see docs/captioning.md")
    corpus, groups, scores = score_source(source, path, config)
    return gather_captions(captions=describe(corpus, groups, scores, config))


@workflow
def caption(recipe: str, overrides: Union[list[str], str] = [], source: str = "") -> CaptionsDir:
    """Writes captions for the source of a recipe, or for your own images.

    Args:
        recipe: name of a recipe in recipes/, or the path of a YAML file.
        overrides: a change such as curation.captioner.name=openai, or a JSON list of them. May be given several times.
        source: your own images instead of the recipe's: a folder (or s3:// URI) of images, tars or Parquet files.
    """
    sections = resolve_recipe(recipe=recipe, overrides=overrides, source=source, ends_in="curated")
    return caption_source(source=sections.source, path=sections.source_path, config=sections.curation)
