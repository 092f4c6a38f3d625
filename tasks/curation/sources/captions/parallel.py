"""Text files in folders of captions: images/train/a.png is described by captions/train/a.txt, and so on.

The texts of a whole source are on disk. All images claim theirs before one is matched, since images of several folders
may have the same text as their nearest.
"""

# ruff: noqa: S608 (SQL of our own names and numbers)

from __future__ import annotations

import itertools
import posixpath
from typing import NamedTuple

from tasks.curation.sources.base import TEXT_OF_LEFT_OUT, Account, from_bytes, reason_of, to_bytes
from tasks.curation.sources.captions.pairing import (
    MOST,
    ImageName,
    Match,
    Text,
    choose,
    fold,
    match,
    spelling,
    stem,
    text_names,
    words_of,
)
from tasks.curation.sources.captions.scratch import Scratch, digest

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")
CAPTION_FOLDERS = ("captions", "caption", "texts", "text", "txt", "prompts")
_QUERY = (
    "SELECT id, path, size, digest, number, near, owner, other, formats, count, blocked FROM names JOIN texts ON id = text "
    f"WHERE folder = ? AND name IN ({{marks}}) LIMIT {2 * MOST + 2}"  # a text has at most two names
)
MAX_DEPTH, MAX_IMAGE_FOLDERS = 64, 4  # of a path; hostile paths repeat a name thousands of times


def caption_folders(path: str, configured: str | None) -> list[tuple[int, str]]:
    """(rank, folder) that may have the captions of the images in folder `path`: images/train -> captions/train, ..."""
    parts = path.split("/") if path else []
    places: dict[str, int] = {}
    if configured is not None:
        # For train/images/x and the folder train/labels: train/labels/{train/images/x, images/x, x}
        beside = zip(configured.split("/")[:-1], parts, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: fold(pair[0]) == fold(pair[1]), beside))
        inner = [parts, parts[1:], *([parts[common:], parts[common + 1 :]] if common else ())]
        for rank, rest in enumerate(inner):
            places.setdefault("/".join([configured, *rest]), rank)
    elif len(parts) <= MAX_DEPTH:
        image_folders = [i for i, part in enumerate(parts) if part.casefold() in IMAGE_FOLDERS]
        for i in image_folders[-MAX_IMAGE_FOLDERS:]:
            places |= {"/".join([*parts[:i], name, *parts[i + 1 :]]): 0 for name in CAPTION_FOLDERS}
        places |= {"/".join([*parts, name]): 0 for name in CAPTION_FOLDERS}
    return [(rank, place) for place, rank in places.items() if place != path]


def may_have_captions(folder: str, configured: str | None) -> bool:
    """Whether a folder is in `caption_folders` of any other."""
    if configured is not None:
        return f"{fold(folder)}/".startswith(f"{fold(configured)}/")
    return any(fold(part) in CAPTION_FOLDERS for part in folder.split("/"))


class Apart(NamedTuple):
    """A text file of another folder. size, digest, number: as given to `ParallelTexts.add`."""

    path: str
    size: int
    digest: str
    number: int


class ParallelTexts(Scratch):
    """The texts of a source that describe no image of their own folder. A context manager."""

    TABLES = (
        "CREATE TABLE folders (id INTEGER PRIMARY KEY, fold BLOB UNIQUE)",
        "CREATE TABLE texts (id INTEGER PRIMARY KEY, path BLOB, size INT, digest TEXT, number INT, "
        "near INT, owner BLOB, other BLOB, formats TEXT, count INT, blocked INT, used INT)",
        "CREATE TABLE names (folder INT, name BLOB, text INT)",
        "CREATE INDEX by_name ON names (folder, name)",
    )

    def __init__(self, caption_columns: tuple[str, ...], configured: str | None, loose: bool) -> None:
        """loose: whether they are files of a folder, not of an archive."""
        self._words, self._configured, self._loose = words_of(caption_columns), configured, loose
        self._any = False
        self._near: tuple[str | None, list[tuple[int, str, int]]] = (None, [])  # a folder, and its folders of captions

    def __bool__(self) -> bool:
        return self._any

    def add(self, path: str, size: int = 0, checksum: str = "", number: int = 0) -> None:
        """Adds a text. All texts are added before the first `claim`."""
        self._any = True
        folder, name = posixpath.split(path)
        key = (digest(fold(folder)),)
        self._db.execute("INSERT INTO folders VALUES (NULL, ?) ON CONFLICT DO NOTHING", key)
        (place,) = self._db.execute("SELECT id FROM folders WHERE fold = ?", key).fetchone()
        values = (to_bytes(path), size, checksum, number)
        text = self._db.execute(
            "INSERT INTO texts VALUES (NULL, ?, ?, ?, ?, NULL, NULL, NULL, NULL, 0, NULL, 0)", values
        ).lastrowid
        for one in text_names(stem(name), self._words):
            self._db.execute("INSERT INTO names VALUES (?, ?, ?)", (place, digest(one), text))

    def claim(self, image: str) -> None:
        """Records the texts that may describe an image. All images claim before the first `match`."""
        for one, _ in self._matches(image) or ():
            text = one.text
            if text.claim(one.near, image):
                other = None if text.other is None else to_bytes(text.other)
                values = (text.near, to_bytes(text.owner), other, text.formats, text.count, text.number)
                self._db.execute(
                    "UPDATE texts SET near = ?, owner = ?, other = ?, formats = ?, count = ? WHERE id = ?", values
                )

    def block(self, name: str) -> None:
        """Records the texts that may be of a file that is left out and is no image. Before the first `match`."""
        for one, _ in self._matches(name) or ():
            one.text.block(one.near)
            self._db.execute("UPDATE texts SET blocked = ? WHERE id = ?", (one.text.blocked, one.text.number))

    def leave_out(self, image: str) -> None:
        """Marks the texts of an image that cannot be read. It has claimed them like the others."""
        chosen, why = choose(one for one, _ in self._matches(image) or ())
        for text in () if why else chosen:
            self._db.execute("UPDATE texts SET used = -1 WHERE id = ? AND used = 0", (text.number,))

    def match(self, image: str) -> tuple[list[Apart], str]:
        """The texts of an image, and why they are ambiguous ("" if they are not)."""
        matches = self._matches(image)
        if matches is None:
            return [], f"more than {MOST} text files may describe it"
        chosen, why = choose(one for one, _ in matches)
        if why:
            return [], why
        apart = {one.text.number: apart for one, apart in matches}
        for text in chosen:
            self._db.execute("UPDATE texts SET used = 1 WHERE id = ?", (text.number,))
        return [apart[text.number] for text in chosen], ""

    def finish(self, account: Account, locator: str = "") -> None:
        """Counts all texts. locator: what precedes their paths in examples."""
        for path, used in self._db.execute(
            "SELECT path, CASE WHEN blocked < near THEN -1 ELSE used END FROM texts ORDER BY path, id"
        ):
            name = from_bytes(path)
            if used > 0:
                account.use()
            else:
                account.skip(TEXT_OF_LEFT_OUT if used else reason_of(name), f"{locator}{name}")

    def _matches(self, image: str) -> list[tuple[Match, Apart]] | None:
        """None: too many."""
        folder, base = posixpath.split(image)
        places = self._places(folder)
        if not places:
            return []
        name, matches = ImageName(base), []
        names = [digest(one) for one in name.folded]
        query = _QUERY.format(marks=", ".join("?" * len(names)))
        for rank, place, number in places:
            rows = {row[0]: row for row in self._db.execute(query, (number, *names))}
            if len(rows) > MOST:
                return None
            for identity, (_, path, size, checksum, given, near, owner, other, formats, count, blocked) in sorted(
                rows.items()
            ):
                text = Text(from_bytes(path), identity, blocked=blocked)
                if near is not None:
                    text.near, text.owner, text.formats, text.count = near, from_bytes(owner), formats, count
                    text.other = None if other is None else from_bytes(other)
                above = posixpath.dirname(text.path)
                spelled = 0 if above == place else spelling(above, place)
                assert spelled is not None, (text.path, place)
                if (one := match(name, text, self._words, self._loose, rank, spelled)) is not None:
                    matches.append((one, Apart(text.path, size, checksum, given)))
        return matches

    def _places(self, folder: str) -> list[tuple[int, str, int]]:
        """(rank, path, number) of the folders of captions of a folder that exist."""
        if self._near[0] != folder:
            places: dict[int, tuple[int, str, int]] = {}  # two of one folded name are one
            for rank, place in caption_folders(folder, self._configured):
                row = self._db.execute("SELECT id FROM folders WHERE fold = ?", (digest(fold(place)),)).fetchone()
                if row is not None:
                    places.setdefault(row[0], (rank, place, row[0]))
            self._near = (folder, list(places.values()))
        return self._near[1]
