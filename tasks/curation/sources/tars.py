"""Tars of images with captions next to them (WebDataset), or in a metadata file inside or next to the tar.

No member is extracted to disk under its name. A compressed tar is decompressed to a temporary file when it is read,
within the bounds of tar_format.py, so that a caption far from its image costs only a seek.
"""

from __future__ import annotations

import contextlib
import functools
import io
import posixpath
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from tasks.curation.sources import tar_format
from tasks.curation.sources.base import (
    AMBIGUOUS_CAPTION,
    MAX_IMAGE_BYTES,
    TEXT_OF_LEFT_OUT,
    UNREADABLE_CAPTION,
    UNREADABLE_FILE,
    Account,
    Options,
    Record,
    base_name,
    check_size,
    extension,
    is_hidden,
    is_image,
    is_media,
    reason_of,
    record_key,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_JSON_BYTES,
    add_texts,
)
from tasks.curation.sources.captions.listed import Listed
from tasks.curation.sources.captions.metadata_files import MAX_BYTES as MAX_METADATA_BYTES
from tasks.curation.sources.captions.metadata_files import has_metadata_as_sidecar, is_metadata
from tasks.curation.sources.captions.pairing import is_text, may_own_text, pair
from tasks.curation.sources.captions.parallel import ParallelTexts, may_have_captions
from tasks.curation.sources.file_trees import HIDDEN, LINK, NOT_A_FILE, FileTree
from tasks.curation.sources.tar_format import Forward, Member, TarError

BEHIND_THE_END = "data behind the end of a tar"
_NOT_FILES = {"symbolic link": LINK, "hard link": "hard link to no member"}


class Sample(NamedTuple):
    """An image of a tar. place: its name inside the tar, with #2 for the second of that name."""

    image: Member
    place: str
    texts: list[Member]
    captions: list[str]
    problem: str
    detail: str


class Contents(NamedTuple):
    """What `samples` has read of a tar, or `samples_of` of another archive.

    images: in the order of the archive. left_out: names of links and of other media. has_captions_folder: whether it has
    the folder of `Options.captions_folder`.
    """

    images: list[Sample]
    left_out: list[str]
    has_captions_folder: bool


Beside = dict[
    str, tuple[list[str], str, str]
]  # place of an image -> captions, problem and detail of tables next to the tar


def samples(
    shown: str, locator: str, file: BinaryIO, options: Options, account: Account, beside: Container[str] = ()
) -> Contents:
    """Reads headers and metadata files of a tar, forward only.

    Args:
        shown: the tar's name for errors.
        locator: its name for records and counts, which does not depend on the location of the source.
        beside: places of images that a table next to the tar describes.

    Raises:
        ValueError: the tar or a metadata file in it is broken; the message names it.
    """
    with named_errors(shown):
        index = _index(Forward(file), shown, locator, account)
    return samples_of(shown, locator, index, options, account, beside)


class Index:
    """What `samples_of` reads of an archive, from its files in order.

    files: images, texts, and files that are left out and may have texts; each metadata.json is among them, too.
    tables: metadata files with their content.
    """

    def __init__(self, shown: str, locator: str, account: Account, read: Callable[[Member, int], bytes]) -> None:
        """
        Args:
            shown, locator, account: see `samples`.
            read: the first bytes of a file, at most so many.
        """
        self.files: list[Member] = []
        self.tables: list[tuple[Member, bytes]] = []
        self._shown, self._locator, self._account, self._read = shown, locator, account, read
        self._room = MAX_METADATA_BYTES

    def add(self, member: Member, can_read: bool = True) -> None:
        """Adds a file, or counts it as left out. can_read: otherwise it is no table, whatever its name.

        Raises:
            ValueError: the metadata files together are over the limit.
        """
        base, at = base_name(member.name), f"{self._locator}:{member.name}"
        if is_hidden(member.name):
            self._account.skip(HIDDEN, at)
        elif can_read and is_metadata(base, ()):
            data = self._read(member, self._room + 1)
            self._room -= len(data)
            if self._room < 0:
                raise ValueError(
                    f"{self._shown}: its metadata files have more than {MAX_METADATA_BYTES // 2**20} MiB; divide the "
                    "archive, or put each caption into a text next to its image"
                )
            self.tables.append((member, data))
            if extension(base) == "json":
                self.files.append(member)
        elif is_image(base) or is_text(base):
            self.files.append(member)
        else:
            self._account.skip(reason_of(base), at)
            if may_own_text(base):
                self.files.append(member)


def samples_of(
    shown: str,
    locator: str,
    index: Index,
    options: Options,
    account: Account,
    beside: Container[str] = (),
) -> Contents:
    """Assigns captions to the images of an archive; see `samples`.

    Raises:
        ValueError: a metadata file is broken.
    """
    files, tables = _without_sidecars(index.files, index.tables)
    folders: dict[str, list[Member]] = {}
    for member in files:
        folders.setdefault(_folder(member), []).append(member)
    inside = _folders_inside(folders) if tables else {}
    with (
        Listed(options.encoding, options.caption_columns) as listed,
        ParallelTexts(options.caption_columns, options.captions_folder, loose=False) as parallel,
    ):
        for member, data in tables:
            folder, kind = _folder(member), extension(member.name)
            names = [f"{tar}:{visible(member.name)}" for tar in (shown, locator)]
            own = base_name(shown).partition(".")[0]
            if why := listed.add(*names, folder, inside.get(folder, ()), kind, io.BytesIO(data), own):
                account.skip(why, names[1])
            else:
                account.use()
        images: list[Sample] = []
        apart: list[Member] = []
        for folder, members in folders.items():
            may_be_apart = may_have_captions(folder, options.captions_folder)
            images += _of_folder(locator, members, options, account, apart if may_be_apart else None)
        for number, text in enumerate(apart):
            parallel.add(_plain(text.name), number=number)
        not_read = [_plain(member.name) for member in files if _is_left_out(member)]
        left_out = [name for name in not_read if is_media(name)]
        for path in [*(_plain(s.image.name) for s in images), *left_out] if listed or parallel else ():
            listed.claim([(0, path)])
            parallel.claim(path)
        for path in not_read if parallel else ():
            if not is_media(path) and may_own_text(path):
                parallel.block(path)
        for at, sample in enumerate(images):
            images[at] = _matched(locator, sample, listed, parallel, apart, sample.place in beside)
        for path in left_out if parallel else ():
            parallel.leave_out(path)
        listed.finish(account)
        parallel.finish(account, f"{locator}:")
    images.sort(key=lambda sample: (sample.image.offset, sample.place))
    configured = options.captions_folder
    return Contents(images, left_out, bool(configured) and any(may_have_captions(one, configured) for one in folders))


def _matched(
    locator: str, sample: Sample, listed: Listed, parallel: ParallelTexts, apart: list[Member], is_described: bool
) -> Sample:
    """The sample with the captions of tables, or else of parallel folders. is_described: by a table next to the tar."""
    path = _plain(sample.image.name)
    rows, has_unread = listed.match([(0, path)]), bool(sample.detail)
    sample = sample._replace(captions=rows.captions, detail=sample.detail or rows.no_column)
    why = ""
    if not sample.problem and rows.ambiguous:
        why = rows.ambiguous
    elif parallel and not (
        is_described or has_unread or sample.problem or sample.texts or rows.captions or rows.unreadable
    ):
        texts, why = parallel.match(path)
        sample = sample._replace(texts=[apart[text.number] for text in texts])
    if why:
        return sample._replace(problem=AMBIGUOUS_CAPTION, detail=f"{locator}:{visible(sample.place)}: {why}")
    if rows.unreadable and not sample.problem:
        detail = f"{locator}:{visible(sample.place)}: {rows.unreadable}"
        return sample._replace(problem=UNREADABLE_CAPTION, detail=detail)
    return sample


def _folders_inside(folders: Iterable[str]) -> dict[str, set[str]]:
    """Folder -> names of the folders in it."""
    inside: dict[str, set[str]] = {}
    for folder in folders:
        while folder:
            above, _, name = folder.rpartition("/")
            if name in inside.setdefault(above, set()):
                break
            inside[above].add(name)
            folder = above
    return inside


def _plain(name: str) -> str:
    """The path without . and .. parts."""
    return posixpath.normpath(name) if "." in (name[:1], name[-1:]) or "/." in name or "//" in name else name


def _is_left_out(member: Member) -> bool:
    """Whether a file of an `Index` is a link or neither an image nor a text, which are not read."""
    return member.kind != "file" or not (is_image(member.name) or is_text(member.name))


def _index(stream: Forward, shown: str, locator: str, account: Account) -> Index:
    index = Index(shown, locator, account, lambda member, limit: stream.read(min(member.size, limit)))
    by_name: dict[str, Member] = {}
    for member in tar_format.members(stream):
        if member.kind == "folder":
            continue
        if member.kind == "rest":
            account.skip(BEHIND_THE_END, f"{locator} at byte {member.offset:,}")
            continue
        if member.kind == "hard link":
            target = by_name.get(_plain(member.link))
            if target is not None:
                member = member._replace(size=target.size, offset=target.offset, kind="file")
        if member.kind != "file":
            account.skip(_NOT_FILES.get(member.kind, NOT_A_FILE), f"{locator}:{member.name}")
            base = base_name(member.name)
            if (may_own_text(base) or is_text(base)) and not is_hidden(member.name):
                index.files.append(member)
            continue
        by_name[_plain(member.name)] = member
        index.add(member, can_read=member.offset == stream.position)  # a hard link's content is behind
    return index


def _without_sidecars(
    files: list[Member], tables: list[tuple[Member, bytes]]
) -> tuple[list[Member], list[tuple[Member, bytes]]]:
    """Each metadata.json as a text next to a picture metadata.png, or else as a table."""
    pictures = {_folder(member) for member in files if has_metadata_as_sidecar(base_name(member.name))}
    tables = [(m, data) for m, data in tables if extension(m.name) != "json" or _folder(m) not in pictures]
    read = {id(member) for member, _ in tables}
    return [member for member in files if id(member) not in read], tables


def _folder(member: Member) -> str:
    return posixpath.dirname(_plain(member.name))


def _of_folder(
    locator: str, members: list[Member], options: Options, account: Account, apart: list[Member] | None
) -> Iterator[Sample]:
    """The images of one folder with the texts in it. Texts that describe none of them are added to `apart`, or counted
    as left out."""
    names = [base_name(member.name) for member in members]
    left_out = {i for i, member in enumerate(members) if _is_left_out(member)}
    pairs, strays, of_left_out = pair(names, options.caption_columns, left_out)
    used = {i for one in pairs.values() for i in one.texts}
    if apart is not None:
        apart += [members[i] for i in strays]
    counted = left_out.union(pairs, used, strays if apart is not None else (), of_left_out)
    for i in of_left_out:
        account.skip(TEXT_OF_LEFT_OUT, f"{locator}:{members[i].name}")
    for i, member in enumerate(members):
        if i not in counted:
            account.skip(reason_of(member.name), f"{locator}:{member.name}")
    account.use(len(pairs) + len(used))
    repeats: Counter = Counter()
    for i, one in pairs.items():
        member = members[i]
        repeats[member.name] += 1
        place = member.name + (f"#{repeats[member.name]}" if repeats[member.name] > 1 else "")
        detail = f"{locator}:{visible(place)}: {one.ambiguous}" if one.ambiguous else ""
        if one.unread and not one.texts and not one.ambiguous:
            detail = f"{locator}:{visible(place)}: its text {visible(one.unread)!r} is a link, which is not read"
        problem = AMBIGUOUS_CAPTION if one.ambiguous else ""
        yield Sample(member, place, [members[j] for j in one.texts], [], problem, detail)


@contextlib.contextmanager
def named_errors(shown: str) -> Iterator[None]:
    """Converts errors of the format and of the disk to one that names the tar."""
    try:
        yield
    except (TarError, OSError) as error:
        raise ValueError(f"{shown} is not a readable tar: {visible(str(error))}") from error


@contextlib.contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The archive itself, or its decompressed content in a temporary file."""
    kind = tar_format.compression(file)
    if kind is None:
        yield file
        return
    with tempfile.TemporaryFile() as plain:
        for piece in tar_format.decompressed(file, kind):
            plain.write(piece)
        plain.seek(0)
        yield plain


def read(place: FileTree, name: str, options: Options, beside: Beside, account: Account) -> Iterator[Record]:
    """The records of a tar.

    Raises:
        ValueError: the message names the tar by its own path or URI.
    """
    shown, locator = place.shown(name), place.locator(name)
    check_size(shown, place.size(name))
    with named_errors(shown), place.local_copy(name) as copy, seekable(copy) as file:
        for sample in samples(shown, locator, file, options, account, beside).images:
            account.records += 1
            yield _record(name, locator, file, sample, options, beside.get(sample.place, ([], "", "")))


def _record(
    name: str, locator: str, file: BinaryIO, sample: Sample, options: Options, beside: tuple[list[str], str, str]
) -> Record:
    problem, detail = (sample.problem, sample.detail) if sample.problem else (beside[1], beside[2] or sample.detail)
    texts = [
        (text.name, f"{locator}:{visible(text.name)}", functools.partial(_bytes_of, file, text, MAX_JSON_BYTES + 1))
        for text in sample.texts
    ]
    captions, problem, detail = add_texts(texts, sample.captions + beside[0], problem, detail, options)
    data, ext = b"", extension(sample.image.name)
    if sample.image.size > MAX_IMAGE_BYTES:
        problem = UNREADABLE_FILE
        detail = f"{locator}:{visible(sample.place)} is larger than {MAX_IMAGE_BYTES // 2**20} MiB"
    else:
        data = _bytes_of(file, sample.image, sample.image.size)
    captions = [] if problem else list(dict.fromkeys(captions))
    at = f"{locator}:{visible(sample.place)}"
    return Record(record_key(name, sample.place), data, ext, captions, "user", at, 0, problem, detail)


def _bytes_of(file: BinaryIO, member: Member, limit: int) -> bytes:
    size = min(member.size, limit)
    file.seek(member.offset)
    data = file.read(size)
    if len(data) < size:
        raise TarError(f"it is cut off in {member.name!r}")
    return data
