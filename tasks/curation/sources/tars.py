"""Tars of images with captions next to them (WebDataset), or in a metadata file inside or next to the tar.

No member is extracted to disk under its name. A compressed tar is decompressed to a temporary file when it is read,
within the bounds of tar_format.py, so that a caption far from its image costs only a seek.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from tasks.curation.sources import tar_format
from tasks.curation.sources.base import (
    AMBIGUOUS_CAPTION,
    MAX_IMAGE_BYTES,
    UNREADABLE_CAPTION,
    UNREADABLE_FILE,
    Account,
    Options,
    Record,
    base_name,
    check_size,
    extension,
    is_image,
    reason_of,
    record_key,
    visible,
)
from tasks.curation.sources.captions.caption_text import (
    MAX_JSON_BYTES,
    SIDECAR_EXTENSIONS,
    CaptionError,
    NotTextError,
    sidecar_captions,
    without_column,
)
from tasks.curation.sources.captions.metadata_files import MAX_BYTES as MAX_METADATA_BYTES
from tasks.curation.sources.captions.metadata_files import Listed, is_metadata
from tasks.curation.sources.captions.pairing import Rivals, fold, key_of, pair
from tasks.curation.sources.file_trees import HIDDEN, LINK, NOT_A_FILE, FileTree
from tasks.curation.sources.folder import caption_folders
from tasks.curation.sources.tar_format import Forward, Member, TarError

BEHIND_THE_END = "data behind the end of a tar"
DEAD_LINK = "hard link to no member"


class Sample(NamedTuple):
    """An image of a tar. place: its name inside the tar, with #2 for the second of that name."""

    image: Member
    place: str
    texts: list[Member]
    captions: list[str]
    problem: str
    detail: str


NO_COLUMN = "\0"  # beginning of the detail of a sample whose table has no captions


Beside = dict[
    str, tuple[list[str], str, str]
]  # place of an image -> captions, problem and detail of tables next to the tar


def samples(shown: str, file: BinaryIO, options: Options, account: Account) -> list[Sample]:
    """The images of a tar in the order of the archive; reads headers and metadata files, forward only.

    Raises:
        ValueError: the tar or a metadata file in it is broken; the message names it.
    """
    with named_errors(shown):
        files, tables = _index(Forward(file), account, shown)
    folders: dict[str, list[Member]] = {}
    for member in files:
        folders.setdefault(posixpath.dirname(_plain(member.name)), []).append(member)
    inside = _folders_inside(folders) if tables else {}
    with Listed(options.encoding, options.caption_columns) as listed:
        for member, data in tables:
            folder = posixpath.dirname(_plain(member.name))
            name = f"{shown}:{visible(member.name)}"
            own = base_name(shown).partition(".")[0]
            kind = extension(member.name)
            if listed.add(name, folder, inside.get(folder, ()), kind, io.BytesIO(data), own):
                account.use()
            else:
                account.skip(reason_of(member.name), name)
        loose: dict[str, list[Member]] = {}
        images = [
            sample
            for folder, members in folders.items()
            for sample in _of_folder(shown, members, options, listed, account, loose.setdefault(folder, []))
        ]
        listed.finish(account)
    images = _with_parallel(shown, images, loose, options, account)
    return sorted(images, key=lambda sample: (sample.image.offset, sample.place))


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


def _is_hidden(name: str) -> bool:
    if not name.startswith(".") and "/." not in name:
        return False
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _index(stream: Forward, account: Account, shown: str) -> tuple[list[Member], list[tuple[Member, bytes]]]:
    """The images, the text files, and the metadata files with their content."""
    files: list[Member] = []
    tables: list[tuple[Member, bytes]] = []
    by_name: dict[str, Member] = {}
    table_bytes = 0
    for member in tar_format.members(stream):
        at = f"{shown}:{member.name}"
        base = base_name(member.name)
        if member.kind == "folder":
            continue
        if member.kind == "rest":
            account.skip(BEHIND_THE_END, f"{shown} at byte {member.offset:,}")
            continue
        if member.kind == "hard link":
            target = by_name.get(_plain(member.link))
            if target is None:
                account.skip(DEAD_LINK, at)
                continue
            member = member._replace(size=target.size, offset=target.offset, kind="file")
        if member.kind != "file":
            account.skip(LINK if member.kind == "symbolic link" else NOT_A_FILE, at)
            continue
        by_name[_plain(member.name)] = member
        if _is_hidden(member.name):
            account.skip(HIDDEN, at)
        elif is_metadata(base, ()) and member.offset == stream.position:
            table_bytes += member.size
            if table_bytes > MAX_METADATA_BYTES:
                raise TarError(
                    f"its metadata files have more than {MAX_METADATA_BYTES // 2**20} MiB; put them next to it"
                )
            tables.append((member, stream.read(member.size)))
        elif is_image(base) or extension(base) in SIDECAR_EXTENSIONS:
            files.append(member)
        else:
            account.skip(reason_of(base), at)
    return files, tables


def _of_folder(
    shown: str, members: list[Member], options: Options, listed: Listed, account: Account, loose: list[Member]
) -> Iterator[Sample]:
    """The images of one folder. Texts that describe none of them are added to `loose` and not counted."""
    names = [base_name(member.name) for member in members]
    pairs = pair(names, options.caption_columns)
    used = {i for one in pairs.values() for i in one.texts}
    for i, member in enumerate(members):
        if i not in pairs and i not in used:
            loose.append(member)
    account.use(len(pairs) + len(used))
    rivals = Rivals(_plain(members[i].name) for i in pairs)
    repeats: Counter = Counter()
    for i, one in pairs.items():
        member = members[i]
        path = _plain(member.name)
        repeats[member.name] += 1
        place = member.name + (f"#{repeats[member.name]}" if repeats[member.name] > 1 else "")
        captions, ambiguous, no_column = listed.match([path], rivals.of(path))
        why = one.ambiguous or ambiguous
        detail = f"{shown}:{visible(place)}: {why}" if why else ""
        if no_column and not one.texts and not captions and not why:
            detail = NO_COLUMN + no_column  # unless a parallel folder has its captions
        yield Sample(member, place, [members[j] for j in one.texts], captions, AMBIGUOUS_CAPTION if why else "", detail)


def _with_parallel(
    shown: str, samples: list[Sample], loose: dict[str, list[Member]], options: Options, account: Account
) -> list[Sample]:
    """The samples, with captions of a parallel folder if they have none; counts the texts of `loose`."""
    bare: dict[str, list[int]] = {}
    if any(loose.values()):
        for at, sample in enumerate(samples):
            if not sample.texts and not sample.captions and not sample.problem:
                bare.setdefault(posixpath.dirname(_plain(sample.image.name)), []).append(at)
    by_key: dict[str, dict[str, list[Member]]] = {}  # folder -> key -> texts
    spellings: dict[str, list[str]] = {}
    for folder, texts in loose.items():
        for text in texts:
            by_key.setdefault(folder, {}).setdefault(fold(key_of(base_name(text.name))), []).append(text)
        if texts:
            spellings.setdefault(fold(folder), []).append(folder)
    used: set[str] = set()
    for folder, images in bare.items():
        sources: dict[int, list[tuple[str, list[Member], str]]] = {}
        keys = dict.fromkeys(fold(key_of(base_name(samples[at].image.name))) for at in images)
        for path in caption_folders(folder, options.captions_folder):
            same = [path] if path in by_key else spellings.get(fold(path), [])
            texts = [text for key in keys for text in by_key[same[0]].get(key, ())] if len(same) == 1 else []
            if not texts:
                continue
            names = [base_name(samples[at].image.name) for at in images] + [base_name(text.name) for text in texts]
            for i, one in pair(names, options.caption_columns).items():
                if one.texts or one.ambiguous:
                    own = [texts[j - len(images)] for j in one.texts]
                    sources.setdefault(images[i], []).append((same[0], own, one.ambiguous))
        for at, candidates in sources.items():
            used.update(text.name for _, texts, _ in candidates for text in texts)
            _, texts, why = candidates[0]
            if len(candidates) > 1:
                why = f"{' and '.join(visible(other) for other, _, _ in candidates[:2])} both have captions of it"
            problem, detail = (AMBIGUOUS_CAPTION, f"{shown}:{visible(samples[at].place)}: {why}") if why else ("", "")
            samples[at] = samples[at]._replace(texts=texts, problem=problem, detail=detail)
    for sample in samples:
        if sample.detail.startswith(NO_COLUMN):
            raise ValueError(sample.detail.removeprefix(NO_COLUMN))
    for texts in loose.values():
        for text in texts:
            if text.name in used:
                account.use()
            else:  # including texts that could describe several images
                account.skip(reason_of(text.name), f"{shown}:{text.name}")
    return samples


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
        for sample in samples(shown, file, options, account):
            account.records += 1
            yield _record(name, locator, file, sample, options, beside.get(sample.place, ([], "", "")))


def _record(
    name: str, locator: str, file: BinaryIO, sample: Sample, options: Options, beside: tuple[list[str], str, str]
) -> Record:
    captions, not_text, no_column = sample.captions + beside[0], "", ""
    problem, detail = (sample.problem, sample.detail) if sample.problem else beside[1:]
    for text in sample.texts:
        try:
            data = _bytes_of(file, text, MAX_JSON_BYTES + 1)
            own = sidecar_captions(text.name, data, options.encoding, options.caption_columns)
            captions = captions + own
            if not own and (why := without_column(text.name, data, options.encoding, options.caption_columns)):
                no_column = f"{locator}:{visible(text.name)} {why}"
        except NotTextError as error:
            not_text = f"{locator}:{visible(text.name)} {error}"
        except CaptionError as error:
            problem, detail = UNREADABLE_CAPTION, f"{locator}:{visible(text.name)} {error}"
    if not_text and not captions and not problem:
        problem, detail = UNREADABLE_CAPTION, not_text
    if not captions and not problem:
        detail = no_column
    data, ext = b"", extension(sample.image.name)
    if sample.image.size > MAX_IMAGE_BYTES:
        problem = UNREADABLE_FILE
        detail = f"{locator}:{visible(sample.place)} is larger than {MAX_IMAGE_BYTES // 2**20} MiB"
    else:
        data = _bytes_of(file, sample.image, sample.image.size)
    if problem:
        captions = []
    captions = list(dict.fromkeys(captions))
    return Record(
        record_key(name, sample.place),
        data,
        ext,
        captions,
        "user",
        f"{locator}:{visible(sample.place)}",
        0,
        problem,
        detail,
    )


def _bytes_of(file: BinaryIO, member: Member, limit: int) -> bytes:
    size = min(member.size, limit)
    file.seek(member.offset)
    data = file.read(size)
    if len(data) < size:
        raise TarError(f"it is cut off in {member.name!r}")
    return data
