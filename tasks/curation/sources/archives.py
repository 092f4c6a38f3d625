"""The base class of container formats that have images and texts under names, as zip has; see formats.py.

    members() -> {name: function that opens it} --pairing.pair--> images with their texts -> records

Texts belong to images as in a folder (captions/pairing.py). No member is extracted to disk, and none is read beyond
the limits of loose files.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from tasks.curation.sources.base import (
    AMBIGUOUS_CAPTION,
    MAX_IMAGE_BYTES,
    TEXT_OF_LEFT_OUT,
    UNREADABLE_FILE,
    Account,
    Options,
    Record,
    base_name,
    extension,
    is_image,
    is_media,
    reason_of,
    record_key,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_JSON_BYTES,
    SIDECAR_EXTENSIONS,
    CaptionError,
    add_texts,
)
from tasks.curation.sources.captions.pairing import Pair, pair
from tasks.curation.sources.file_trees import HIDDEN, FileTree

Members = Mapping[str, Callable[[], BinaryIO]]


class Archive:
    """A format. A subclass has `members`."""

    def members(self, file: BinaryIO) -> Members:
        """{name inside the file, folders with /: function that opens it}, in a fixed order, from headers alone. Names that
        end in / are folders. Errors may be of any type."""
        raise NotImplementedError

    def scan(self, shown: str, file: BinaryIO, caption_columns: tuple[str, ...]) -> tuple[int, list[str]] | None:
        """See formats.py.

        Raises:
            ValueError: it is not a file of this format.
        """
        images = sum(is_image(name) and not _is_hidden(name) for name in self._opened(shown, file))
        return (images, []) if images else None

    def read(self, tree: FileTree, path: str, options: Options, account: Account) -> Iterator[Record]:
        """The records of a file, folder by folder.

        Raises:
            ValueError: it is not a file of this format.
        """
        locator = tree.locator(path)
        with tree.local_copy(path) as file:
            members = self._opened(tree.shown(path), file)
            folders: dict[str, list[str]] = {}
            for name in members:
                if name.endswith("/"):
                    continue
                if _is_hidden(name):
                    account.skip(HIDDEN, f"{locator}:{name}")
                elif is_media(name) or extension(name) in SIDECAR_EXTENSIONS:
                    folders.setdefault(posixpath.dirname(name), []).append(name)
                else:
                    account.skip(reason_of(name), f"{locator}:{name}")
            for names in folders.values():
                pairs, _, of_left_out = pair([base_name(name) for name in names], options.caption_columns)
                used = {*pairs, *(text for one in pairs.values() for text in one.texts)}
                account.use(len(used))
                for i in of_left_out:
                    account.skip(TEXT_OF_LEFT_OUT, f"{locator}:{names[i]}")
                for i in set(range(len(names))).difference(used, of_left_out):
                    account.skip(reason_of(names[i]), f"{locator}:{names[i]}")
                for image, one in pairs.items():
                    account.records += 1
                    yield _record(path, locator, members, names, image, one, options)

    def _opened(self, shown: str, file: BinaryIO) -> Members:
        try:
            return self.members(file)
        except Exception as error:  # each format's library raises its own types
            raise ValueError(f"{shown} cannot be read: {visible(str(error))}") from error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _record(
    path: str, locator: str, members: Members, names: list[str], image: int, one: Pair, options: Options
) -> Record:
    name = names[image]
    at = f"{locator}:{visible(name)}"
    problem, detail = (AMBIGUOUS_CAPTION, f"{at}: {one.ambiguous}") if one.ambiguous else ("", "")
    texts = [
        (text, f"{locator}:{visible(text)}", functools.partial(_text, members[text]))
        for text in (names[i] for i in one.texts)
    ]
    captions, problem, detail = add_texts(texts, [], problem, detail, options)
    data, why = _read(members[name], MAX_IMAGE_BYTES)
    if why:
        problem, detail = UNREADABLE_FILE, f"{at} {why}"
    captions = [] if problem else list(dict.fromkeys(captions))
    return Record(record_key(path, name), data, extension(name), captions, "user", at, 0, problem, detail)


def _text(open_member: Callable[[], BinaryIO]) -> bytes:
    data, why = _read(open_member, MAX_JSON_BYTES)
    if why:
        raise CaptionError(why)
    return data


def _read(open_member: Callable[[], BinaryIO], limit: int) -> tuple[bytes, str]:
    """A member's bytes, whatever size the archive claims; or why they cannot be read (a password, a wrong checksum)."""
    try:
        with open_member() as member:
            data = member.read(limit + 1)
    except Exception as error:  # each format's library raises its own types
        return b"", f"cannot be read: {visible(str(error))}"
    return (data, "") if len(data) <= limit else (b"", f"is larger than {limit // 2**20} MiB")
