"""Random trees of images, links, texts, tables and unknown files whose names differ in folders, case and Unicode form alone: each image
has the captions that the rule of nearest names gives it, and everything is counted.

The oracle compares every text and row with every image, as docs/own_images.md has the rule. It shares no code with the
readers, which never hold a whole source.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from source_files import picture, read_records, tar_of, write

from tasks.curation.captions import clean_captions
from tasks.curation.sources.base import TEXT_OF_LEFT_OUT

PNG = picture()
SETTINGS = settings(
    max_examples=100,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes, and the example is small
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
AMBIGUOUS = "ambiguous_caption"
IMAGE_WORDS = ("images", "photos")
CAPTION_WORDS = ("captions", "text")
SAMPLE_IMAGES = ("image", "img", "picture", "photo", "rgb", "jpg", "jpeg", "png", "webp")

# Names of one tree are of one line each, so that many of them are near to each other.
FOLDERS = [
    ["", "images", "Images"],
    [f"images/{NFC}", f"images/{NFD}", "images/É", f"captions/{NFC}", f"captions/{NFD}"],
    ["images", "photos", "captions", "Captions"],
    ["photos", "photos/captions", "captions", "text"],
    ["photos/x", "photos/X", "captions/x", "captions/X"],
]
STEMS = [
    ["a", "A"],
    [NFC, NFD, "É"],
    ["a.b", "A.b", "a.B", "a"],
    ["a", "a.caption", "A"],
    ["a.png", "a", "A"],
    ["a", "a.image", "a.left", "a.caption"],
]


# ---------------------------------------------------------------- the rule, by brute force


def nfc(name):
    return unicodedata.normalize("NFC", name)


def level(one, other):
    """0: equal; 1: equal in composed form; 2: equal without case; None: not equal."""
    forms = (lambda name: name, nfc, lambda name: nfc(nfc(name).casefold()))
    return next((i for i, form in enumerate(forms) if form(one) == form(other)), None)


def stem_of(name):
    return name.rpartition(".")[0]


def key_of(name):
    return name.partition(".")[0]


def distance(text, image, loose):
    """(0, or by the key 1 for the image of a sample and 2 for others; level), and what the text's name repeats, for names
    without folders; None if not related."""
    base, options = stem_of(text), []
    for kind, own in (("name", image), ("stem", stem_of(image))):
        if (near := level(base, own)) is not None:
            options.append((0, near, kind))
    marked = base.partition(".")[2] == "caption"
    part = stem_of(image).partition(".")[2]
    is_of_sample = not part or level_form(part) in SAMPLE_IMAGES
    related = is_of_sample or not loose
    if (
        not options
        and related
        and (base == key_of(base) or marked)
        and (near := level(key_of(base), key_of(image))) is not None
    ):
        options.append((1 if is_of_sample else 2, near, "marked" if marked else "key"))
    return min(options, default=None)


def is_one_picture(names):
    """Whether images are one picture in several formats."""
    return len({stem_of(name) for name in names}) == 1 and len({level_form(name) for name in names}) == len(names)


def level_form(name):
    return nfc(nfc(name).casefold())


def by_texts(related, blocked):
    """Image -> its texts, or AMBIGUOUS. related: (text, image) -> (distance, kind). blocked: text -> the least distance from
    an unknown file."""
    nearest, owners = {}, defaultdict(list)
    for (text, _), (far, _) in related.items():
        nearest[text] = min(nearest.get(text, far), far)
    for (text, image), (far, _) in related.items():
        if far == nearest[text] <= blocked.get(text, far):
            owners[text].append(image)
    result = {}
    for image in {image for _, image in related}:
        own = {text: related[text, image] for text in owners if image in owners[text]}
        if not own:
            continue
        best = min(far for far, _ in own.values())
        chosen = {text: kind for text, (far, kind) in own.items() if far == best}
        if not best[0]:
            also = [(by_key, *best[1:]) for by_key in (1, 2)]
            chosen |= {text: kind for text, (far, kind) in own.items() if far in also and kind == "marked" and is_one_picture(owners[text])}  # fmt: skip
            if "name" in chosen.values():
                chosen = {text: kind for text, kind in chosen.items() if kind == "name" or len(owners[text]) == 1}
        result[image] = sorted(chosen)
        if any(not is_one_picture(owners[text]) for text in chosen) or not is_one_name(chosen, best):
            result[image] = AMBIGUOUS
    return result, set(nearest)


def is_one_name(chosen, best):
    """Whether all texts write the image's name in the same way."""
    if len({posixpath.dirname(text) for text in chosen}) > 1 or len({level_form(text) for text in chosen}) < len(
        chosen
    ):
        return False
    if not any(best[1:]):
        return True
    spelled, full = set(), set()
    for text, kind in chosen.items():
        base = stem_of(posixpath.basename(text))
        full |= {base} if kind == "name" else set()
        spelled.add({"name": stem_of, "stem": str}.get(kind, key_of)(base))
    return len(spelled) == 1 and len(full) < 2


def expected_folders(folder):
    parts = folder.split("/") if folder else []
    for i, part in enumerate(parts):
        if part.casefold() in IMAGE_WORDS:
            yield from ("/".join([*parts[:i], word, *parts[i + 1 :]]) for word in CAPTION_WORDS)
    yield from ("/".join([*parts, word]) for word in CAPTION_WORDS)


def split(path):
    return posixpath.dirname(path), posixpath.basename(path)


def least(related):
    """Text -> its least distance."""
    blocked = {}
    for (text, _), (far, _) in related.items():
        blocked[text] = min(blocked.get(text, far), far)
    return blocked


def beside(texts, images, loose):
    related = {}
    for text in texts:
        for image in images:
            if split(text)[0] == split(image)[0] and (found := distance(split(text)[1], split(image)[1], loose)):
                related[text, image] = (found[:2] + (0,), found[2])
    return related


def apart_from(texts, images, loose):
    apart = {}
    for text in texts:
        for image in images:
            found = distance(split(text)[1], split(image)[1], loose)
            there = [near for place in expected_folders(split(image)[0]) if (near := level(split(text)[0], place)) is not None]  # fmt: skip
            if found and there and split(text)[0] != split(image)[0]:
                apart[text, image] = (found[:2] + (min(there),), found[2])
    return apart


def oracle(images, texts, rows, left_out, unknown, links, loose):
    """Image -> captions or AMBIGUOUS, the texts that are not used, and the rows that are not. rows: number -> written path.
    left_out: images that have texts and rows like the others, and no record. unknown: other files. links: texts that are
    compared like the others, and not read."""
    own, at_home = by_texts(beside(texts, images, loose), least(beside(texts, unknown, loose)))
    others = set(texts) - at_home - links
    parallel, _ = by_texts(apart_from(others, images, loose), least(apart_from(others, unknown, loose)))

    near, by_image = {}, defaultdict(list)
    for number, written in rows.items():
        plain = posixpath.normpath(written.replace("\\", "/"))
        for image in images:
            blank = "/".join(part.strip() for part in plain.split("/"))
            far = level(written, image)
            if far is None and (far := level(blank, image)) is not None:
                far += 3
            if far is not None:
                near[number, image] = far
    named, used = {}, set()
    best = {number: min(far for (n, _), far in near.items() if n == number) for number in {n for n, _ in near}}
    for (number, image), far in near.items():
        if far == best[number]:
            by_image[image].append((far, number))
    for image, candidates in by_image.items():
        nearest = min(candidates)[0]
        numbers = [number for far, number in candidates if far == nearest]
        used.update(() if image in left_out else numbers)
        tied = any(sum((n, best[n]) == (number, far) for (n, _), far in near.items()) > 1 for number in numbers)
        spelled = {rows[number] for number in numbers}
        named[image] = AMBIGUOUS if tied or (nearest and len(spelled) > 1) else [f"row {number}" for number in sorted(numbers)]  # fmt: skip

    expected, left = {}, set(texts)
    for image in set(images) - left_out:
        described_by, listed = own.get(image, []), named.get(image, [])
        if not described_by and not listed:
            described_by = parallel.get(image, [])
        if AMBIGUOUS in (described_by, listed):
            expected[image] = AMBIGUOUS
        else:
            expected[image] = listed + [f"of {text}" for text in described_by if text not in links]
        left -= set(described_by if described_by != AMBIGUOUS else ())
    return expected, left - links, set(rows) - used


# ---------------------------------------------------------------- trees


def some(strategy):
    return st.one_of(
        st.just([]), st.lists(strategy, min_size=3, max_size=7), st.lists(strategy, min_size=3, max_size=7)
    )


@st.composite
def trees(draw):
    """Images, texts with a caption that names them, rows of one table in the root, images that are links or are of a format
    that is not read, files of an unknown kind, and texts that are links."""
    folder, stem = st.sampled_from(draw(st.sampled_from(FOLDERS))), st.sampled_from(draw(st.sampled_from(STEMS)))
    image, text = (
        st.sampled_from(["png", "png", "PNG", "webp", "jxl", "html"]),
        st.sampled_from(["txt", "txt", "json", "TXT", "png.txt"]),
    )
    path = lambda folder, name: f"{folder}/{name}" if folder else name  # noqa: E731
    pictures = {path(f, f"{name}.{ext}") for f, name, ext in draw(st.lists(st.tuples(folder, stem, image), min_size=3, max_size=6))}  # fmt: skip
    files = {path(f, f"{name}.{ext}") for f, name, ext in draw(some(st.tuples(folder, stem, text)))}
    written = {}
    row = st.tuples(folder, stem, image, st.sampled_from("///\\"), st.sampled_from(["", "", "", " "]))
    for number, (f, name, ext, separator, space) in enumerate(draw(some(row))):
        written[number] = f"{path(f, name)}.{ext}{space}".replace("/", separator)
    unknown = {picture for picture in pictures if picture.endswith("html")}
    pictures -= unknown
    left_out = {picture for picture in pictures if picture.endswith("jxl")}
    left_out |= draw(st.one_of(st.just(set()), st.sets(st.sampled_from(sorted(pictures or {""})))))
    left_out &= pictures
    links = {file for file in files if draw(st.integers(0, 7)) == 0}
    return sorted(pictures), sorted(files), written, left_out, sorted(unknown), links


def content(text):
    return json.dumps({"text": f"of {text}"}) if text.lower().endswith("json") else f"of {text}"


def files_of(tree):
    """Name -> content; None for images that are left out."""
    pictures, texts, rows, left_out, unknown, links = tree
    files = {
        **{picture: None if picture in left_out else PNG for picture in pictures},
        **{text: None if text in links else content(text) for text in texts},
        **dict.fromkeys(unknown, "x"),
    }
    if rows:
        files["metadata.csv"] = "file_name,text\n" + "".join(f'"{name}","row {n}"\n' for n, name in rows.items())
    return files


def dead_link(name):
    link = tarfile.TarInfo(name)
    link.type, link.linkname = tarfile.LNKTYPE, "elsewhere.png"
    return link


def check(tree, path, prefix, containers):
    """containers: files besides those of the tree."""
    expected, left, unmatched = oracle(*tree, loose=not prefix)
    rows = tree[2]
    if not expected:
        with pytest.raises(ValueError):
            read_records(path)
        return
    if rows and len(unmatched) == len(rows):
        with pytest.raises(ValueError, match=r"metadata\.csv name no image"):
            read_records(path)
        return
    records, account = read_records(path)
    actual = {record.locator: record.problem or sorted(clean_captions(record.captions)) for record in records}
    assert actual == {
        prefix + image: value if value == AMBIGUOUS else sorted(map(nfc, value)) for image, value in expected.items()
    }
    skipped = {reason: count for reason, (count, _) in account.skipped.items()}
    assert sum(count for reason, count in skipped.items() if reason in (".txt", ".json", TEXT_OF_LEFT_OUT)) == len(left)
    assert skipped.get("metadata row that names no image", 0) == len(unmatched)
    files = len(tree[0]) + len(tree[1]) + len(tree[4]) + bool(rows) + containers
    assert account.seen == files + len(unmatched) and account.records == len(expected)


@SETTINGS
@given(trees())
def test_loose_files_have_the_captions_of_the_nearest_names(tree):
    with tempfile.TemporaryDirectory() as scratch:
        files, folder = files_of(tree), Path(scratch) / "source"
        write(folder, {name: data or b"" for name, data in files.items()})
        for name in files:
            if files[name] is None and not name.endswith("jxl"):
                (folder / name).unlink()
                (folder / name).symlink_to("elsewhere.png")
        check(tree, folder, "", 0)


@SETTINGS
@given(trees(), st.randoms(use_true_random=False), st.booleans())
def test_tars_have_the_captions_of_the_nearest_names_in_any_order(tree, random, beside):
    files = files_of(tree)
    table = files.pop("metadata.csv", None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        members = [
            (name if data or name.endswith("jxl") else dead_link(name), data or b"") for name, data in files.items()
        ]
        if table is not None and beside:
            write(folder, {"metadata.csv": table})
        elif table is not None:
            members.append(("metadata.csv", table))
        random.shuffle(members)
        tar_of(folder / "x.tar", members, format=1)
        check(tree, folder, "x.tar:", 1)
