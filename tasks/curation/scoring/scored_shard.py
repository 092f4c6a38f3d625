"""Makes the parts of one shard's scores, each once for its inputs, so that a new scorer runs alone.

    measured        passes 1 and 2, thumbnails
    columns         one part for each scorer; its key has the scorer's identity, and the embedding that it reads
    scores          scores.parquet of all columns; its parents are the parts above

The missing ones of `measured` and of the scorers that need pixels are made in one read of the shard.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tasks.curation.config import CurationConfig
from tasks.curation.scorers import Chosen, chosen_scorers, identity
from tasks.curation.scoring import score
from tasks.curation.sources.base import Shard
from tasks.envs import CACHE_VERSIONS
from tasks.manifest import Parent, load_manifest
from tasks.store import Part, fetch_part, home, known_part, make_part

Resources = Literal["shard", "gpu_single"]


class ShardScores:
    """Makes the score part of one shard.

    Args:
        corpus: see sources.base.open_corpus.
    """

    def __init__(self, corpus, shard: Shard, config: CurationConfig) -> None:
        self._corpus, self._shard, self._config = corpus, shard, config.measuring()
        self._chosen = chosen_scorers(config.scorers)
        self._with_embedding = config.dedup.min_embedding_similarity is not None
        self._inputs = {"shard": shard.shard_id, "measuring": self._config.model_dump(mode="json")}

    def make(self, resources: Resources | None = None) -> Part:
        """The score part; the measured part if `resources` is "shard" and scorers that need a GPU remain to run.

        Raises:
            ValueError: the shard cannot be read, or a scorer cannot run.
        """
        waiting = [one for one in self._chosen if resources == "shard" and one.spec.resources != "shard"]
        unfilled = {column for one in waiting for column in one.columns}
        now = [
            one
            for one in self._chosen
            if one not in waiting and not ("embedding" in one.spec.needs and "embedding" in unfilled)
        ]
        measured, columns = self._read_shard([one for one in now if "embedding" not in one.spec.needs])
        embedding = next((columns[one] for one in columns if "embedding" in one.columns), None)
        for one in now:
            if "embedding" in one.spec.needs:
                columns[one] = self._head(one, measured, embedding)
        return self._joined(measured, columns) if len(columns) == len(self._chosen) else measured

    def _read_shard(self, scorers: list[Chosen]) -> tuple[Part, dict[Chosen, Part]]:
        """The measured part and those of scorers that read the shard; missing ones are made in one read."""
        version = CACHE_VERSIONS["scores"]
        measured = known_part("measured", self._shard.shard_id, version, self._inputs)
        keys = {one: self._key(one) for one in scorers}
        parts = {one: known_part("columns", self._shard.shard_id, version, key) for one, key in keys.items()}
        missing = [one for one, part in parts.items() if part is None]
        if measured is not None and not missing:
            return measured, parts
        work = home() / "work"
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work, prefix="scoring-") as folder:
            directories = {Path(folder) / str(i): one for i, one in enumerate(missing)}
            measured_dir = Path(folder) / "measured" if measured is None else None
            for directory in [*directories, *([measured_dir] if measured_dir else [])]:
                directory.mkdir()
            rows = score.score_shard(self._corpus, self._shard, self._config, measured_dir, directories)
            if measured_dir is not None:
                measured = self._sealed("measured", self._inputs, measured_dir, rows[measured_dir])
            for directory, one in directories.items():
                parents = [measured.as_parent()]  # so that the trace of a record reaches everything computed from it
                parts[one] = self._sealed("columns", keys[one], directory, rows[directory], parents)
        return measured, parts

    def _key(self, one: Chosen, embedding: Part | None = None) -> dict[str, Any]:
        key = self._inputs | {"identity": identity(one)}
        return key | ({"embedding": embedding.digest} if embedding is not None else {})

    def _sealed(
        self, kind: str, inputs: dict[str, Any], directory: Path, rows: int, parents: Sequence[Parent] = ()
    ) -> Part:
        def make(out: Path) -> int:
            for path in sorted(directory.iterdir()):
                shutil.move(path, out / path.name)
            return rows

        config = inputs | {"digest": self._shard.digest}
        return make_part(kind, self._shard.shard_id, CACHE_VERSIONS["scores"], inputs, make, parents, config)

    def _head(self, one: Chosen, measured: Part, embedding: Part | None) -> Part:
        """The columns part of a scorer that reads the embedding: no image is read."""
        assert embedding is not None, one.spec.name
        key = self._key(one, embedding)

        def make(out: Path) -> int:
            directory = fetch_part(measured, without=(score.THUMBNAILS_TABLE,))
            return score.score_columns(directory, one, out, fetch_part(embedding))

        parents = [measured.as_parent(), embedding.as_parent()]
        return make_part("columns", self._shard.shard_id, CACHE_VERSIONS["scores"], key, make, parents, key)

    def _joined(self, measured: Part, columns: dict[Chosen, Part]) -> Part:
        ordered = [(part, one) for one, part in columns.items()]
        inputs = {
            "measured": measured.digest,
            "columns": [[list(one.columns), part.digest] for part, one in ordered],
            "embedding": self._with_embedding,
        }

        def make(out: Path) -> int:
            directory = fetch_part(measured, without=(score.THUMBNAILS_TABLE,))
            shutil.copyfile(directory / score.ACCOUNT, out / score.ACCOUNT)
            return score.join(directory, {fetch_part(part): one for part, one in ordered}, out, self._with_embedding)

        parents = [measured.as_parent(), *(part.as_parent() for part, _ in ordered)]
        config = {"shard": self._shard.shard_id, "scorers": [identity(one) for _, one in ordered]}
        return make_part("scores", self._shard.shard_id, CACHE_VERSIONS["scores"], inputs, make, parents, config)


def fetch_pictures(part: Part) -> Path:
    """The directory with the thumbnails of a score or captions part: its own, or that of the part from which it was
    made."""
    manifest = load_manifest(fetch_part(part, without=(".parquet",)))
    if score.THUMBNAILS_TABLE in manifest.files:
        return fetch_part(part)
    (above,) = (parent for parent in manifest.parents if parent.kind in ("measured", "scores", "captions"))
    return fetch_pictures(Part(part.name, above.kind, above.digest, above.uri))
