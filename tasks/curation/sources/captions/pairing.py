"""Decides by their names which text file describes which image.

    a.png.txt            describes a.png
    a.txt, a.json        describe a.png (and a.webp: the same picture in two formats)
    a.caption.txt        describes a.image.png: WebDataset's key, the name up to its first dot

Names are compared exactly, then by Unicode's composed form (macOS decomposes names), then without case. A text belongs
to its nearest images, and an image has the nearest of its texts. If two pictures are equally near to a text, or two
texts to an image, the captions are ambiguous: no image gets a caption because another image has one already, or
because the other one cannot be read.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.curation.sources.base import CAPTION_COLUMNS, base_name, extension, is_image, is_media, visible
from tasks.curation.sources.captions.caption_text import SIDECAR_EXTENSIONS, column_name

MOST = 64  # texts whose names differ in case and form only; more are ambiguous
# Extensions of one format: a.jpg and a.jpeg are two pictures, unlike a.jpg and a.webp.
_SAME_FORMAT = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "heif": "heic", "hif": "heic", "pgm": "ppm"}
NAME, STEM, MARKED, KEY = range(4)  # what the text's name repeats: the image's name, its stem, or its key
_BY_KEY, _BY_RANK = 100, 1000  # weights in `Match.near`


@dataclass
class Pair:
    """The text files of one image (positions in the given list), and why they are ambiguous."""

    texts: list[int] = field(default_factory=list)
    ambiguous: str = ""


class Pairs(NamedTuple):
    """images: position of each image -> its pair. strays: positions of texts that describe no file of the list.
    of_left_out: positions of texts that describe only files that are left out."""

    images: dict[int, Pair]
    strays: list[int]
    of_left_out: list[int]


@dataclass(slots=True)
class Text:
    """A text file and its nearest images so far.

    path: with its folder, if it is not the folder of the images.
    owner: the first of the nearest images; other: the first that is another picture, or None.
    formats: of the first picture. count: of the nearest images.
    """

    path: str
    number: int
    near: int | None = None
    owner: str = ""
    other: str | None = None
    formats: str = ""
    count: int = 0

    def claim(self, near: int, image: str) -> bool:
        """Records that an image is so near. Returns whether it is among the nearest."""
        if self.near is not None and near > self.near:
            return False
        form = fold(extension(image))
        form = f"{_SAME_FORMAT.get(form, form)}/"
        if self.near is None or near < self.near:
            self.near, self.owner, self.other, self.formats, self.count = near, image, None, f"/{form}", 1
            return True
        # a.png and a.PNG are two pictures, too.
        if stem(self.owner) == stem(image) and f"/{form}" not in self.formats:
            self.formats += form
        elif self.other is None:
            self.other = image
        self.count += 1
        return True


class Match(NamedTuple):
    """A text that may describe an image. near: smaller is nearer; equal numbers are equally near."""

    near: int
    kind: int
    text: Text


def fold(name: str) -> str:
    """A form of a name that ignores Unicode composition and case."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def spelling(one: str, other: str) -> int | None:
    """0: equal; 1: equal in Unicode's composed form; 2: equal ignoring case; None: different names."""
    if one == other:
        return 0
    if one.isascii() and other.isascii():
        return 2 if one.lower() == other.lower() else None
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        return 1
    return 2 if fold(one) == fold(other) else None


def stem(name: str) -> str:
    length = len(extension(name))
    return name[: -length - 1] if length else name


def key_of(name: str) -> str:
    """WebDataset's key of a name without folders: up to the first dot."""
    return name[: name.index(".", 1)] if "." in name[1:] else name


def words_of(caption_columns: Iterable[str]) -> set[str]:
    """The words that mark a text file as captions, as in `a.WORD.txt`."""
    return {column_name(word) for word in (*CAPTION_COLUMNS, *caption_columns)}


class ImageName:
    """The name of an image (without folders), and the `fold`ed names under which `text_names` puts its texts."""

    def __init__(self, name: str) -> None:
        self.name, self.stem, self.key = name, stem(name), key_of(name)
        self.folded = list(dict.fromkeys([fold(self.stem), fold(name), fold(self.key)]))


def text_names(base: str, words: set[str]) -> list[str]:
    """The `fold`ed names under which images look for a text: its stem `base`, and its key if it is marked."""
    return list(dict.fromkeys([fold(base), *([fold(key_of(base))] if _mark(base) in words else [])]))


def _mark(base: str) -> str:
    """The word behind the key, in the form of `words_of`."""
    middle = base[len(key_of(base)) + 1 :]
    return column_name(middle) if middle else ""


def match(image: ImageName, text: Text, words: set[str], rank: int = 0, folder: int = 0) -> Match | None:
    """How a text may describe an image; None if it does not.

    Args:
        rank: of the text's folder among the folders of captions.
        folder: `spelling` of the text's folder against the expected one.
    """
    base = stem(base_name(text.path))
    by_stem = spelling(base, image.stem)
    by_name = None if by_stem == 0 else spelling(base, image.name)
    if by_name is not None or by_stem is not None:
        level, kind = min((one, kind) for one, kind in ((by_name, NAME), (by_stem, STEM)) if one is not None)
        return Match(rank * _BY_RANK + level * 10 + folder, kind, text)
    mark, level = _mark(base), spelling(key_of(base), image.key)
    if level is None or (mark and mark not in words):
        return None
    return Match(rank * _BY_RANK + _BY_KEY + level * 10 + folder, MARKED if mark else KEY, text)


def choose(matches: Iterable[Match]) -> tuple[list[Text], str]:
    """The texts of one image, after all images have claimed theirs, and why they are ambiguous ("" if they are not)."""
    own = [one for one in matches if one.near == one.text.near]
    if not own:
        return [], ""
    near = min(one.near for one in own)
    chosen = [one for one in own if one.near == near]
    if chosen[0].kind in (NAME, STEM):
        # One key has one image: a.caption.txt is a caption of a.png as a.txt is.
        chosen += [one for one in own if one.kind == MARKED and one.near == near + _BY_KEY and one.text.other is None]
        if any(one.kind == NAME for one in chosen):  # a.png.txt is of a.png; a.txt is then of a.webp alone
            chosen = [one for one in chosen if one.kind == NAME or one.text.count == 1]
    chosen.sort(key=lambda one: (one.text.path, one.text.number))
    return [one.text for one in chosen], _ambiguity(chosen, near)


def _ambiguity(chosen: list[Match], near: int) -> str:
    for one in chosen:
        if one.text.other is not None:
            several = f"{visible(one.text.owner)!r} and {visible(one.text.other)!r}"
            return f"{visible(one.text.path)!r} may describe {several}; give each image its own text file"
    texts = [one.text for one in chosen]
    folders = list(dict.fromkeys(text.path[: -len(base_name(text.path))].rstrip("/") for text in texts))
    if len(folders) > 1:
        return f"{visible(folders[0])} and {visible(folders[1])} both have captions of it"
    bases = [(one.kind, stem(base_name(one.text.path))) for one in chosen]
    full = {base for kind, base in bases if kind == NAME}
    spelled = {stem(base) if kind == NAME else base if kind == STEM else key_of(base) for kind, base in bases}
    if (near % _BY_KEY and (len(full) > 1 or len(spelled) > 1)) or len({fold(t.path) for t in texts}) < len(texts):
        one, other = (visible(text.path) for text in texts[:2])
        return f"{one!r} and {other!r} may both describe it; keep the one that does"
    return ""


def pair(names: Sequence[str], caption_columns: tuple[str, ...] = (), left_out: Container[int] = ()) -> Pairs:
    """Pairs the images of one folder with its text files.

    Args:
        names: in the order of the folder or archive, without folders. An archive may repeat a name.
        caption_columns: see `words_of`.
        left_out: positions of images that cannot be read, such as links. They are compared like the others, as other
            media are, so that none of their texts is given to another image.
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if is_media(name) or extension(name) in SIDECAR_EXTENSIONS:
            groups.setdefault(fold(key_of(name)), []).append(i)
    words = words_of(caption_columns)
    pairs = Pairs({}, [], [])
    for group in groups.values():
        if len(group) > 1:
            _pair_group(names, group, words, pairs)
        elif is_media(names[group[0]]):
            pairs.images[group[0]] = Pair()
        else:
            pairs.strays.append(group[0])
    unread = [i for i in pairs.images if i in left_out or not is_image(names[i])]
    texts = {text for i in unread for text in pairs.images.pop(i).texts}
    pairs.of_left_out.extend(sorted(texts.difference(*(one.texts for one in pairs.images.values()))) if texts else ())
    return pairs


def _pair_group(names: Sequence[str], group: list[int], words: set[str], pairs: Pairs) -> None:
    images = [i for i in group if is_media(names[i])]
    texts = [i for i in group if not is_media(names[i])]
    pairs.images.update((i, Pair()) for i in images)
    if not images or not texts:
        pairs.strays.extend(texts)
        return
    if len(group) == 2 and stem(names[images[0]]) == stem(names[texts[0]]):
        pairs.images[images[0]].texts.append(texts[0])
        return
    twice, count = Counter(names[i] for i in group).most_common(1)[0]
    if count > 1:
        runs = _runs(names, group)
        for run in runs or ():
            _pair_group(names, run, words, pairs)
        if runs is None:
            for i in images:
                pairs.images[i].ambiguous = f"{visible(twice)!r} occurs {count} times, so captions cannot be assigned"
        return
    all_texts = [Text(names[i], i) for i in texts]
    by_name: dict[str, list[Text]] = {}
    for text in all_texts:
        for name in text_names(stem(text.path), words):
            by_name.setdefault(name, []).append(text)
    found: dict[int, list[Match]] = {}
    crowded: set[int] = set()
    for i in images:
        image = ImageName(names[i])
        near = {text.number: text for name in image.folded for text in by_name.get(name, ())}
        if len(near) > MOST:
            crowded.add(i)
            continue
        found[i] = [one for text in near.values() if (one := match(image, text, words)) is not None]
        for one in found[i]:
            one.text.claim(one.near, names[i])
    for i, matches in found.items():
        chosen, why = choose(matches)
        pairs.images[i] = Pair([] if why else [text.number for text in chosen], why)
    for i in crowded:
        pairs.images[i].ambiguous = f"more than {MOST} text files may describe it"
    if not crowded:
        pairs.strays.extend(text.number for text in all_texts if text.near is None)


def _runs(names: Sequence[str], group: list[int]) -> list[list[int]] | None:
    """Runs of neighbours with the same names: repeated samples, as in concatenated archives."""
    runs: list[list[int]] = []
    seen: set[str] = set()
    for i in group:
        if not runs or runs[-1][-1] != i - 1 or names[i] in seen:
            runs.append([])
            seen = set()
        runs[-1].append(i)
        seen.add(names[i])
    sets = {frozenset(names[i] for i in run) for run in runs}
    return runs if len(sets) == 1 else None
