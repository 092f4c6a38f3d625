"""Local folders and s3:// (or another fsspec URI) behind one interface, for what a run keeps between attempts.

fsspec with s3fs, since DCP's own reader and writer of remote checkpoints are made of it. Credentials and endpoint
are botocore's own (AWS_ENDPOINT_URL, ...), or Flyte's (FLYTE_AWS_ENDPOINT, FLYTE_AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in str(path)


def options(path: str | os.PathLike) -> dict[str, Any]:
    """What fsspec needs to open `path`. Nothing for a local one."""
    if not str(path).startswith("s3://"):
        return {}
    # Listings must be fresh: each thread has a file system of its own, and does not see what another one wrote.
    return {"use_listings_cache": False, **s3_access()}


def s3_access() -> dict[str, str]:
    """"endpoint_url", "key" and "secret" as Flyte names them, each where botocore's own variables leave it open."""
    environment, found = os.environ.get, {}
    endpoint = environment("FLYTE_AWS_ENDPOINT")
    if endpoint and not (environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL")):
        found["endpoint_url"] = endpoint
    key, secret = environment("FLYTE_AWS_ACCESS_KEY_ID"), environment("FLYTE_AWS_SECRET_ACCESS_KEY")
    if key and secret and not environment("AWS_ACCESS_KEY_ID"):
        found |= {"key": key, "secret": secret}
    return found


def filesystem(path: str | os.PathLike) -> tuple[AbstractFileSystem, str]:
    """(file system, the path on it)."""
    from fsspec.core import url_to_fs

    return url_to_fs(str(path) if is_remote(path) else os.path.abspath(path), **options(path))


def check_writable_place(uri: str) -> None:
    """Raises ValueError where `uri` cannot hold a run: no such scheme, bucket, or access."""
    if not is_remote(uri):
        return
    try:
        fs, path = filesystem(uri)
        bucket = path.split("/")[0]
        there = fs.exists(bucket)
    except Exception as error:  # each of fsspec's back ends raises types of its own
        raise ValueError(f"{uri}: {error}") from error
    if not there:
        raise ValueError(f"{uri}: there is no bucket {bucket!r}, or no access to it")


def join(base: str | os.PathLike, *names: str) -> str:
    return "/".join([str(base).rstrip("/"), *names])


def children(folder: str | os.PathLike) -> list[str]:
    """What lies in a folder, each as `folder` + name; nothing where there is no folder."""
    fs, root = filesystem(folder)
    if not fs.exists(root):
        return []
    names = {os.path.basename(path.rstrip("/")) for path in fs.ls(root, detail=False) if path.rstrip("/") != root}
    return [join(folder, name) for name in sorted(names)]


def read_bytes(path: str | os.PathLike) -> bytes | None:
    """The content of a file; None where there is none."""
    fs, where = filesystem(path)
    try:
        return fs.cat_file(where)
    except FileNotFoundError:
        return None


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that appears whole or not at all (an object in S3 does anyway)."""
    if is_remote(path):
        fs, where = filesystem(path)
        fs.pipe_file(where, content)
        return
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def copy_folder(source: str | os.PathLike, target: Path) -> None:
    """Copies a folder to a local path that is not there yet.

    Local files become hard links where the file system allows it: checkpoints are large, and no file of a finished
    one is ever written again.
    """
    fs, root = filesystem(source)
    for name in fs.find(root):
        path = target / os.path.relpath(name, root)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(source):
            fs.get_file(name, str(path))
        else:
            _link(Path(name), path)


def _link(source: Path, target: Path) -> None:
    import shutil

    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def remove(path: str | os.PathLike) -> None:
    """Removes a checkpoint or any folder, its .metadata first: what is half removed must not look finished."""
    fs, where = filesystem(path)
    if fs.exists(join(where, ".metadata")):
        fs.rm_file(join(where, ".metadata"))
    if fs.exists(where):
        fs.rm(where, recursive=True)
