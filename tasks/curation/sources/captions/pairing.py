"""Decides by their names which text file describes which image.

    a.png.txt            describes a.png
    a.txt, a.json        describe a.png (and a.webp: the same picture in two formats)
    a.caption.txt        describes a.image.png: WebDataset's key, the name up to its first dot
    a.txt                describes a.rgb.png, and in an archive a.left.png, too

Keys are for WebDataset. In a loose folder sd1.txt is no caption of sd1.5.png, as trainers read folders by the whole
stem: there an image has a key only if it is named like the image of a sample (`SAMPLE_IMAGES`). In an archive such an
image is nearer than other images of its key: a.caption.txt is of a.image.png, not of a.mask.png.

Names are compared exactly, then by Unicode's composed form (macOS decomposes names), then without case. A text belongs
to its nearest images, and an image has the nearest of its texts. If two pictures are equally near to a text, or two
texts to an image, the captions are ambiguous: no image gets a caption because another image has one already, or
because the other one cannot be read. A file that is left out and is no companion of images (`may_own_text`) has the
texts that are nearer to its name than to any image: c.txt next to c.unknown is no caption of c.frame1.png.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.curation.sources.base import CAPTION_COLUMNS, COMPANIONS, base_name, extension, is_media, visible
from tasks.curation.sources.captions.caption_text import SIDECAR_EXTENSIONS, column_name

MOST = 64  # texts whose names differ in case and form only; more are ambiguous
# Extensions of one format: a.jpg and a.jpeg are two pictures, unlike a.jpg and a.webp.
_SAME_FORMAT = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "heif": "heic", "hif": "heic", "pgm": "ppm"}
NAME, STEM, MARKED, KEY = range(4)  # what the text's name repeats: the image's name, its stem, or its key
_BY_KEY, _BY_LESSER_KEY, _BY_RANK = 100, 200, 1000  # weights in `Match.near`
SAMPLE_IMAGES = frozenset(("image", "img", "picture", "photo", "rgb", "jpg", "jpeg", "png", "webp"))  # a.WORD.png


@dataclass
class Pair:
    """The text files of one image (positions in the given list), why they are ambiguous, and the name of one that is a
    link or device, which is not read."""

    texts: list[int] = field(default_factory=list)
    ambiguous: str = ""
    unread: str = ""


class Pairs(NamedTuple):
    """images: position of each image -> its pair. strays: positions of texts that describe no file of the list.
    of_left_out: positions of texts that describe only files that are left out. Texts that are left out themselves are in
    none of them."""

    images: dict[int, Pair]
    strays: list[int]
    of_left_out: list[int]


@dataclass(slots=True)
class Text:
    """A text file and its nearest images so far.

    path: with its folder, if it is not the folder of the images.
    owner: the first of the nearest images; other: the first that is another picture, or None.
    formats: of the first picture. count: of the nearest images.
    blocked: the nearest of other files that are left out, or None.
    """

    path: str
    number: int
    near: int | None = None
    owner: str = ""
    other: str | None = None
    formats: str = ""
    count: int = 0
    blocked: int | None = None

    def block(self, near: int) -> None:
        """Records that a file that is no image, and is left out, is so near."""
        self.blocked = near if self.blocked is None else min(near, self.blocked)

    @property
    def is_of_image(self) -> bool:
        """Whether it is not nearer to a file of `block`."""
        return self.near is not None and (self.blocked is None or self.near <= self.blocked)

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


def may_own_text(name: str) -> bool:
    """Whether a text may be of a file of this name, read or left out."""
    return extension(name) not in COMPANIONS and not is_text(name)


def is_text(name: str) -> bool:
    return extension(name) in SIDECAR_EXTENSIONS


def words_of(caption_columns: Iterable[str]) -> set[str]:
    """The words that mark a text file as captions, as in `a.WORD.txt`."""
    return {column_name(word) for word in (*CAPTION_COLUMNS, *caption_columns)}


class ImageName:
    """The name of an image (without folders), and the `fold`ed names under which `text_names` puts its texts."""

    def __init__(self, name: str) -> None:
        self.name, self.stem, self.key = name, stem(name), key_of(name)
        self.is_of_sample = not (mark := _mark(self.stem)) or mark in SAMPLE_IMAGES
        self.folded = list(dict.fromkeys([fold(self.stem), fold(name), fold(self.key)]))


def text_names(base: str, words: set[str]) -> list[str]:
    """The `fold`ed names under which images look for a text: its stem `base`, and its key if it is marked."""
    return list(dict.fromkeys([fold(base), *([fold(key_of(base))] if _mark(base) in words else [])]))


def _mark(base: str) -> str:
    """The word behind the key, in the form of `words_of`."""
    middle = base[len(key_of(base)) + 1 :]
    return column_name(middle) if middle else ""


def match(image: ImageName, text: Text, words: set[str], loose: bool, rank: int = 0, folder: int = 0) -> Match | None:
    """How a text may describe an image; None if it does not.

    Args:
        loose: whether they are files of a folder, not of an archive.
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
    if level is None or (mark and mark not in words) or (loose and not image.is_of_sample):
        return None
    by_key = _BY_KEY if image.is_of_sample else _BY_LESSER_KEY
    return Match(rank * _BY_RANK + by_key + level * 10 + folder, MARKED if mark else KEY, text)


def choose(matches: Iterable[Match]) -> tuple[list[Text], str]:
    """The texts of one image, after all images have claimed theirs, and why they are ambiguous ("" if they are not)."""
    own = [one for one in matches if one.near == one.text.near and one.text.is_of_image]
    if not own:
        return [], ""
    near = min(one.near for one in own)
    chosen = [one for one in own if one.near == near]
    if chosen[0].kind in (NAME, STEM):
        # One key has one image: a.caption.txt is a caption of a.png as a.txt is.
        by_key = (near + _BY_KEY, near + _BY_LESSER_KEY)
        chosen += [one for one in own if one.kind == MARKED and one.near in by_key and one.text.other is None]
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


def pair(
    names: Sequence[str],
    caption_columns: tuple[str, ...] = (),
    left_out: AbstractSet[int] = frozenset(),
    loose: bool = False,
) -> Pairs:
    """Pairs the images of one folder with its text files.

    Args:
        names: in the order of the folder or archive, without folders. An archive may repeat a name.
        caption_columns: see `words_of`.
        left_out: positions of files that are not read: links, other media and unknown files. They are compared like the
            others, so that none of their texts is given to another image; and no image whose text is a link gets another.
        loose: whether they are files of a folder, not of an archive.
    """
    groups: dict[str, list[int]] = {}
    others: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        if is_media(name) or is_text(name):
            groups.setdefault(fold(key_of(name)), []).append(i)
        elif may_own_text(name):
            others.setdefault(fold(key_of(name)), []).append(name)
    words = words_of(caption_columns)
    pairs = Pairs({}, [], [])
    for key, group in groups.items():
        if len(group) > 1:
            _pair_group(names, group, others.get(key, ()), words, loose, pairs)
        elif is_media(names[group[0]]):
            pairs.images[group[0]] = Pair()
        else:
            pairs.strays.append(group[0])
    unread = [i for i in pairs.images if i in left_out]
    texts = {text for i in unread for text in pairs.images.pop(i).texts}
    pairs.of_left_out.extend(texts.difference(*(one.texts for one in pairs.images.values())) if texts else ())
    if any(is_text(names[i]) for i in left_out):
        for one in pairs.images.values():
            one.unread = next((names[i] for i in one.texts if i in left_out), "")
            one.texts = [i for i in one.texts if i not in left_out]
    for texts_of_none in (pairs.strays, pairs.of_left_out):
        texts_of_none[:] = sorted(i for i in texts_of_none if i not in left_out)
    return pairs


def _pair_group(
    names: Sequence[str], group: list[int], others: Sequence[str], words: set[str], loose: bool, pairs: Pairs
) -> None:
    """others: names of unknown files with the key of the group."""
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
            _pair_group(names, run, others, words, loose, pairs)
        if runs is None:
            for i in images:
                pairs.images[i].ambiguous = f"{visible(twice)!r} occurs {count} times, so captions cannot be assigned"
        return
    all_texts = [Text(names[i], i) for i in texts]
    by_name: dict[str, list[Text]] = {}
    for text in all_texts:
        for name in text_names(stem(text.path), words):
            by_name.setdefault(name, []).append(text)

    def matches_of(name: str) -> list[Match] | None:
        """None: too many."""
        image = ImageName(name)
        near = {text.number: text for folded in image.folded for text in by_name.get(folded, ())}
        if len(near) > MOST:
            return None
        return [one for text in near.values() if (one := match(image, text, words, loose)) is not None]

    found: dict[int, list[Match]] = {}
    crowded: set[int] = set()
    for i in images:
        if (matches := matches_of(names[i])) is None:
            crowded.add(i)
            continue
        found[i] = matches
        for one in matches:
            one.text.claim(one.near, names[i])
    for name in others:
        for one in matches_of(name) or ():
            one.text.block(one.near)
    for i, matches in found.items():
        chosen, why = choose(matches)
        pairs.images[i] = Pair([] if why else [text.number for text in chosen], why)
    for i in crowded:
        pairs.images[i].ambiguous = f"more than {MOST} text files may describe it"
    pairs.of_left_out.extend(text.number for text in all_texts if text.near is not None and not text.is_of_image)
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
