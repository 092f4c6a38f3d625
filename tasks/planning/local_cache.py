"""Drops entries of Flyte's local cache whose files are gone.

A cached output of a local run is a path. If its files are gone, Flyte would still return the path, and the next task
would fail. So entries whose artifact is missing or incomplete, or is an index with a missing part, are dropped before a
run, and their tasks run again. On a cluster nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.logs import get_logger
from tasks.manifest import MANIFEST, load_manifest
from tasks.planning.local_run import is_cache_enabled
from tasks.store import is_index, missing_parts

logger = get_logger(__name__)


def forget_lost_artifacts(location: str) -> int:
    """Drops entries of Flyte's local cache at `location` whose artifacts are gone or lack files; returns their
    number."""
    from diskcache import Cache, Disk
    from diskcache.core import MODE_PICKLE
    from flyteidl.core.literals_pb2 import LiteralMap

    location = Path(location).expanduser()
    if not is_cache_enabled() or not location.is_dir():  # without it, HOME may be unreadable
        return 0

    class WithoutPickles(Disk):
        """Flyte's keys are strings and its values bytes. Other entries are not unpickled, since that can run code."""

        def get(self, key: Any, raw: bool) -> Any:
            return super().get(key, raw) if raw else None

        def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
            return None if mode == MODE_PICKLE else super().fetch(mode, filename, value, read)

    dropped = 0
    with Cache(str(location), disk=WithoutPickles) as cache:
        for key in list(cache.iterkeys()):
            value = cache.get(key) if isinstance(key, str) else None
            if not isinstance(value, bytes):
                continue
            literals = LiteralMap()
            literals.ParseFromString(value)
            paths = [uri for literal in literals.literals.values() for uri in _uris(literal)]
            if any(_is_ours(path) and not _whole(Path(path)) for path in paths):
                del cache[key]
                dropped += 1
    if dropped:
        logger.info(f"local cache: {dropped} entries forgotten, their artifacts are gone; they are made again")
    return dropped


def _uris(literal: Any) -> Iterator[str]:
    kind = literal.WhichOneof("value")
    if kind == "scalar":
        scalar = literal.scalar
        if scalar.WhichOneof("value") == "blob":
            yield scalar.blob.uri
        elif scalar.WhichOneof("value") == "union":
            yield from _uris(scalar.union.value)
    elif kind == "collection":
        for item in literal.collection.literals:
            yield from _uris(item)
    elif kind == "map":
        for item in literal.map.literals.values():
            yield from _uris(item)


def _is_ours(uri: str) -> bool:
    """Whether a path has the form HOME/artifacts/KIND/DIGEST; entries of other projects are not touched."""
    return "://" not in uri and Path(uri).parent.parent.name == "artifacts"


def _whole(path: Path) -> bool:
    if not (path / MANIFEST).is_file():
        return False
    try:
        manifest = load_manifest(path)
    except ValueError:
        return False
    if not all((path / name).is_file() for name in manifest.files | manifest.logs):
        return False
    return not (is_index(path) and missing_parts(path))
