"""A digest of a user's own images, so that changing one of them reruns what depends on it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from model import storage
from tasks.manifest import sha256_file

PLACEHOLDER = "YOUR-BUCKET"  # in the recipes that come without data


def check_source(path: str, local: bool) -> None:
    """Refuses, without looking at it, what cannot be a source.

    Raises:
        ValueError: the recipe's placeholder, a URI that `storage.check_path` refuses, or on a cluster a path of
            somebody's machine.
    """
    if PLACEHOLDER in path:
        raise ValueError(
            f"source.path={path!r} is a placeholder: give your own images by --source, such as --source "
            "s3://BUCKET/images/, or set source.path"
        )
    if path and not storage.is_remote(storage.check_path(path)) and not local:
        raise ValueError(f"source {path!r} is a path of your machine, which the cluster cannot read; give an s3:// URI")


def fingerprint(path: str) -> str:
    """SHA-256 over the names and contents of the files under `path` (their ETags or checksums, when remote).

    Hidden files and folders of a local source do not count, as nothing reads them: a .DS_Store reruns nothing.

    Raises:
        ValueError: there is nothing at `path`, or no access to it.
    """
    path = storage.check_path(path)
    if not storage.is_remote(path):
        root = Path(path).expanduser()  # as the scan reads it
        if not root.exists():
            raise ValueError(f"source {path!r} does not exist; give a folder of images, tars or Parquet files")
        files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p, root)) if root.is_dir() else [root]
        base = root if root.is_dir() else root.parent  # a single file's name is in its records' keys too
        entries = [[p.relative_to(base).as_posix(), sha256_file(p)] for p in files]
    else:
        try:
            filesystem, inner = storage.filesystem(path)
            entries = [[name, str(filesystem.checksum(name))] for name in sorted(filesystem.find(inner, detail=True))]
        except Exception as error:  # each of fsspec's back ends raises types of its own
            raise ValueError(f"source {path!r} cannot be listed: {error}") from error
    if not entries:
        raise ValueError(f"source {path!r} is empty; give a folder of images, tars or Parquet files")
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
