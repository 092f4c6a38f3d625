"""A user's own images: a folder with captions beside them, WebDataset tars, or Parquet with image bytes.

    folder   a.png with a.txt (a caption per line), a.json or a.png.txt beside it, or named in a metadata.csv or
             metadata.jsonl of its folder (file_name, and text or caption(s))
    tar      a.jpg with a.txt or a.json; read in memory, never extracted to disk
    Parquet  a column `image` (bytes, or {"bytes", "path"}), and a column of captions

A path may be one such file, or a folder with any mix of them, here or at a URI (s3://bucket/prefix). Bytes pass through
untouched, and whether they decode is for curation to say: only what no name calls an image is skipped here, and
counted. An image without a caption has captions [].
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import math
import os
import tarfile
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from tasks.curation.sources import places
from tasks.curation.sources.places import Place, RemotePlace

IMAGE_EXTENSIONS = (
    "png jpg jpeg jpe jfif webp gif bmp tif tiff avif jp2 ppm pgm".split()  # what curation may decode or reject
)
SIDECAR_EXTENSIONS = ("txt", "json")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_COLUMNS = ("image", "image_bytes", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts")
MAX_MEMBER_BYTES = 256 * 2**20  # nothing larger is read into memory
MAX_SIDECAR_BYTES = 2**20
BATCH_ROWS = 64
_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
VALID = (
    f"give a folder of images (.{', .'.join(IMAGE_EXTENSIONS[:5])} ...) with captions beside them, WebDataset tars, "
    f"or Parquet files with a column of image bytes ({', '.join(IMAGE_COLUMNS[:2])})"
)


class Item(NamedTuple):
    """One image. `locator` is its place inside the source, such as `sub/a.png`, `x.tar:a.png` or `x.parquet:7`."""

    key: str
    ext: str
    data: bytes
    captions: list[str]
    locator: str


class _Part(Protocol):
    count: int

    def read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]: ...


@dataclass
class UserSource:
    """A scanned source: how many units it has (images, or whole remote tars), and a reader of any range of them."""

    parts: list[_Part]
    skipped: Counter = field(default_factory=Counter)  # what the scan left out, and why

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def counts_images(self) -> bool:
        return not any(isinstance(part, _RemoteTarPart) for part in self.parts)

    def read(self, start: int, stop: int, skipped: Counter | None = None) -> Iterator[Item]:
        """Units `start` to `stop` (exclusive) in the order of the scan; counts in `skipped` what cannot be read."""
        skipped = Counter() if skipped is None else skipped
        ends = list(accumulate(part.count for part in self.parts))
        for i in range(bisect_right(ends, start), len(self.parts)):
            base = ends[i] - self.parts[i].count
            if base >= stop:
                break
            yield from self.parts[i].read(max(0, start - base), min(self.parts[i].count, stop - base), skipped)


def scan(path: str | os.PathLike) -> UserSource:
    """Lists the images of a source in an order that its names decide, without reading them.

    Of a remote source this reads names, metadata files and the footers of Parquet files. What a remote tar holds shows
    when the shard that has it reads it.

    Raises:
        ValueError: nothing is there, it holds no image, or a metadata file, tar or Parquet file cannot be read.
    """
    skipped: Counter = Counter()
    place = places.find(path, skipped)
    if place is None:
        raise ValueError(f"source {str(path)!r} does not exist; {VALID}")
    parts: list[_Part] = []
    loose: list[str] = []
    rest: list[str] = []
    for name in place.names:
        if name.lower().endswith(TAR_SUFFIXES):
            far = isinstance(place, RemotePlace)
            parts.append(_RemoteTarPart(place, name) if far else _TarPart.scan(place.opened(name), name, skipped))
        elif name.lower().endswith(".parquet"):
            part = _ParquetPart.scan(place, name)
            if part is None:
                skipped[".parquet without image bytes"] += 1
            else:
                parts.append(part)
        elif _ext(name) in IMAGE_EXTENSIONS:
            loose.append(name)
        else:
            rest.append(name)
    if loose:
        parts.insert(0, _FolderPart.scan(place, loose, rest, skipped))
    else:
        skipped.update(f".{_ext(name)}" if _ext(name) else "no extension" for name in rest)
    source = UserSource(parts, skipped)
    if not source.count:
        found = ", ".join(f"{n} x {what}" for what, n in sorted(skipped.items())) or "nothing"
        raise ValueError(f"source {str(path)!r} holds no image (found {found}); {VALID}")
    return source


def _ext(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if _ext(name) else name


def _key(locator: str) -> str:
    """Depends on the locator alone, so that adding an image renames no other."""
    return f"user-{hashlib.sha256(locator.encode('utf-8', 'surrogateescape')).hexdigest()[:20]}"


def _item(locator: str, ext: str, data: bytes, texts: list[str]) -> Item:
    return Item(_key(locator), ext, data, texts, locator)


# ---------------------------------------------------------------- captions


def _texts(value: Any) -> list[str]:
    """Captions in a string or in a list of strings; anything else holds none. Different, stripped, valid Unicode."""
    values = value if isinstance(value, (list, tuple)) else [value]
    clean = (text.encode("utf-8", "replace").decode().strip() for text in values if isinstance(text, str))
    return list(dict.fromkeys(text for text in clean if text))


def _named_texts(row: dict[str, Any]) -> list[str]:
    return _texts([text for name in CAPTION_COLUMNS for text in _texts(row.get(name))])


def _sidecar_texts(ext: str, data: bytes | None, skipped: Counter) -> list[str]:
    if data is None or len(data) > MAX_SIDECAR_BYTES:
        skipped["sidecar over 1 MiB"] += 1
        return []
    text = data.decode("utf-8-sig", "replace")
    if ext == "txt":
        return _texts(text.splitlines())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        skipped["unreadable .json sidecar"] += 1
        return []
    return _named_texts(value) if isinstance(value, dict) else _texts(value)


def _metadata_rows(place: Place, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a metadata.csv or metadata.jsonl."""
    path = place.shown(name)
    ((data,),) = place.read([[name]], lambda _: math.inf)
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "replace").read()
    if _ext(name) == "csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            columns = reader.fieldnames or []
            if "file_name" not in columns:
                found = ", ".join(columns) or "none"
                raise ValueError(f"{path} has columns {found}; it needs file_name, and text or caption")
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}, is not CSV: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{path}, line {number}, must be an object with file_name, and text or caption")
        yield row


# ---------------------------------------------------------------- a folder


@dataclass
class _FolderPart:
    place: Place
    names: list[str]
    sidecars: dict[str, list[str]]  # image -> its sidecars' names
    listed: dict[str, list[str]]  # image -> captions of metadata files

    @property
    def count(self) -> int:
        return len(self.names)

    @classmethod
    def scan(cls, place: Place, names: list[str], rest: list[str], skipped: Counter) -> _FolderPart:
        beside = _sidecars(names, rest)
        used = {name for found in beside.values() for name in found}
        known = set(names)
        listed: dict[str, list[str]] = defaultdict(list)
        for name in rest:
            if PurePosixPath(name).name in ("metadata.csv", "metadata.jsonl"):
                for row in _metadata_rows(place, name):
                    # Only compared with names that the walk found: a path that leads outside matches none.
                    target = os.path.normpath(PurePosixPath(name).parent / str(row["file_name"]))
                    if target in known:
                        listed[target] += _named_texts(row)
                    else:
                        skipped["listed but absent"] += 1
            elif name not in used:
                skipped[f".{_ext(name)}" if _ext(name) else "no extension"] += 1
        return cls(place, names, beside, dict(listed))

    def read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]:
        groups = [[name, *self.sidecars.get(name, ())] for name in self.names[start:stop]]
        for (name, *sidecars), (data, *found) in zip(groups, self.place.read(groups, _max_bytes), strict=True):
            if data is None:
                skipped["larger than 256 MiB"] += 1
                continue
            texts = list(self.listed.get(name, ()))
            for sidecar, text in zip(sidecars, found, strict=True):
                texts += _sidecar_texts(_ext(sidecar), text, skipped)
            yield _item(name, _ext(name), data, _texts(texts))


def _sidecars(images: list[str], others: list[str]) -> dict[str, list[str]]:
    """Which .txt and .json files describe which image: `a.txt` and `a.png.txt` both belong to `a.png`."""
    present = {_stem(name): [] for name in others if _ext(name) in SIDECAR_EXTENSIONS}
    for name in others:
        if _ext(name) in SIDECAR_EXTENSIONS:
            present[_stem(name)].append(name)
    # Tars made of `.` have names such as ./a.png.
    found = {name: present.get(_stem(name), []) + present.get(str(PurePosixPath(name)), []) for name in images}
    return {name: sidecars for name, sidecars in found.items() if sidecars}


def _max_bytes(name: str) -> int:
    return MAX_SIDECAR_BYTES if _ext(name) in SIDECAR_EXTENSIONS else MAX_MEMBER_BYTES


# ---------------------------------------------------------------- tars


@dataclass
class _TarPart:
    """Members are found by their headers and read in the order of the file, so that a compressed tar streams.

    Names inside the tar only label records: nothing is written under them.
    """

    path: Path
    name: str
    samples: list[tuple[tarfile.TarInfo, str, list[tarfile.TarInfo]]]  # image, its locator, its sidecars

    @property
    def count(self) -> int:
        return len(self.samples)

    @classmethod
    def scan(cls, path: Path, name: str, skipped: Counter) -> _TarPart:
        images: list[tarfile.TarInfo] = []
        others: list[tarfile.TarInfo] = []
        with _open_tar(path) as tar:
            for member in _members(tar):
                short = PurePosixPath(member.name).name
                if member.isdir():
                    continue
                if not member.isreg():
                    skipped["not a plain file"] += 1
                elif member.size > MAX_MEMBER_BYTES:
                    skipped["larger than 256 MiB"] += 1
                elif short.startswith("."):
                    skipped["hidden"] += 1
                elif _ext(short) in IMAGE_EXTENSIONS:
                    images.append(member)
                else:
                    others.append(member)
        beside = _sidecars([m.name for m in images], [m.name for m in others])
        used = {name for found in beside.values() for name in found}
        skipped.update(f".{_ext(m.name)}" if _ext(m.name) else "no extension" for m in others if m.name not in used)
        by_name = {member.name: member for member in others}
        repeats: Counter = Counter()
        samples = []
        for member in images:
            repeats[member.name] += 1
            again = f"#{repeats[member.name]}" if repeats[member.name] > 1 else ""
            sidecars = [by_name[sidecar] for sidecar in beside.get(member.name, ())]
            samples.append((member, f"{name}:{member.name}{again}", sidecars))
        return cls(path, name, samples)

    def read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]:
        with _open_tar(self.path) as tar:
            for image, locator, sidecars in self.samples[start:stop]:
                data, texts = b"", []
                for member in sorted([image, *sidecars], key=lambda member: member.offset):
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    if member is image:
                        data = file.read()
                    else:
                        texts += _sidecar_texts(_ext(member.name), file.read(MAX_SIDECAR_BYTES + 1), skipped)
                yield _item(locator, _ext(image.name), data, _texts(texts))


@dataclass
class _RemoteTarPart:
    """A tar that one shard has, and fetches whole: dividing its images would take every shard through all of it."""

    place: RemotePlace
    name: str
    count: int = 1

    def read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]:
        if start < stop:
            with self.place.fetched(self.name) as path:
                part = _TarPart.scan(path, self.name, skipped)
                yield from part.read(0, part.count, skipped)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members. tarfile takes a broken header for the end of the archive; here that is an error."""
    last = None
    for last in tar:
        yield last
    if last is not None and last.isreg():
        blocks = -(-last.size // tarfile.BLOCKSIZE)
        tar.fileobj.seek(last.offset_data + blocks * tarfile.BLOCKSIZE)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"broken header after {last.name!r}")


class _open_tar:
    """tarfile.open whose errors, while it opens or reads, are one ValueError with the path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tarfile.TarFile:
        try:
            self._tar = tarfile.open(self._path, "r:*")
        except _TAR_ERRORS as error:
            raise self._explained(error) from error
        return self._tar

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._tar.close()
        if isinstance(error, _TAR_ERRORS):
            raise self._explained(error) from error

    def _explained(self, error: BaseException) -> ValueError:
        return ValueError(f"{self._path} is not a readable tar: {error}; {VALID}")


# ---------------------------------------------------------------- Parquet


@dataclass
class _ParquetPart:
    place: Place
    name: str
    count: int
    column: str
    columns: list[str]

    @classmethod
    def scan(cls, place: Place, name: str) -> _ParquetPart | None:
        """None if the file has no column of image bytes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(place.opened(name)) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{place.shown(name)} is not a readable Parquet file: {error}; {VALID}") from error
        column = next((name for name in IMAGE_COLUMNS if name in schema.names and _holds_bytes(schema, name)), None)
        if column is None:
            return None
        return cls(place, name, rows, column, [column, *(name for name in CAPTION_COLUMNS if name in schema.names)])

    def read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]:
        import pyarrow as pa

        try:
            yield from self._read(start, stop, skipped)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.place.shown(self.name)} is not a readable Parquet file: {error}") from error

    def _read(self, start: int, stop: int, skipped: Counter) -> Iterator[Item]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.place.opened(self.name)) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            groups = [i for i, end in enumerate(ends) if end > start and end - sizes[i] < stop]
            if not groups:
                return
            row = ends[groups[0]] - sizes[groups[0]]
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=self.columns):
                first, last = max(start - row, 0), min(stop - row, len(batch))
                if first < last:
                    for i, values in enumerate(batch.slice(first, last - first).to_pylist(), start=row + first):
                        yield from self._item(i, values, skipped)
                row += len(batch)

    def _item(self, row: int, values: dict[str, Any], skipped: Counter) -> Iterator[Item]:
        cell = values[self.column]
        hint = ""
        if isinstance(cell, dict):
            cell, hint = cell.get("bytes"), str(cell.get("path") or "")
        if cell is None:
            skipped["row without image bytes"] += 1
        elif len(cell) > MAX_MEMBER_BYTES:
            skipped["larger than 256 MiB"] += 1
        else:
            ext = _ext(hint) if _ext(hint) in IMAGE_EXTENSIONS else _sniff(cell)
            yield _item(f"{self.name}:{row}", ext, cell, _named_texts(values))


def _holds_bytes(schema: Any, name: str) -> bool:
    import pyarrow.types as types

    kind = schema.field(name).type
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index < 0:
            return False
        kind = kind.field(index).type
    return types.is_binary(kind) or types.is_large_binary(kind)


def _sniff(data: bytes) -> str:
    """Extension by the first bytes, where no name tells; `bin` if they are of no image that we know."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    signs = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
    return next((ext for sign, ext in signs.items() if data.startswith(sign)), "bin")
