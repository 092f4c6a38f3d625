"""Reads sealed directories in place (a local folder, an object store or the Hub), without a local copy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model import storage
from tasks import hub_directory
from tasks.manifest import MANIFEST, Manifest, check_covers, load_manifest, parse_manifest, verify
from tasks.store import INDEX, LOCATIONS, Part, home, zip_index

BLOCK_BYTES = 8 << 20  # bytes of a remote file at a time
LATEST, VERSIONS = "latest.json", "versions"  # of published versions (tasks/publishing/s3.py)


def resolve(uri: str | os.PathLike) -> str:
    """The sealed directory of a path or URI: itself, or the version in its `latest.json`.

    For a repository of the Hub, its newest commit.

    Raises:
        ValueError: see `storage.check_path`, or `latest.json` names no digest.
    """
    if hub_directory.is_hub(str(uri)):
        return hub_directory.pinned(str(uri))
    uri = storage.check_path(uri).rstrip("/") or "/"
    if not storage.is_remote(uri) or storage.read_bytes(storage.join(uri, MANIFEST)) is not None:
        return uri
    pointer = storage.read_bytes(storage.join(uri, LATEST))
    if pointer is None:
        return uri
    try:
        digest = str(json.loads(pointer)["digest"])
        bytes.fromhex(digest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{storage.join(uri, LATEST)} names no digest of a version") from error
    return storage.join(uri, VERSIONS, digest)


def load(uri: str | os.PathLike) -> Manifest:
    """The manifest of a sealed directory, unverified.

    Raises:
        ValueError: there is no manifest, or it is not of this project.
    """
    if hub_directory.is_hub(str(uri)):
        return hub_directory.load(str(uri))
    if not storage.is_remote(uri):
        return load_manifest(uri)
    content = storage.read_bytes(storage.join(uri, MANIFEST))
    if content is None:
        raise ValueError(f"{uri} is not a sealed directory: it has no {MANIFEST}")
    return parse_manifest(content, storage.join(uri, MANIFEST))


def digest_at(uri: str) -> str | None:
    """The digest in the manifest at a path or URI; None if no manifest can be read."""
    try:
        return load(uri).digest
    except (ValueError, OSError):
        return None


def check(uri: str | os.PathLike, kind: str | None = None, digest: str | None = None) -> Manifest:
    """Reads every file of a sealed directory and compares it with the manifest; streams remote files block by block.

    Raises:
        ValueError: names the first file that is missing, added or changed, or the manifest itself.
    """
    if hub_directory.is_hub(str(uri)):
        return hub_directory.check(str(uri), kind, digest)
    if not storage.is_remote(uri):
        return verify(uri, kind=kind, digest=digest)
    manifest = load(uri)
    check_covers(manifest, str(uri), kind, digest)
    present, expected = sizes(uri), manifest.files | manifest.logs
    for name in sorted(expected.keys() - present.keys()):
        raise ValueError(f"{uri} lacks {name}, which its manifest lists")
    for name in sorted(present.keys() - expected.keys()):
        raise ValueError(f"{uri} holds {name}, which its manifest does not list")
    for name, wanted in sorted(expected.items()):
        if _sha256(storage.join(uri, name)) != wanted:
            raise ValueError(f"{storage.join(uri, name)} was changed: its SHA-256 is not the manifest's {wanted}")
    return manifest


def sizes(uri: str | os.PathLike) -> dict[str, int]:
    """Path inside a sealed directory -> bytes, for every file except the manifest."""
    if hub_directory.is_hub(str(uri)):
        return hub_directory.sizes(str(uri))
    fs, root = storage.filesystem(uri)
    root = root.rstrip("/")
    entries = fs.find(root, detail=True)
    by_path = {path[len(root) + 1 :]: int(entry["size"]) for path, entry in entries.items()}
    by_path.pop(MANIFEST, None)
    return by_path


def _sha256(uri: str) -> str:
    fs, path = storage.filesystem(uri)
    digest = hashlib.sha256()
    with fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def open_table(uri: str | os.PathLike, name: str) -> Iterator[Any]:
    """A Parquet file of a sealed directory, as pyarrow.parquet.ParquetFile."""
    fs, path = storage.filesystem(storage.join(uri, name))
    with fs.open(path, "rb") as file, pq.ParquetFile(file) as table:
        yield table


def parts(uri: str | os.PathLike) -> Iterator[Part]:
    """The parts of an index, in its order."""
    with open_table(uri, INDEX) as index, open_table(uri, LOCATIONS) as places:
        yield from zip_index(index, places, str(uri))


def newest_pipeline() -> Path:
    """The pipeline artifact that was sealed last.

    Raises:
        ValueError: nothing was published yet.
    """
    folder = home() / "artifacts" / "pipeline"
    sealed = [path for path in folder.glob("*/") if (path / MANIFEST).is_file()] if folder.is_dir() else []
    if not sealed:
        raise ValueError(f"{folder} has no published pipeline yet; run `make reproduce`, or name one with --pipeline")
    return max(sealed, key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
