"""Scans a user's own images: from a folder, file or URI to the table of a corpus.

    place.walk() --1--> metadata files -> Listed; texts in folders of captions -> ParallelTexts
                 --2--> (if there are any) images claim their rows and texts
                 --3--> tars, Parquet, Arrow -> a shard each, or several
                        loose images and their texts -> lists of files

It reads names, headers, footers and metadata files, and the content of local files for their digests. It decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.logs import get_logger
from tasks.curation.config import SourceConfig
from tasks.curation.sources import arrow, file_trees, folder, formats, parquet, tables, tars
from tasks.curation.sources.base import (
    AMBIGUOUS_CAPTION,
    FILES_FOLDER,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    REPORT,
    SHARDS,
    SHARDS_TABLE,
    TAR_SUFFIXES,
    TEXT_OF_LEFT_OUT,
    UNREADABLE_CAPTION,
    Account,
    Options,
    Shard,
    base_name,
    check_size,
    count_of,
    digest_of,
    extension,
    is_hidden,
    is_image,
    is_media,
    reason_of,
    shard_id,
    to_bytes,
    visible,
    without_tar_suffix,
)
from tasks.curation.sources.captions.listed import Listed, Matched
from tasks.curation.sources.captions.metadata_files import is_metadata
from tasks.curation.sources.captions.pairing import is_text, may_own_text, pair
from tasks.curation.sources.captions.parallel import ParallelTexts, may_have_captions
from tasks.curation.sources.file_trees import LINK, NOT_A_FILE, FileTree, Folder, RemoteFileTree
from tasks.curation.sources.folder import File

logger = get_logger(__name__)

PROGRESS_S = 5.0
TABLE_ROWS = 1000  # rows of shards.parquet written at a time
NO_IMAGE_COLUMN = "without image bytes"
VALID = (
    f"give a folder of images (.{', .'.join(IMAGE_EXTENSIONS[:5])} ...) with captions next to them, WebDataset tars, "
    "or Parquet files with a column of image bytes (image) and one of captions (text); tables of image URLs need "
    "source.urls"
)


def write_corpus(config: SourceConfig, path: str | None, out_dir: str | os.PathLike) -> dict[str, Any]:
    """See base.write_corpus."""
    path = path or config.path
    if not path:
        raise ValueError("there is no source: set source.path, or give --source")
    place = file_trees.find(path)
    with tempfile.TemporaryDirectory() as scratch, TableWriter(Path(out_dir)) as table:
        scan = _Scan(config, place, table, Path(scratch))
        scan.run()
        left_out = scan.account.left_out()
        if not table.images and not table.unknown:
            if not scan.account.seen:
                raise ValueError(f"source {visible(path)!r} is empty; {VALID}")
            left_out = (scan.account + scan.in_tars).left_out()
            raise ValueError(f"source {visible(path)!r} has no image; left out: {left_out or 'nothing'}; {VALID}")
    more = {"alone": place.alone, "no_captions": scan.no_captions()}
    report = table.report(scan.account, scan.options, place.uri(), **more)
    images = count_of(table.images, "image") + (
        f" and {count_of(table.unknown, 'remote tar')}" if table.unknown else ""
    )
    logger.info(f"source: {images} in {count_of(table.shards, 'shard')}")
    if left_out:
        logger.info(f"source: left out: {left_out}")
    return report


class TableWriter:
    """Writes shards.parquet row by row, and report.json; counts what it writes. A context manager."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.shards = self.images = self.unknown = self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._rows: list[dict[str, Any]] = []
        self._ids: set[bytes] = set()

    def __enter__(self) -> TableWriter:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self.out_dir / SHARDS_TABLE, SHARDS, compression="zstd")
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, shard: Shard) -> None:
        identity = bytes.fromhex(shard.shard_id)
        assert identity not in self._ids, shard
        self._ids.add(identity)
        if any("\ud800" <= c <= "\udfff" for c in shard.uri):
            raise ValueError(f"{visible(shard.uri)} has a name that is not UTF-8; rename it")
        self._digest.update(json.dumps([value for field, value in shard._asdict().items() if field != "uri"]).encode())
        self._rows.append(shard._asdict())
        self.shards += 1
        self.size_bytes += shard.size_bytes
        if shard.num_rows < 0:
            self.unknown += 1
        else:
            self.images += shard.num_rows
        if len(self._rows) >= TABLE_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SHARDS))
            self._rows = []

    def report(self, account: Account, options: Options, root: str, **more: Any) -> dict[str, Any]:
        account.check()
        report = {
            "digest": self._digest.hexdigest(),
            "shards": self.shards,
            "images": -1 if self.unknown else self.images,
            "size_bytes": self.size_bytes,
            "account": account.to_json(),
            "options": options._asdict(),
            "root": root,
            **more,
        }
        (self.out_dir / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        return report


class _Scan:
    def __init__(self, config: SourceConfig, place: FileTree, table: TableWriter, scratch: Path) -> None:
        self.config, self.place, self.table, self.scratch = config, place, table, scratch
        self.options = Options(config.encoding, config.caption_columns, config.captions_folder)
        self.account = Account()
        self.in_tars = Account()  # account of tars without images; those with images are counted when they are read
        self._files, self._report_at = 0, time.monotonic() + PROGRESS_S
        self._no_captions, self._may_have_captions = "", False
        self._has_captions_folder = self._may_have_captions_folder = config.captions_folder is None

    def run(self) -> None:
        with (
            Listed(self.options.encoding, self.options.caption_columns) as self.listed,
            ParallelTexts(self.options.caption_columns, self.config.captions_folder, loose=True) as self.parallel,
        ):
            for listing in self.place.walk():
                self._look_for_captions_folder(listing)
                if self.place.alone is None:
                    self._read_metadata(listing)
                    self._add_parallel(listing)
            self._check_captions_folder(self._may_have_captions_folder)
            if self.listed or self.parallel:
                for listing in self.place.walk():
                    self._claim(listing)
            for files in folder.cut(self._loose(), self.config.images_per_shard):
                self._add_files(files)
            self.listed.finish(self.account)
            self.parallel.finish(self.account)
            self._check_captions_folder(self._has_captions_folder)

    def no_captions(self) -> str:
        """Why no image of the source has a caption, if that is known without reading all of them, or ""."""
        return "" if self._may_have_captions else self._no_captions

    def _note(self, may_have_captions: bool, no_captions: str) -> None:
        self._may_have_captions |= may_have_captions
        self._no_captions = self._no_captions or no_captions

    def _look_for_captions_folder(self, listing: Folder) -> None:
        """Looks for source.captions_folder among the folders. It may also be inside of a tar or another archive."""
        if self._has_captions_folder:
            return
        is_shown = not is_hidden(listing.path)
        self._has_captions_folder = is_shown and may_have_captions(listing.path, self.config.captions_folder)
        containers = (name for name in listing.files if name.lower().endswith(TAR_SUFFIXES) or formats.format_of(name))
        self._may_have_captions_folder |= self._has_captions_folder or any(
            formats.format_of(name) != "arrow" for name in containers
        )

    def _check_captions_folder(self, is_there: bool) -> None:
        """
        Raises:
            ValueError: source.captions_folder is not in the source.
        """
        if not is_there:
            folder = self.config.captions_folder
            raise ValueError(
                f"source.captions_folder={folder!r}: {self.place.shown(folder)} is not a folder of the source, nor of a tar "
                "in it; hidden folders and links are not read"
            )

    def _read_metadata(self, listing: Folder) -> None:
        for name in listing.files:
            if is_metadata(name, listing.files) and not self._is_data(listing, name):
                path = listing.at(name)
                shown, locator = self.place.shown(path), self.place.locator(path)
                with _naming(shown), self.place.open(path) as file:
                    root = base_name(self.place.uri())
                    why = self.listed.add(shown, locator, listing.path, listing.folders, extension(name), file, root)
                if why:
                    self.account.skip(why, path)
                else:
                    self.account.use()

    def _add_parallel(self, listing: Folder) -> None:
        """Adds the texts of a folder that describe no image in it and may describe images of another folder."""
        if not may_have_captions(listing.path, self.config.captions_folder):
            return
        names, left_out = self._loose_names(listing)
        for i in pair(names, self.options.caption_columns, left_out, loose=True).strays:
            path = listing.at(names[i])
            # A later request for each text would be slow where the source is remote; local files are read when needed.
            digest = self.place.digest(path) if isinstance(self.place, RemoteFileTree) else ""
            self.parallel.add(path, listing.files[names[i]], digest)

    def _claim(self, listing: Folder) -> None:
        for name in [*listing.files, *_links(listing)]:
            path = listing.at(name)
            if is_media(name):
                if self.listed:
                    self.listed.claim([(0, path)])
                if self.parallel:
                    self.parallel.claim(path)
            elif self.listed and name.lower().endswith(TAR_SUFFIXES):
                images, left_out, _ = self._images_in(path)
                for image in [*(image for image, _, _ in images), *left_out]:
                    self.listed.claim(_names_beside(listing, path, image))
            elif self.parallel and _may_own(name):
                self.parallel.block(path)

    def _loose_names(self, listing: Folder) -> tuple[list[str], set[int]]:
        """The loose images and texts of a folder, and other files that may have texts; and the positions of those that are
        left out."""
        names = [
            name
            for name in listing.files
            if (is_text(name) or _may_own(name))
            and (self.place.alone is not None or not is_metadata(name, listing.files))
        ]
        left_out = {i for i, name in enumerate(names) if not (is_image(name) or is_text(name))}
        links = _links(listing)
        left_out.update(range(len(names), len(names) + len(links)))
        return names + links, left_out

    def _is_data(self, listing: Folder, name: str) -> bool:
        """Whether a metadata.parquet contains the images themselves."""
        if extension(name) != "parquet":
            return False
        shown = self.place.shown(listing.at(name))
        with _naming(shown), self.place.open(listing.at(name)) as file, parquet.opened(shown, file) as opened:
            return parquet.tables.columns_of(opened.schema_arrow, ()) is not None

    def _loose(self) -> Iterator[File]:
        """Yields the loose images; also adds shards of all other files, and counts them."""
        for listing in self.place.walk():
            for reason, path in listing.left_out:
                self.account.skip(reason, path)
            saved = arrow.data_files(self.place, listing)
            archives: list[str] = []
            for name in listing.files:
                lower, path = name.lower(), listing.at(name)
                if lower.endswith(TAR_SUFFIXES):
                    archives.append(path)
                elif (kind := formats.format_of(name)) or lower.endswith(".parquet"):
                    if is_metadata(name, listing.files) and not self._is_data(listing, name):
                        continue  # counted when it was read
                    if kind == "arrow" and saved is not None and name not in saved:
                        self.account.skip("cache of a saved data set", path)
                    elif kind:
                        self._add_whole(path, kind)
                    else:
                        self._add_parquet(path)
                elif is_metadata(name, listing.files) and self.place.alone is None:
                    continue
                elif not is_image(name) and not is_text(name):
                    self.account.skip(reason_of(name), path)
            yield from self._files_of(listing)
            self._add_tars(listing, archives)

    # ------------------------------------------------------------ loose files

    def _files_of(self, listing: Folder) -> Iterator[File]:
        names, left_out = self._loose_names(listing)
        pairs, strays, of_left_out = pair(names, self.options.caption_columns, left_out, loose=True)
        used = {i for one in pairs.values() for i in one.texts}
        apart = strays if may_have_captions(listing.path, self.config.captions_folder) else ()
        counted = left_out.union(pairs, used, apart, of_left_out)
        for i in of_left_out:
            self.account.skip(TEXT_OF_LEFT_OUT, listing.at(names[i]))
        for i, name in enumerate(names):
            if i not in counted:
                self.account.skip(reason_of(name), listing.at(name))
        for i in (i for i in left_out if self.parallel and is_media(names[i])):
            self.parallel.leave_out(listing.at(names[i]))
        self.account.use(len(pairs) + len(used))
        for i in sorted(pairs, key=lambda i: names[i]):
            path = listing.at(names[i])
            texts = [(listing.at(names[j]), listing.files[names[j]], "") for j in pairs[i].texts]
            rows, why, unread = self.listed.match([(0, path)]), pairs[i].ambiguous, pairs[i].unread
            if unread and not (texts or rows.captions):
                at = self.place.locator(path)
                rows = rows._replace(no_column=f"{at}: its text {visible(unread)!r} is a link, which is not read")
            if self.parallel and not (texts or why or unread or rows.captions or rows.ambiguous or rows.unreadable):
                apart_texts, why = self.parallel.match(path)
                texts = [(text.path, text.size, text.digest) for text in apart_texts]
            yield self._file(path, listing.files[names[i]], texts, rows, why or rows.ambiguous)

    def _file(self, path: str, size: int, texts: list[tuple[str, int, str]], rows: Matched, why: str) -> File:
        self._files += 1
        if time.monotonic() > self._report_at:
            self._report_at = time.monotonic() + PROGRESS_S
            logger.info(f"source: {self._files:,} images read, in {visible(os.path.dirname(path)) or 'the source'}")
        sidecars = []
        for text, text_size, digest in texts:
            with _naming(self.place.shown(text)):
                if not digest and not folder.too_large(text, text_size):
                    digest = self.place.digest(text)
                sidecars.append((text, text_size, digest))
        with _naming(self.place.shown(path)):
            digest = self.place.digest(path) if size <= MAX_IMAGE_BYTES else ""  # entries that are never read
        problem, detail = _problem(self.place.locator(path), rows, why)
        self._note(bool(texts or rows.captions or problem), rows.no_column)
        return File(path, size, digest, tuple(sidecars), tuple(rows.captions), problem, detail)

    def _add_files(self, files: list[File]) -> None:
        digest = folder.digest(files)
        name = shard_id("files", "", 0, digest, self.options)
        (self.table.out_dir / FILES_FOLDER).mkdir(exist_ok=True)
        folder.write(files, self.table.out_dir / FILES_FOLDER / f"{name}.parquet")
        size = sum(file.size_bytes for file in files)
        self.table.add(Shard(name, "files", self.place.uri(), 0, len(files), size, digest, "user"))

    # ------------------------------------------------------------ containers

    def _add_tars(self, listing: Folder, paths: list[str]) -> None:
        for path in paths:
            shown = self.place.shown(path)
            with _naming(shown):
                size = self.place.size(path)
                check_size(shown, size)
            beside: list[File] = []
            count = -1
            if self.listed or not isinstance(self.place, RemoteFileTree):
                images, _, inside = self._images_in(path)
                count = len(images)
                for image, place, is_described in images:
                    rows = self.listed.match(_names_beside(listing, path, image))
                    problem, detail = _problem(f"{self.place.locator(path)}:{visible(place)}", rows, rows.ambiguous)
                    self._note(bool(rows.captions or problem or is_described), rows.no_column)
                    if rows.captions or problem or (rows.no_column and not is_described):
                        beside.append(File(place, captions=tuple(rows.captions), problem=problem, detail=detail))
                if not count:
                    self.in_tars += inside
            else:  # it is not read before its records are
                self._note(True, "")
                self._has_captions_folder = True
            with _naming(shown):
                digest = self.place.digest(path)
            name = shard_id("tar", path, 0, digest, self.options, folder.digest(beside) if beside else "")
            if beside:
                (self.table.out_dir / FILES_FOLDER).mkdir(exist_ok=True)
                folder.write(beside, self.table.out_dir / FILES_FOLDER / f"{name}.parquet")
            self.account.use()
            self.table.add(Shard(name, "tar", self.place.uri(path), 0, count, size, digest, "user"))

    def _images_in(self, path: str) -> tuple[list[tuple[str, str, bool]], list[str], Account]:
        """(name, place, whether the tar has captions of it) of each image of a tar, the names of media that are left out,
        and the tar's account. If images claim rows of tables, it is kept on disk for the next call: a remote tar is
        downloaded for it."""
        kept = self.scratch / f"{hashlib.sha256(to_bytes(path)).hexdigest()}.json"
        if kept.is_file():
            images, left_out, account = json.loads(kept.read_text())
            kept.unlink()
            return images, left_out, Account.from_json(account)
        shown, inside = self.place.shown(path), Account()
        with tars.named_errors(shown):
            check_size(shown, self.place.size(path))
            opened = self.place.local_copy(path) if isinstance(self.place, RemoteFileTree) else self.place.open(path)
            with opened as file:
                contents = tars.samples(shown, self.place.locator(path), file, self.options, inside)
        self._has_captions_folder |= contents.has_captions_folder
        left_out = contents.left_out
        images = [(s.image.name, s.place, bool(s.texts or s.captions)) for s in contents.images]
        if self.listed:
            kept.write_text(json.dumps([images, left_out, inside.to_json()]))
        return images, left_out, inside

    def _add_parquet(self, path: str) -> None:
        shown = self.place.shown(path)
        with _naming(shown), self.place.open(path) as file:
            scanned = parquet.scan(shown, file, self.options.caption_columns, self.config.images_per_shard)
        if scanned is None:
            self.account.skip(f".parquet {NO_IMAGE_COLUMN}", path)
            return
        self.account.use()
        ranges, schema, further, no_captions = scanned
        self._note(not no_captions, no_captions and f"{self.place.locator(path)} {no_captions}")
        self._skip_columns(path, further)
        for rows in ranges:
            digest = self.place.digest(path, rows.begin, rows.end)
            name = shard_id("parquet", path, rows.first_row, digest, self.options, digest_of(schema, rows.num_rows))
            uri, size = self.place.uri(path), rows.end - rows.begin
            self.table.add(Shard(name, "parquet", uri, rows.first_row, rows.num_rows, size, digest, "user"))

    def _add_whole(self, path: str, kind: str) -> None:
        """Adds a file of one of `formats.FORMATS` as one shard."""
        shown = self.place.shown(path)
        with _naming(shown):
            check_size(shown, self.place.size(path))
        with _naming(shown), self.place.local_copy(path) as file:
            scanned = formats.load(kind).scan(shown, file, self.options.caption_columns)
        if scanned is None:
            self.account.skip(f".{kind} {NO_IMAGE_COLUMN}", path)
            return
        self.account.use()
        rows, further, no_captions = scanned
        self._has_captions_folder |= kind != "arrow"  # archives are read later
        self._note(not no_captions, no_captions and f"{self.place.locator(path)} {no_captions}")
        self._skip_columns(path, further)
        size, digest = self.place.size(path), self.place.digest(path)
        name = shard_id(kind, path, 0, digest, self.options)
        self.table.add(Shard(name, kind, self.place.uri(path), 0, rows, size, digest, "user"))

    def _skip_columns(self, path: str, names: list[str]) -> None:
        for name in names:
            self.account.skip(tables.FURTHER, f"{path}: {name}")


class _naming:
    """Converts errors of the disk or the store to one that names the file."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            why = visible(error.strerror or str(error))
            raise ValueError(
                f"{self._shown} cannot be read: {why}; grant the right to read it, or move it out of the source"
            ) from error


def _problem(locator: str, rows: Matched, ambiguous: str) -> tuple[str, str]:
    """The problem of a record, and its detail."""
    if ambiguous:
        return AMBIGUOUS_CAPTION, f"{locator}: {ambiguous}"
    return (UNREADABLE_CAPTION, f"{locator}: {rows.unreadable}") if rows.unreadable else ("", rows.no_column)


def _may_own(name: str) -> bool:
    """Whether a text may be of a file of this name: not if the file contains images, which have their own."""
    is_container = name.lower().endswith((*TAR_SUFFIXES, ".parquet")) or formats.format_of(name) is not None
    return may_own_text(name) and not is_container


def _links(listing: Folder) -> list[str]:
    """Names of links and devices that are named like texts, or like files that may have texts."""
    names = (base_name(path) for reason, path in listing.left_out if reason in (LINK, NOT_A_FILE))
    return [name for name in names if not name.startswith(".") and (is_text(name) or _may_own(name))]


def _names_beside(listing: Folder, path: str, member: str) -> list[tuple[int, str]]:
    """(step, path) by which a table next to a tar may refer to one of its members: see `Listed.claim`."""
    tar, inner = base_name(path), posixpath.normpath(member).lstrip("/")
    return [
        (0, listing.at(f"{tar}/{inner}")),
        (1, listing.at(f"{without_tar_suffix(tar)}/{inner}")),
        (1, listing.at(inner)),
    ]
