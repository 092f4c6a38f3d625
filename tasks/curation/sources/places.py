"""Where a user's own images lie: a folder or file of this machine, or below a URI such as s3://bucket/prefix.

Both list names and read files by name. A remote place is listed whole; then only what is asked for is fetched, many
small files at a time.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from model.storage import check_path, filesystem, is_remote, join

FETCH_FILES, FETCH_BYTES = 64, 64 * 2**20  # at most so many (or one larger file) are fetched at a time, and in memory
BLOCK_BYTES = 2**20  # the least that is read of a remote file that is read in parts

Groups = Sequence[Sequence[str]]
Limit = Callable[[str], float]  # bytes that a file of this name may have


class Place(Protocol):
    """`names`: of all files, sorted, with / between folders; hidden ones are left out."""

    names: list[str]

    def shown(self, name: str) -> str:
        """The file's path or URI, for messages."""

    def read(self, groups: Groups, limit: Limit) -> Iterator[list[bytes | None]]:
        """The contents of groups of files, group by group; None for what is larger than its limit."""

    def opened(self, name: str) -> Any:
        """A path, or a seekable file, of which parts can be read."""


def find(path: str | os.PathLike, skipped: Counter) -> Place | None:
    """What lies at `path`, or None. Counts in `skipped` what cannot be an image for its kind or name.

    Raises:
        ValueError: a remote place cannot be listed.
    """
    path = check_path(path)
    if is_remote(path):
        place = RemotePlace(str(path).rstrip("/"), skipped)
        return place if place.there else None
    root = Path(path).expanduser()
    return LocalPlace(root, skipped) if root.exists() else None


class LocalPlace:
    def __init__(self, root: Path, skipped: Counter) -> None:
        self._base = root if root.is_dir() else root.parent
        self.names = sorted(_walk(root, skipped)) if root.is_dir() else [root.name]

    def shown(self, name: str) -> str:
        return str(self._base / name)

    def read(self, groups: Groups, limit: Limit) -> Iterator[list[bytes | None]]:
        for group in groups:
            paths = [self._base / name for name in group]
            yield [p.read_bytes() if p.stat().st_size <= limit(name) else None for p, name in zip(paths, group)]

    def opened(self, name: str) -> Path:
        return self._base / name


def _walk(root: Path, skipped: Counter) -> Iterator[str]:
    """Names of the plain files below `root`. Hidden folders are not entered."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped.update("linked folder" for name in folders if (Path(folder) / name).is_symlink())  # may lead in circles
        for name in files:
            path = Path(folder) / name
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not path.is_file():
                skipped["not a plain file"] += 1
            else:
                yield path.relative_to(root).as_posix()


class RemotePlace:
    def __init__(self, uri: str, skipped: Counter) -> None:
        self._fs, root = filesystem(uri)
        try:
            found = self._fs.find(root, detail=True)
        except FileNotFoundError:
            found = {}
        except Exception as error:  # each of fsspec's back ends raises types of its own
            raise ValueError(f"source {uri!r} cannot be listed: {error}") from error
        self.there = bool(found)
        alone = list(found) == [root]
        self._root, self._uri = (root.rpartition("/")[0], uri.rpartition("/")[0]) if alone else (root, uri)
        self._sizes: dict[str, int] = {}
        for path, details in found.items():
            name = path[len(self._root) + 1 :]
            *folders, last = name.split("/")
            if not last or any(folder.startswith(".") for folder in folders):
                continue  # an object that stands for a folder; a hidden folder
            if last.startswith("."):
                skipped["hidden"] += 1
            else:
                self._sizes[name] = int(details["size"])
        self.names = sorted(self._sizes)

    def shown(self, name: str) -> str:
        return join(self._uri, name)

    def read(self, groups: Groups, limit: Limit) -> Iterator[list[bytes | None]]:
        for batch in self._batches(groups, limit):
            wanted = list(dict.fromkeys(n for group in batch for n in group if 0 < self._sizes[n] <= limit(n)))
            ends = [self._sizes[name] for name in wanted]
            fetched = self._fs.cat_ranges([self._at(name) for name in wanted], [0] * len(wanted), ends)
            for name, data in zip(wanted, fetched, strict=True):
                if isinstance(data, BaseException):
                    raise OSError(f"{self.shown(name)} cannot be read: {data}") from data
            content = dict(zip(wanted, fetched, strict=True))
            for group in batch:
                yield [content.get(name, None if self._sizes[name] else b"") for name in group]

    def _batches(self, groups: Groups, limit: Limit) -> Iterator[list[Sequence[str]]]:
        batch: list[Sequence[str]] = []
        files = size = 0
        for group in groups:
            more = sum(self._sizes[name] for name in group if self._sizes[name] <= limit(name))
            if batch and (files + len(group) > FETCH_FILES or size + more > FETCH_BYTES):
                yield batch
                batch, files, size = [], 0, 0
            batch.append(group)
            files, size = files + len(group), size + more
        if batch:
            yield batch

    def opened(self, name: str) -> Any:
        return self._fs.open(self._at(name), "rb", block_size=BLOCK_BYTES)

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A copy of the file, for as long as the context lasts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PurePosixPath(name).name
            self._fs.get_file(self._at(name), str(path))
            yield path

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"
