"""Local folders and object stores (s3://, and gs:// or abfs:// where allowed) behind one interface.

Every path that a user, a recipe or an artifact names passes `check_path` before a file system is made for it. fsspec
alone would accept chains such as reference::http://..., whose file lists can run code.

Credentials and endpoint are botocore's own (AWS_ENDPOINT_URL, ...), or Flyte's (FLYTE_AWS_ENDPOINT, ...).
The reasons are in docs/decisions/security.md.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


MANIFEST = "manifest.json"  # seals a directory, with its digest
ATTEMPTS, FIRST_WAIT_S = 5, 1.0  # waits that double, 15 s in total
PERMANENT = (FileNotFoundError, PermissionError)
CLIENTS = ("botocore", "aiobotocore", "aiohttp")  # errors of s3fs's libraries, some of which it does not translate


# scheme -> module and class of its file system; no other class is constructed
STORES = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs", "GCSFileSystem"),
    "abfs": ("adlfs", "AzureBlobFileSystem"),
}
ALLOWED_STORES = "NUCLEUS_STORES"  # environment variable: schemes allowed, separated by commas; default: s3
_LOGIN = re.compile(r"(?<=://).*@", re.DOTALL)
_URI_IN_WORD = re.compile(r"[:/](\\*/)+")  # also s3:/x, s3:\/\/x as in JSON, and //x, whose scheme was split off
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


def allowed_stores() -> tuple[str, ...]:
    """Schemes that `check_path` accepts."""
    named = [name.strip() for name in os.environ.get(ALLOWED_STORES, "s3").split(",") if name.strip()]
    unknown = sorted(set(named) - set(STORES))
    if unknown:
        raise ValueError(f"{ALLOWED_STORES} names {', '.join(unknown)}; it may name {', '.join(STORES)}")
    return tuple(named)


def without_login(uri: str) -> str:
    """One URI for a message, without its query and what may be a user name and a password: all before the last @."""
    return without_logins(_LOGIN.sub("...@", uri))


def without_logins(message: str) -> str:
    """A message without user names, passwords, queries and fragments of the URIs in it, which have no white space.

    Quotes and brackets do not end a URI, as a password may have them; those at the end of a word are kept.
    """
    return re.sub(r"\S+", lambda word: _word_without_login(word.group()), message)


def _word_without_login(word: str) -> str:
    start = _URI_IN_WORD.search(word)
    if start is None:
        return word
    place, rest = word[: start.end()], word[start.end() :]
    _, at, rest = rest.rpartition("@")
    before = re.split(r"[?#]", rest, maxsplit=1)[0]
    query = rest[len(before) + 1 :]
    end = query[len(query.rstrip("'\")]},;:.`")) :]
    return f"{place}{'...@' if at else ''}{before}{f'{rest[len(before)]}...{end}' if query != end else rest[len(before) :]}"


def check_path(path: str | os.PathLike[str]) -> str:
    """The path, if it is a plain local path or a URI of an allowed object store. file:///PATH becomes the plain path.

    Raises:
        ValueError: another scheme, a chain of schemes (::), or a user name or password inside the URI.
    """
    text = str(path)
    shown = without_login(text)
    stores = allowed_stores()
    valid = f"use a plain path, or {' or '.join(f'{name}://BUCKET/PREFIX' for name in stores)}"
    if "\0" in text or any(ord(c) < 32 for c in text):
        raise ValueError(f"{shown!r} has control characters; {valid}")
    if "::" in text:
        raise ValueError(f"{shown!r} chains file systems with '::', which may run code of the first; {valid}")
    scheme = _SCHEME.match(text)
    if scheme is None:
        if "://" in text:
            raise ValueError(f"{shown!r} is not a path or URI; {valid}")
        return text
    name = scheme.group(1)
    if name == "file":
        local = text[scheme.end() :]
        if not local.startswith("/") or "://" in local:
            raise ValueError(f"{shown!r} must be file:///PATH, or a plain path; a path has no ://")
        return local
    if name not in stores:
        hint = f" ({ALLOWED_STORES} may allow it)" if name in STORES else ""
        raise ValueError(f"{shown!r} has the scheme {name!r}, which is not allowed{hint}; {valid}")
    bucket = text[scheme.end() :].split("/")[0]
    login = "@" in bucket or (":" in bucket and "@" in text and not bucket.startswith("arn:"))  # u:PASS/WORD@BUCKET
    if login and name != "abfs":  # abfs://CONTAINER@ACCOUNT is a location, not a login
        raise ValueError(f"the URI of {shown} holds a user name or password; {valid}")
    if not bucket:
        raise ValueError(f"{shown!r} names no bucket; {valid}")
    return text


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path)


def may_pass(error: BaseException) -> bool:
    """Whether the error is a fault of a disk, a network or an object store that another attempt may not have."""
    if isinstance(error, OSError):
        return not isinstance(error, PERMANENT) and error.errno != errno.ENOSPC
    return type(error).__module__.split(".")[0] in CLIENTS


def options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options of fsspec's file system for `path`; none for a local path."""
    if not str(path).startswith("s3://"):
        return {}
    # No cached listings: each thread has its own file system, which does not see the writes of others.
    return {"use_listings_cache": False, **s3_access()}


def s3_access() -> dict[str, str]:
    """ "endpoint_url", "key" and "secret" from Flyte's variables, each only if botocore's own variable is not set."""
    environment, access = os.environ.get, {}
    endpoint = environment("FLYTE_AWS_ENDPOINT")
    if endpoint and not (environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL")):
        access["endpoint_url"] = endpoint
    key, secret = environment("FLYTE_AWS_ACCESS_KEY_ID"), environment("FLYTE_AWS_SECRET_ACCESS_KEY")
    if key and secret and not environment("AWS_ACCESS_KEY_ID"):
        access |= {"key": key, "secret": secret}
    return access


def filesystem(path: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    """(file system, the path on it). Only classes of the schemes that `check_path` accepts are constructed.

    Raises:
        ValueError: see `check_path`; or the package of an allowed store is not installed.
    """
    text = check_path(path)
    if not is_remote(text):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), os.path.abspath(text)
    module, name = STORES[text.split("://")[0]]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{text!r} needs the package {module}, which is not installed") from error
    return kind(**options(text)), kind._strip_protocol(text)


def check_writable_place(uri: str) -> None:
    """Checks that the bucket of a run exists and can be accessed.

    Raises:
        ValueError: no such scheme, bucket, or access.
        ConnectionError: the object store does not answer; a later attempt may succeed.
    """
    if not is_remote(check_path(uri)):
        return
    fs, path = filesystem(uri)
    try:
        bucket = path.split("/")[0]
        fs.info(bucket)  # `exists` does not distinguish a missing bucket from a store that does not answer
    except PERMANENT as error:
        raise ValueError(f"{uri}: there is no bucket {bucket!r}, or no access to it") from error
    except Exception as error:  # each of fsspec's back ends raises its own types
        if _unanswered(error):
            raise ConnectionError(f"{uri}: the object store does not answer: {error}") from error
        raise ValueError(f"{uri}: {error}") from error


def _unanswered(error: Exception) -> bool:
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError

    return isinstance(error, (NoConnection, HTTPClientError)) or (isinstance(error, OSError) and may_pass(error))


def join(base: str | os.PathLike[str], *names: str) -> str:
    return "/".join([str(base).rstrip("/"), *names])


def children(folder: str | os.PathLike[str]) -> list[str]:
    """The entries of a folder, each as `folder` + name; an empty list if the folder does not exist."""
    fs, root = filesystem(folder)
    if not fs.exists(root):
        return []
    names = {os.path.basename(path.rstrip("/")) for path in fs.ls(root, detail=False) if path.rstrip("/") != root}
    return [join(folder, name) for name in sorted(names)]


def read_bytes(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a file; None if it does not exist."""
    fs, where = filesystem(path)
    try:
        content: bytes = fs.cat_file(where)
    except FileNotFoundError:
        return None
    return content


def read_ranges(folder: str | os.PathLike[str], ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes [begin, end) of files below a folder, for each (name, begin, end); fewer if a file is shorter.

    All are requested concurrently. Safe for threads and forked processes: fsspec makes a file system for each.

    Raises:
        ConnectionError: ATTEMPTS attempts could not read a range; the message names it and the file.
        FileNotFoundError, PermissionError: at the first attempt, since a retry would fail too.
    """
    fs, root = filesystem(folder)
    pieces: dict[int, bytes] = {}
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        left = [i for i in range(len(ranges)) if i not in pieces]
        names, begins, ends = (list(column) for column in zip(*(ranges[i] for i in left)))
        answers = fs.cat_ranges([join(root, name) for name in names], begins, ends, on_error="return")
        for i, answer in zip(left, answers, strict=True):
            if isinstance(answer, bytes):
                pieces[i] = answer
            elif attempt == ATTEMPTS - 1 or isinstance(answer, PERMANENT):
                kind = next((kind for kind in PERMANENT if isinstance(answer, kind)), ConnectionError)
                name, begin, end = ranges[i]
                failed = f"{join(folder, name)}: bytes {begin} to {end} could not be read in {attempt + 1} attempt(s)"
                raise kind(f"{failed}: {type(answer).__name__}: {answer}") from answer
        if len(pieces) == len(ranges):
            break
    return [pieces[i] for i in range(len(ranges))]


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file atomically (objects in S3 always are).

    An object store that fails for a moment is asked up to ATTEMPTS times, beyond the retries of its client: one request must
    not end hours of work.
    """
    if not is_remote(path):
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        return
    fs, where = filesystem(path)
    for attempt in range(ATTEMPTS):
        try:
            fs.pipe_file(where, content)
            return
        except Exception as error:  # each of fsspec's back ends raises its own types
            if attempt + 1 == ATTEMPTS or not may_pass(error):
                raise
            time.sleep(FIRST_WAIT_S * 2**attempt)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """A hidden temporary file next to the local `path`, which it replaces atomically when the block ends without an
    error.

    Args:
        sync: flush the content to disk first, so that a power failure leaves the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}"
    )  # a random name, so that nobody can place a link there beforehand
    try:
        yield temporary
        if sync:
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sealed_digest(directory: str | os.PathLike[str]) -> str | None:
    """The digest of a sealed directory (tasks/manifest.py), local or remote; None if it is not sealed."""
    manifest = read_bytes(join(directory, MANIFEST))
    return None if manifest is None else json.loads(manifest)["digest"]


def upload(source: Path, target: str) -> None:
    """Copies a local file to a remote path."""
    fs, where = filesystem(target)
    fs.put_file(str(source), where)


def is_left_out(name: str, without: tuple[str, ...]) -> bool:
    """Whether a path inside a folder matches `without`: endings of names (".tar"), and folders ("files/")."""
    folders = (pattern for pattern in without if pattern.endswith("/"))
    return name.endswith(without) or any(f"/{folder}" in f"/{name}" for folder in folders)


def copy_folder(source: str | os.PathLike[str], target: Path, without: tuple[str, ...] = ()) -> None:
    """Copies a folder to a local path that does not exist yet, without the files that match `without` (`is_left_out`).

    Local files become hard links if the file system allows it: checkpoints are large, and files of a finished
    checkpoint never change.
    """
    fs, root = filesystem(source)
    start = len(root.rstrip("/")) + 1
    names = [name for name in fs.find(root) if not is_left_out(name[start:], without)]
    for name in names:  # before any download: a key of an object store may lead anywhere
        inside = name[start:]
        if not name.startswith(root) or "\\" in inside or any(step in ("", ".", "..") for step in inside.split("/")):
            raise ValueError(f"{join(source, inside)!r} would be written outside of the folder; nothing was copied")
    for name in names:
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


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a checkpoint or any folder. Removes .metadata first, so that a half-removed checkpoint does not look
    finished."""
    fs, where = filesystem(path)
    if fs.exists(join(where, ".metadata")):
        fs.rm_file(join(where, ".metadata"))
    if fs.exists(where):
        fs.rm(where, recursive=True)
