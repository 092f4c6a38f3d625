"""Text files in folders of captions: images/train/a.png is described by captions/train/a.txt, and so on.

The texts of a whole source are on disk. All images claim theirs before one is matched, since images of several folders
may have the same text as their nearest.
"""

from __future__ import annotations

import json
import posixpath
import sqlite3
from typing import NamedTuple

from tasks.curation.sources.base import base_name, from_bytes, to_bytes
from tasks.curation.sources.captions.pairing import (
    MOST,
    Match,
    Text,
    choose,
    fold,
    match,
    spelling,
    stem,
    stems_for,
    words_of,
)

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")
CAPTION_FOLDERS = ("captions", "caption", "texts", "text", "txt", "prompts")
MAX_DEPTH, MAX_IMAGE_FOLDERS = 64, 4  # of a path; hostile paths repeat a name thousands of times


def caption_folders(path: str, configured: str | None) -> list[tuple[int, str]]:
    """(rank, folder) that may have the captions of the images in folder `path`: images/train -> captions/train, ..."""
    parts = path.split("/") if path else []
    places: dict[str, int] = {}
    if configured is not None:
        places["/".join([configured, *parts])] = 0
        places.setdefault("/".join([configured, *parts[1:]]), 1)
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


class ParallelTexts:
    """The texts of a source that describe no image of their own folder. A context manager."""

    def __init__(self, database: str, caption_columns: tuple[str, ...], configured: str | None) -> None:
        """database: a path, or ":memory:"."""
        self._words, self._configured = words_of(caption_columns), configured
        self._db = sqlite3.connect(database, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE texts (id INTEGER PRIMARY KEY, folder BLOB, stem BLOB, path BLOB, size INT, digest TEXT, number INT, "
            "claims TEXT, used INT)"
        )
        self._db.execute("CREATE INDEX stems ON texts (folder, stem)")
        self._db.execute("BEGIN")
        self._any = False
        self._near: tuple[str | None, list[tuple[int, str]]] = (
            None,
            [],
        )  # a folder, and its folders of captions that exist

    def __enter__(self) -> ParallelTexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def __bool__(self) -> bool:
        return self._any

    def add(self, path: str, size: int = 0, digest: str = "", number: int = 0) -> None:
        """Adds a text. All texts are added before the first `claim`."""
        self._any = True
        folder, base = to_bytes(fold(posixpath.dirname(path))), to_bytes(fold(stem(base_name(path))))
        values = (folder, base, to_bytes(path), size, digest, number)
        self._db.execute("INSERT INTO texts VALUES (NULL, ?, ?, ?, ?, ?, ?, NULL, 0)", values)

    def claim(self, image: str) -> None:
        """Records the texts that may describe an image. All images claim before the first `match`."""
        for one in self._matches(image) or ():
            if one.text.claim(one.near, image):
                text = one.text
                claims = [text.near, [_escaped(name) for name in text.owners], text.count, text.formats, text.shared]
                self._db.execute("UPDATE texts SET claims = ? WHERE id = ?", (json.dumps(claims), text.number))

    def match(self, image: str) -> tuple[list[Apart], str]:
        """The texts of an image, and why they are ambiguous ("" if they are not)."""
        matches = self._matches(image)
        if matches is None:
            return [], f"more than {MOST} text files may describe it"
        chosen, why = choose(matches)
        texts = []
        for text in [] if why else chosen:
            row = self._db.execute("SELECT size, digest, number FROM texts WHERE id = ?", (text.number,)).fetchone()
            texts.append(Apart(text.path, *row))
            self._db.execute("UPDATE texts SET used = 1 WHERE id = ?", (text.number,))
        return texts, why

    def all(self):
        """(path, whether it describes an image) of each text, sorted."""
        for path, used in self._db.execute("SELECT path, used FROM texts ORDER BY path, id"):
            yield from_bytes(path), bool(used)

    def _matches(self, image: str) -> list[Match] | None:
        """None: too many."""
        name = base_name(image)
        matches: list[Match] = []
        stems = [to_bytes(one) for one in stems_for(name, self._words)]
        marks = ", ".join("?" * len(stems))
        query = (
            f"SELECT id, path, claims FROM texts WHERE folder = ? AND stem IN ({marks}) ORDER BY id LIMIT {MOST + 1}"  # noqa: S608
        )
        for rank, place in self._places(posixpath.dirname(image)):
            rows = self._db.execute(query, (to_bytes(fold(place)), *stems)).fetchall()
            if len(rows) > MOST:
                return None
            for number, path, claims in rows:
                text = Text(from_bytes(path), number)
                if claims is not None:
                    text.near, owners, text.count, text.formats, text.shared = json.loads(claims)
                    text.owners = [_unescaped(owner) for owner in owners]
                folder = spelling(posixpath.dirname(text.path), place)
                assert folder is not None, (text.path, place)
                if (one := match(name, text, self._words, rank, folder)) is not None:
                    matches.append(one)
        return matches

    def _places(self, folder: str) -> list[tuple[int, str]]:
        if self._near[0] != folder:
            places: dict[bytes, tuple[int, str]] = {}  # two of one folded name are one folder: the exact one
            for rank, place in caption_folders(folder, self._configured):
                key = to_bytes(fold(place))
                if key not in places and self._db.execute("SELECT 1 FROM texts WHERE folder = ?", (key,)).fetchone():
                    places[key] = (rank, place)
            self._near = (folder, list(places.values()))
        return self._near[1]


def _escaped(name: str) -> str:
    return to_bytes(name).decode("latin-1")


def _unescaped(name: str) -> str:
    return from_bytes(name.encode("latin-1"))
