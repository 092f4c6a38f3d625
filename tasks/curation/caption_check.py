"""Looks for a usable caption before any image is decoded: without one, no record can be kept whatever it shows."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from tasks.curation.config import CurationConfig
from tasks.curation.scoring import score
from tasks.curation.sources.base import Shard
from tasks.curation.sources.corpus import Corpus
from tasks.envs import CACHE_VERSIONS
from tasks.store import Part, make_part

MAX_BYTES = 16 * 2**30  # of a source that is read for it; most sources have a usable caption in their first record


class _UsableError(Exception):
    """A record may be kept."""


def score_without_pixels(corpus: Corpus, config: CurationConfig) -> list[Part] | None:
    """Score parts of all shards with captions and problems alone, if these reject every record.

    Reads records until one may be kept. The parts of the shards before it are kept, too, so that a later run reads no
    shard twice.

    Returns:
        None if a record may be kept, if the source is made by the recipe, is larger than `MAX_BYTES`, or cannot be read
        (scoring names what cannot).

    Raises:
        ValueError: a larger source has no captions at all, as the scan knows from its names and columns.
    """
    if corpus.report["size_bytes"] > MAX_BYTES:
        if config.captions.required and corpus.report.get("no_captions"):
            raise ValueError(f"no image of the source has a caption: {corpus.report['no_captions']}")
        return None
    parts = []
    for shard in corpus.shards():
        if shard.source != "user":
            return None
        try:
            parts.append(_part(corpus, shard, config))
        except (_UsableError, ValueError):
            return None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            return None
    return parts


def _part(corpus: Corpus, shard: Shard, config: CurationConfig) -> Part:
    embedding = config.dedup.min_embedding_similarity is not None
    captions = {"required": config.captions.required, "max_words": config.captions.max_words}
    inputs = {"shard": shard.shard_id, "digest": shard.digest, "without_pixels": captions, "embedding": embedding}

    def make(out: Path) -> int:
        with tempfile.TemporaryDirectory() as work:
            score.describe_shard(corpus, shard, out, Path(work), lambda row: _refuse_usable(row, config))
            return score.join(Path(work), {}, out, embedding)

    return make_part("scores", shard.shard_id, CACHE_VERSIONS["scores"], inputs, make, config=inputs)


def _refuse_usable(row: dict, config: CurationConfig) -> None:
    """Applies the rules of sources and captions (decisions/rules.py) to one row.

    Raises:
        _UsableError: they do not reject it.
    """
    words = row["words"]
    if not row["problem"] and (min(words) <= config.captions.max_words if words else not config.captions.required):
        raise _UsableError
