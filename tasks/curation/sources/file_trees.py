"""The location of a user's own images: a local folder or file, or a URI such as s3://bucket/prefix.

A file tree lists one folder at a time and opens files by name. A local tree opens nothing outside its root: links are
neither followed nor read, at any level.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from model.storage import check_path, filesystem, is_remote, join
from tasks.curation.sources.base import visible
from tasks.store import home

FETCH_FILES, FETCH_BYTES = 64, 64 * 2**20  # bytes (or one larger file) that are fetched, and in memory, at a time
BLOCK_BYTES = 2**20  # minimum bytes of a read from a remote file
COPY_BYTES = 2**20
LINK, NOT_A_FILE, HIDDEN = "symbolic link", "neither a file nor a folder", "hidden"
NAMELESS = "folder without a name"
OWN_OUTPUT = "this project's own output (NUCLEUS_HOME)"
NAMES = "give a folder of images, tars or Parquet files, or one such file"


class Folder(NamedTuple):
    """One folder of a source. Names inside `files` and `folders` are without the path, sorted.

    path: of the folder, from the root, with / between; "" for the root.
    files: name -> size in bytes.
    left_out: (reason, path from the root) of entries that are never read: links, devices, hidden files, NUCLEUS_HOME.
    """

    path: str
    folders: list[str]
    files: dict[str, int]
    left_out: list[tuple[str, str]]

    def at(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name


def find(path: str | os.PathLike) -> FileTree:
    """The file tree at `path`, for a scan.

    Raises:
        ValueError: it does not exist, or cannot be listed.
    """
    path = check_path(path)
    if is_remote(path):
        return RemoteFileTree.find(path.rstrip("/"))
    root = Path(path).expanduser().absolute()
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"source {visible(path)!r} does not exist; {NAMES}") from error
    except OSError as error:
        raise _unreadable(str(root), error) from error
    return LocalFileTree(root) if is_folder else LocalFileTree(root.parent, alone=root.name)


def at(uri: str, alone: str | None = None) -> FileTree:
    """The file tree with this root, for reading, without listing. `alone`: see `FileTree`."""
    uri = check_path(uri)
    return RemoteFileTree(uri, alone) if is_remote(uri) else LocalFileTree(Path(uri), alone)


class FileTree:
    """A tree of files. `alone`: the only file that belongs to the source, if the source is one file."""

    alone: str | None = None

    def walk(self) -> Iterator[Folder]:
        """Yields every folder once, parents before children, sorted by name.

        Raises:
            ValueError: a folder cannot be listed; the message names it.
        """
        if self.alone is not None:
            try:
                size = self.size(self.alone)
            except OSError as error:
                raise _unreadable(self.shown(self.alone), error) from error
            yield Folder("", [], {self.alone: size}, [])
            return
        waiting = [("", False)]
        while waiting:
            path, hidden = waiting.pop()
            try:
                folder = self._list(path)
            except ValueError:
                if not hidden:
                    raise
                folder = Folder(path, [], {}, [(HIDDEN, path)])
            below = sorted(folder.folders, reverse=True)
            waiting += [(folder.at(name), hidden or name.startswith(".")) for name in below]
            files = {name: folder.files[name] for name in sorted(folder.files)}
            left_out = list(folder.left_out)
            if hidden or any(name.startswith(".") for name in files):
                unseen = [name for name in files if hidden or name.startswith(".")]
                left_out += [(HIDDEN, folder.at(name)) for name in unseen]
                for name in unseen:
                    del files[name]
            shown = [name for name in reversed(below) if not hidden and not name.startswith(".")]
            yield Folder(path, shown, files, left_out)

    def _list(self, path: str) -> Folder:
        raise NotImplementedError

    def size(self, name: str) -> int:
        raise NotImplementedError

    def uri(self, name: str = "") -> str:
        """Path or URI with which a file (or the root) is opened."""
        raise NotImplementedError

    def shown(self, name: str = "") -> str:
        """Path or URI of a file for messages."""
        return visible(self.uri(name))

    def locator(self, name: str) -> str:
        """The name of a file in records: its path from the root of a local source, the URI for a remote one."""
        return visible(name)

    def open(self, name: str) -> BinaryIO:
        """A seekable file.

        Raises:
            OSError: it cannot be opened, or is not a plain file.
        """
        raise NotImplementedError

    def digest(self, name: str, first: int = 0, stop: int | None = None) -> str:
        """SHA-256 of a local file, or of bytes [first, stop) of it; size and checksum of a remote object."""
        raise NotImplementedError

    def read_batch(self, files: Sequence[tuple[str, int]]) -> list[bytes | OSError]:
        """The contents of some (name, size); an error in place of each unreadable file."""
        raise NotImplementedError

    def batches(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Ranges of files that are read together, given their sizes."""
        return ((i, i + 1) for i in range(len(sizes)))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[BinaryIO]:
        """A file with cheap seeks: the local file itself, or a temporary copy."""
        with self.open(name) as file:
            yield file


class LocalFileTree(FileTree):
    def __init__(self, root: Path, alone: str | None = None) -> None:
        self._root, self.alone = root, alone

    def _list(self, path: str) -> Folder:
        folder, own = Folder(path, [], {}, []), home()
        try:
            with os.scandir(self._root / path) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        folder.left_out.append((LINK, folder.at(entry.name)))
                    elif entry.is_dir(follow_symlinks=False):
                        if entry.name == own.name and Path(entry.path).resolve() == own:
                            folder.left_out.append((OWN_OUTPUT, folder.at(entry.name)))
                        else:
                            folder.folders.append(entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        folder.files[entry.name] = entry.stat(follow_symlinks=False).st_size
                    else:
                        folder.left_out.append((NOT_A_FILE, folder.at(entry.name)))
        except OSError as error:
            raise _unreadable(self.shown(path), error) from error
        folder.left_out.sort()
        return folder

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def uri(self, name: str = "") -> str:
        return str(self._root / name)

    def open(self, name: str) -> BinaryIO:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
        *folders, last = name.split("/")
        if name == self.alone:
            file = os.open(self._root / name, flags)  # the user named it, so a link is allowed
        else:
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for part in folders:
                    inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                    os.close(folder)
                    folder = inner
                file = os.open(last, flags | os.O_NOFOLLOW, dir_fd=folder)
            finally:
                os.close(folder)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError("not a plain file")
        return os.fdopen(file, "rb")

    def digest(self, name: str, first: int = 0, stop: int | None = None) -> str:
        digest = hashlib.sha256()
        with self.open(name) as file:
            if stop is None:
                return hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(first)
            while first < stop and (data := file.read(min(COPY_BYTES, stop - first))):
                digest.update(data)
                first += len(data)
        return digest.hexdigest()

    def read_batch(self, files: Sequence[tuple[str, int]]) -> list[bytes | OSError]:
        contents: list[bytes | OSError] = []
        for name, size in files:
            try:
                with self.open(name) as file:
                    contents.append(file.read(size + 1))  # one more byte shows a file that grew
            except OSError as error:
                contents.append(error)
        return contents


class RemoteFileTree(FileTree):
    def __init__(self, uri: str, alone: str | None = None) -> None:
        self._uri, self.alone = uri, alone
        self._fs, self._root = filesystem(uri)
        self._listed: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # details of the files of the last two folders

    @classmethod
    def find(cls, uri: str) -> RemoteFileTree:
        place = cls(uri)
        try:
            entries = place._fs.ls(place._root, detail=True)
        except FileNotFoundError:
            entries = []
        except Exception as error:  # each of fsspec's back ends raises its own types
            raise ValueError(f"source {visible(uri)!r} cannot be reached: {visible(str(error))}") from error
        if not entries:
            raise ValueError(f"source {visible(uri)!r} does not exist, or is empty; {NAMES}")
        if len(entries) == 1 and entries[0]["name"] == place._root and entries[0]["type"] == "file":
            above, _, name = uri.rpartition("/")
            return cls(above, alone=name)
        return place

    def _list(self, path: str) -> Folder:
        folder, at = Folder(path, [], {}, []), self._at(path)
        try:
            entries = self._fs.ls(at, detail=True)
        except Exception as error:  # each of fsspec's back ends raises its own types
            raise ValueError(f"{self.shown(path)} cannot be listed: {visible(str(error))}") from error
        self._listed = (self._listed[1], {entry["name"]: entry for entry in entries if entry["type"] == "file"})
        for entry in entries:
            name = entry["name"].rstrip("/")[len(at) + 1 :]
            if not name:  # the folder's own object, or a folder without a name (`a//b.png`)
                if entry["type"] == "directory" and entry["name"] != at:
                    folder.left_out.append((NAMELESS, f"{path}//"))
                continue
            if entry["type"] == "directory":
                folder.folders.append(name)
            else:
                folder.files[name] = int(entry["size"])
        return folder

    def _details(self, name: str) -> dict[str, Any]:
        at = self._at(name)
        for listed in self._listed:
            if at in listed:
                return listed[at]
        try:
            return self._fs.info(at)
        except OSError:
            raise
        except Exception as error:  # each of fsspec's back ends raises its own types
            raise OSError(str(error)) from error

    def size(self, name: str) -> int:
        return int(self._details(name)["size"])

    def uri(self, name: str = "") -> str:
        return join(self._uri, name) if name else self._uri

    def locator(self, name: str) -> str:
        return self.shown(name)

    def open(self, name: str) -> BinaryIO:
        try:
            return self._fs.open(self._at(name), "rb", block_size=BLOCK_BYTES)
        except OSError:
            raise
        except Exception as error:  # each of fsspec's back ends raises its own types
            raise OSError(str(error)) from error

    def digest(self, name: str, first: int = 0, stop: int | None = None) -> str:
        details = self._details(name)
        mark = details.get("ETag") or details.get("etag") or details.get("md5Hash") or details.get("content_md5")
        return f"{details['size']}-{mark or self._fs.checksum(self._at(name))}".replace('"', "")

    def read_batch(self, files: Sequence[tuple[str, int]]) -> list[bytes | OSError]:
        wanted = [(name, size) for name, size in files if size]
        contents: dict[str, Any] = {name: b"" for name, _ in files}
        if wanted:
            names, ends = zip(*wanted, strict=True)
            paths = [self._at(name) for name in names]
            answers = self._fs.cat_ranges(paths, [0] * len(paths), list(ends), on_error="return")
            contents |= dict(zip(names, answers, strict=True))
        return [
            content if isinstance(content, bytes | OSError) else OSError(str(content))
            for content in (contents[name] for name, _ in files)
        ]

    def batches(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        first = total = 0
        for i, size in enumerate(sizes):
            if i > first and (i - first >= FETCH_FILES or total + size > FETCH_BYTES):
                yield first, i
                first, total = i, 0
            total += size
        if first < len(sizes):
            yield first, len(sizes)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile() as copy:
            with self.open(name) as file:
                while data := file.read(16 * COPY_BYTES):
                    copy.write(data)
            copy.seek(0)
            yield copy

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def _unreadable(shown: str, error: OSError) -> ValueError:
    why = visible(error.strerror or str(error))
    return ValueError(f"{shown} cannot be read: {why}; grant the right to read it, or move it out of the source")
