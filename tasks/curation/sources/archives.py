"""The base class of container formats that have images and texts under names, as zip has; see formats.py.

    members() -> (name, function that opens it), ... --tars.samples_of--> images with their captions -> records

Captions are as in a tar: texts next to an image or in a folder of captions, and metadata files. No member is extracted
to disk, and none is read beyond the limits of loose files, nor all together beyond those of tars.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from tasks.curation.sources.base import (
    MAX_CONTAINER_BYTES,
    MAX_IMAGE_BYTES,
    UNREADABLE_FILE,
    Account,
    Options,
    Record,
    check_size,
    extension,
    is_hidden,
    is_image,
    record_key,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_JSON_BYTES,
    CaptionError,
    add_texts,
)
from tasks.curation.sources.file_trees import FileTree
from tasks.curation.sources.tar_format import MAX_RATIO, RATIO_FREE_BYTES, Member, NameLimits
from tasks.curation.sources.tars import Index, Sample, samples_of

Members = Iterable[tuple[str, Callable[[], BinaryIO]]]


class Archive:
    """A format. A subclass has `members`."""

    def members(self, file: BinaryIO) -> Members:
        """(name inside the file, folders with /; function that opens it) of each member, in a fixed order, from headers
        alone. A name may be there twice. Names that end in / are folders. Errors may be of any type."""
        raise NotImplementedError

    def scan(self, shown: str, file: BinaryIO, caption_columns: tuple[str, ...]) -> tuple[int, list[str], str] | None:
        """See formats.py.

        Raises:
            ValueError: it is not a file of this format.
        """
        images = sum(is_image(name) and not is_hidden(name) for name, _ in self._opened(shown, file))
        return (images, [], "") if images else None

    def read(self, tree: FileTree, path: str, options: Options, account: Account) -> Iterator[Record]:
        """The records of a file, in its order.

        Raises:
            ValueError: it is not a file of this format, is over a limit, or a metadata file in it is broken.
        """
        shown, locator = tree.shown(path), tree.locator(path)
        check_size(shown, tree.size(path))
        with tree.local_copy(path) as file:
            content = _Content(shown, tree.size(path), self._opened(shown, file))
            index = Index(shown, locator, account, content.start_of_table)
            for number, name in enumerate(content.names):
                if not name.endswith("/"):
                    index.add(Member(name, 0, number, "file", ""))  # its number stands for its offset
            for sample in samples_of(shown, locator, index, options, account).images:
                account.records += 1
                yield _record(path, locator, content, sample, options)

    def _opened(self, shown: str, file: BinaryIO) -> list[tuple[str, Callable[[], BinaryIO]]]:
        limits, members = NameLimits(), []
        try:
            for name, open_member in self.members(file):
                limits.add(name)
                members.append((name, open_member))
        except Exception as error:  # each format's library raises its own types
            raise ValueError(f"{shown} cannot be read: {visible(str(error))}") from error
        return members


class _Content:
    """Reads members by their numbers, all together no more than the limit."""

    def __init__(self, shown: str, size: int, members: list[tuple[str, Callable[[], BinaryIO]]]) -> None:
        self.names = [name for name, _ in members]
        self._shown, self._members = shown, members
        self._left = self._limit = min(MAX_CONTAINER_BYTES, RATIO_FREE_BYTES + MAX_RATIO * size)

    def read(self, number: int, limit: int) -> tuple[bytes, str]:
        """A member's bytes, whatever size the archive claims; or why they cannot be read (a password, a wrong checksum).

        Raises:
            ValueError: the members that were read have more bytes than the limit.
        """
        data, why = self._start(number, limit + 1)
        return (data, why) if len(data) <= limit else (b"", f"is larger than {limit // 2**20} MiB")

    def start_of_table(self, member: Member, count: int) -> bytes:
        """
        Raises:
            ValueError: it cannot be read, or as `read`.
        """
        data, why = self._start(member.offset, count)
        if why:
            raise ValueError(f"{self._shown}:{visible(member.name)} {why}")
        return data

    def _start(self, number: int, count: int) -> tuple[bytes, str]:
        try:
            with self._members[number][1]() as member:
                data = member.read(count)
        except Exception as error:  # each format's library raises its own types
            return b"", f"cannot be read: {visible(str(error))}"
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"{self._shown} unpacks to more than {self._limit // 2**20} MiB; unpack it yourself")
        return data, ""


def _record(path: str, locator: str, content: _Content, sample: Sample, options: Options) -> Record:
    at = f"{locator}:{visible(sample.place)}"
    texts = [
        (text.name, f"{locator}:{visible(text.name)}", functools.partial(_text, content, text.offset))
        for text in sample.texts
    ]
    captions, problem, detail = add_texts(texts, sample.captions, sample.problem, sample.detail, options)
    data, why = content.read(sample.image.offset, MAX_IMAGE_BYTES)
    if why:
        problem, detail = UNREADABLE_FILE, f"{at} {why}"
    captions = [] if problem else list(dict.fromkeys(captions))
    ext = extension(sample.image.name)
    return Record(record_key(path, sample.place), data, ext, captions, "user", at, 0, problem, detail)


def _text(content: _Content, number: int) -> bytes:
    data, why = content.read(number, MAX_JSON_BYTES)
    if why:
        raise CaptionError(why)
    return data
