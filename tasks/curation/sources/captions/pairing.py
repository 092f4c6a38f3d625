"""Pairs text files with images by their names, in a folder or in a folder of a tar.

    a.png.txt            describes a.png
    a.txt, a.json        describe a.png (and a.webp: the same picture in two formats)
    a.caption.txt        describes a.image.png: WebDataset's key, the name up to its first dot

Names are compared exactly, then by Unicode's composed form (macOS decomposes names), then without case. If that leaves
a choice between two images, the captions are ambiguous and neither image gets them.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tasks.curation.sources.base import CAPTION_COLUMNS, extension, is_image, visible
from tasks.curation.sources.captions.caption_text import SIDECAR_EXTENSIONS, column_name

_LEVELS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: fold(name),
)


@dataclass
class Pair:
    """The text files of one image (positions in the given list), and why they are ambiguous."""

    texts: list[int] = field(default_factory=list)
    ambiguous: str = ""


def fold(name: str) -> str:
    """A form of a name that ignores Unicode composition and case."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Rivals:
    """Groups of paths that differ only in Unicode form or case."""

    MOST = 64  # of one path; more would be ambiguous anyway

    def __init__(self, paths: Iterable[str]) -> None:
        self._groups: dict[str, dict[str, None]] = {}
        for path in paths:
            group = self._groups.setdefault(fold(path), {})
            if len(group) < self.MOST:
                group[path] = None

    def of(self, path: str) -> list[str]:
        return [other for other in self._groups[fold(path)] if other != path]


def stem(name: str) -> str:
    return name[: -len(extension(name)) - 1] if extension(name) else name


def key_of(name: str) -> str:
    """WebDataset's key of a name without folders: up to the first dot."""
    return name[: name.index(".", 1)] if "." in name[1:] else name


def pair(names: Sequence[str], caption_columns: tuple[str, ...] = ()) -> dict[int, Pair]:
    """Pairs the images of one folder with its text files.

    Args:
        names: in the order of the folder or archive, without folders. An archive may repeat a name.
        caption_columns: more words that mark a text file as captions, as in `a.WORD.txt`.

    Returns:
        Position of each image -> its pair. Text files in no pair describe no image.
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if is_image(name) or extension(name) in SIDECAR_EXTENSIONS:
            groups.setdefault(fold(key_of(name)), []).append(i)
    words = {column_name(word) for word in (*CAPTION_COLUMNS, *caption_columns)}
    pairs: dict[int, Pair] = {}
    for group in groups.values():
        if len(group) == 1:
            if is_image(names[group[0]]):
                pairs[group[0]] = Pair()
        else:
            pairs.update(_pair_group(names, group, words))
    return pairs


def _pair_group(names: Sequence[str], group: list[int], words: set[str]) -> dict[int, Pair]:
    images = [i for i in group if is_image(names[i])]
    texts = [i for i in group if not is_image(names[i])]
    pairs = {i: Pair() for i in images}
    if not images or not texts:
        return pairs
    if len(group) == 2 and stem(names[images[0]]) == stem(names[texts[0]]):
        pairs[images[0]].texts.append(texts[0])
        return pairs
    twice, count = Counter(names[i] for i in group).most_common(1)[0]
    if count > 1:
        runs = _runs(names, group)
        if runs is None:
            for one in pairs.values():
                one.ambiguous = f"{visible(twice)!r} occurs {count} times, so captions cannot be assigned"
            return pairs
        for run in runs:
            pairs.update(_pair_group(names, run, words))
        return pairs
    by_name, by_stem = _index(names, images, lambda name: name), _index(names, images, stem)
    near: set[int] = set()
    far: list[tuple[int, bool]] = []
    for text in texts:
        base = stem(names[text])
        owners = _same(by_name, base) or _same(by_stem, base)
        if owners:
            _give(names, pairs, text, owners)
            near.update(owners)
        else:
            middle = base[len(key_of(names[text])) + 1 :]
            if not middle or column_name(middle) in words:
                far.append((text, bool(middle)))
    alone = [i for i in images if i not in near]
    for text, is_marked in far:
        owners = images if is_marked and len(images) == 1 else alone
        if owners:
            _give(names, pairs, text, owners)
            if len(owners) > 1:
                break  # they are ambiguous already
    return pairs


def _index(names: Sequence[str], images: list[int], part: Callable[[str], str]) -> list[dict[str, list[int]]]:
    """For each level of comparison: form of a part of the name -> the images."""
    levels: list[dict[str, list[int]]] = []
    for level in _LEVELS:
        levels.append({})
        for i in images:
            levels[-1].setdefault(level(part(names[i])), []).append(i)
    return levels


def _same(levels: list[dict[str, list[int]]], base: str) -> list[int]:
    """The images at the strictest level that has any."""
    return next((index[level(base)] for level, index in zip(_LEVELS, levels, strict=True) if level(base) in index), [])


def _give(names: Sequence[str], pairs: dict[int, Pair], text: int, owners: list[int]) -> None:
    """A text belongs to one image, or to one picture in several formats: never to two pictures."""
    # a.png and a.PNG are two pictures, unlike a.png and a.webp.
    if len({stem(names[i]) for i in owners}) > 1 or len({fold(names[i]) for i in owners}) < len(owners):
        several = " and ".join(repr(visible(names[i])) for i in owners[:2])
        for i in owners:
            pairs[i].ambiguous = f"{visible(names[text])!r} may describe {several}; give each image its own text file"
    else:
        for i in owners:
            pairs[i].texts.append(text)


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
