"""Random sources with random defects: all of their content is accounted for, and a kept caption is the one that its
owner wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from source_files import picture, read_records, tar_of, write

from tasks.curation.captions import clean_captions

PICTURES = [picture(i) for i in range(4)]
EXAMPLES, PHASES = 25, (Phase.explicit, Phase.generate)  # shrinking takes minutes, and the example is small
SETTINGS = settings(
    max_examples=EXAMPLES, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

# Letters that differ in Unicode form, in case, in script; blanks and dots inside names.
names = st.text("aAbé1_ -.ß中", min_size=1, max_size=6).filter(lambda text: text.strip(" .") and text[0] not in ". ")
folders = st.sampled_from(["", "sub/", "sub/deep/", "train/"])
# Any text without surrogates, controls and ends of lines, which would make several captions of one.
words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30).filter(str.strip)
bad_text = st.sampled_from([b"\xff\xfe\x00\xd8", b"caf\xe9", b"a\0b", "boats".encode("utf-16-le")])
junk = st.sampled_from(
    [
        "x.psd",
        "y.zip",
        "README",
        "stray.TXT",
        ".DS_Store",
        "z.jxl",
        "._a.png",
        "a.cls",
        "b.xmp",
        "A.jxl",
        "a.b.mp4",
        "A.html",
        "a.b.vob",
        "1",
    ]
)
twins = st.sampled_from([None, None, None, "jxl", "mp4", "CR2", "link", "vob", "docx", "made-up"])


@st.composite
def samples(draw, count=6):
    """(path without extension, picture, caption or bytes that are none, extension of the caption's file, extension of a
    file that is left out and has the caption's name)."""
    paths = draw(st.lists(st.tuples(folders, names).map("".join), min_size=1, max_size=count, unique_by=_plain))
    kinds = st.one_of(words, words, words, st.none(), bad_text)
    return [(path, draw(st.sampled_from(PICTURES)), draw(kinds), draw(st.sampled_from(["txt", "json", "caption"])), draw(twins)) for path in paths]  # fmt: skip


def _plain(path):
    """The WebDataset key of a name; a sample's are unique, so that every caption has one owner."""
    folder, _, name = path.rpartition("/")
    return folder, unicodedata.normalize("NFC", name[: name.find(".", 1) if "." in name[1:] else None].casefold())


def text_file(caption, ext):
    if isinstance(caption, bytes):
        return caption
    return json.dumps({"text": caption}) if ext == "json" else caption


def sample_files(drawn):
    """Files (None for links), and the expected captions of each picture: a list, or a problem. If a file that is left out
    has the name of the text, the text is of that file, and the picture has another name."""
    files, expected = {}, {}
    for path, data, caption, ext, twin in drawn:
        image = f"{path}.frame0.png" if twin else f"{path}.png"
        files[image] = data
        expected[image] = [caption.strip()] if isinstance(caption, str) and not twin else []
        if isinstance(caption, bytes) and not twin:
            expected[image] = "unreadable_caption"
        if caption is not None:
            files[f"{path}.{ext}"] = text_file(caption, ext)
        if twin:
            files[f"{path}.png" if twin == "link" else f"{path}.{twin}"] = None if twin == "link" else b"x"
    return files, expected


def _link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere.png"
    return info


def outcome(records):
    """Locator -> captions or problem; checks that what curation keeps of a caption is all of it."""
    for record in records:
        assert clean_captions(record.captions) == as_kept(record.captions)
    return {record.locator: record.problem or record.captions for record in records}


def as_kept(captions):
    """NFC, single blanks, without characters that show nothing, and without repeats."""
    hidden = "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    kept = [" ".join(re.sub(hidden, "", unicodedata.normalize("NFC", text)).split()) for text in captions]
    return [text for i, text in enumerate(kept) if text and text.casefold() not in map(str.casefold, kept[:i])]


@SETTINGS
@given(samples(), st.lists(st.tuples(folders, junk).map("".join), max_size=5, unique=True), st.integers(0, 3), st.randoms(use_true_random=False))  # fmt: skip
def test_loose_files_in_whatever_order_they_were_written(drawn, others, links, random):
    files, expected = sample_files(drawn)
    others = [name for name in others if name not in files]
    with tempfile.TemporaryDirectory() as scratch:
        linked = [name for name, data in files.items() if data is None] + [f"link{i}.png" for i in range(links)]
        files = {name: data for name, data in files.items() if data is not None}
        root = write(Path(scratch) / "source", {**files, **dict.fromkeys(others, b"x")})
        _link_all(root, linked)
        records, account = read_records(root)
        assert account.seen == sum(len(actual) for _, _, actual in os.walk(root)), "every file is seen once"
        assert len(records) == len(expected)
        assert outcome(records) == expected
        assert {record.locator: record.data for record in records} == {n: d for n, d in files.items() if n in expected}
        shuffled = [*files.items(), *dict.fromkeys(others, b"x").items()]
        random.shuffle(shuffled)
        second_root = Path(scratch) / "again"
        _link_all(second_root, linked)
        again, second = read_records(write(second_root, dict(shuffled)))
        assert [record._replace(detail="") for record in again] == [record._replace(detail="") for record in records]
        assert second == account


def _link_all(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to("/etc/hostname")


@SETTINGS
@given(samples(), st.lists(junk, max_size=4, unique=True), st.randoms(use_true_random=False), st.sampled_from(["w", "w:gz", "w:xz"]), st.lists(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]), max_size=3))  # fmt: skip
def test_tars_in_any_order_of_their_members(drawn, others, random, mode, links):
    files, expected = sample_files(drawn)
    others = [name for name in others if name not in files]
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for order in range(2):
            members = list({**files, **dict.fromkeys(others, b"x")}.items())
            members = [(_link(name, tarfile.LNKTYPE) if data is None else name, data or b"") for name, data in members]
            members += [(_link(f"link{i}.png", kind), b"") for i, kind in enumerate(links)]
            if order:
                random.shuffle(members)
            path = tar_of(Path(scratch) / "x.tar", members, mode, tarfile.PAX_FORMAT)
            records, account = read_records(path)
            assert account.seen == 1 + len(members), "the tar and its members"
            assert account.records == len(expected) and account.seen - account.used >= len(links)
            outcomes.append(outcome(records))
    assert outcomes[0] == outcomes[1] == {f"x.tar:{name}": value for name, value in expected.items()}


@SETTINGS
@given(st.lists(st.tuples(st.one_of(st.sampled_from(PICTURES), st.none()), st.one_of(words, st.none(), st.lists(words, max_size=3))), min_size=1, max_size=12), st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([0, 0, 1, 2, 3]), st.randoms(use_true_random=False))  # fmt: skip
def test_parquet_rows_in_any_order(rows, row_group_size, as_structs, as_lists, empty_every, random):
    if all(image is None for image, _ in rows):
        rows = [*rows, (PICTURES[0], "one")]
    kind, cell = pa.binary(), lambda image: image
    if as_structs:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cell = lambda image: {"bytes": image, "path": "x.png"}  # noqa: E731
    if as_lists:
        inner, kind = cell, pa.list_(kind)
        cell = lambda image: [inner(image)]  # noqa: E731
    texts = [[text] if isinstance(text, str) else text for _, text in rows]
    table = pa.table({"image": pa.array([cell(image) for image, _ in rows], kind), "text": pa.array(texts, pa.list_(pa.string()))})  # fmt: skip
    order = list(range(len(rows)))
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as scratch:
        _write_groups(table, Path(scratch) / "x.parquet", row_group_size, empty_every)
        records, account = read_records(scratch, images_per_shard=row_group_size)
        _write_groups(table.take(order), Path(scratch) / "x.parquet", row_group_size, empty_every)
        shuffled, _ = read_records(scratch, images_per_shard=row_group_size)
    assert account.seen == 1 + len(rows)
    assert account.records + account.to_json()["skipped"].get("row without image bytes", [0])[0] == len(rows)
    where = {f"x.parquet:{new}": f"x.parquet:{old}" for new, old in enumerate(order)}
    assert {where[locator]: value for locator, value in outcome(shuffled).items()} == outcome(records)
    expected = {
        f"x.parquet:{i}": list(dict.fromkeys(text.strip() for text in (texts[i] or [])))
        for i, (image, _) in enumerate(rows)
        if image is not None
    }
    assert outcome(records) == expected
    assert [record.data for record in records] == [image for image, _ in rows if image is not None]


def _write_groups(table, path, row_group_size, empty_every):
    """Writes row groups, and one without rows before every so many of them and at the end; none for 0."""
    with pq.ParquetWriter(path, table.schema) as writer:
        for i, at in enumerate(range(0, len(table), row_group_size)):
            if empty_every and i % empty_every == 0:
                writer.write_table(table.slice(0, 0))
            writer.write_table(table.slice(at, row_group_size))
        if empty_every:
            writer.write_table(table.slice(0, 0))


# NUL and escapes are signs of another encoding: such captions are rejected.
any_line = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\x1b"), max_size=40)


@SETTINGS
@given(st.lists(any_line, min_size=1, max_size=8), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]), st.randoms(use_true_random=False))  # fmt: skip
def test_metadata_files_give_whole_captions_in_any_format_and_order(captions, format, random):
    rows = [(f"{i}.png", text) for i, text in enumerate(captions)]
    random.shuffle(rows)
    with tempfile.TemporaryDirectory() as scratch:
        root = write(Path(scratch), {name: PICTURES[0] for name, _ in rows})
        if format in ("csv", "tsv"):
            buffer = io.StringIO(newline="")
            csv.writer(buffer, delimiter="\t" if format == "tsv" else ",", quoting=csv.QUOTE_ALL).writerows([("file_name", "text"), *rows])  # fmt: skip
            content = buffer.getvalue()
        elif format == "parquet":
            table = pa.table([list(c) for c in zip(*rows)], names=["file_name", "text"])
            _write_groups(table, root / "metadata.parquet", 3, random.randrange(3))
            content = None
        else:
            dicts = [{"file_name": name, "text": text} for name, text in rows]
            content = json.dumps(dicts, ensure_ascii=False) if format == "json" else "\n".join(map(json.dumps, dicts))
        if content is not None:
            write(root, {f"metadata.{format}": content})
        records, account = read_records(root)
    assert account.seen == len(rows) + 1 and not account.skipped
    assert outcome(records) == {f"{i}.png": [text.strip()] if text.strip() else [] for i, text in enumerate(captions)}


@SETTINGS
@given(st.lists(words, min_size=2, max_size=6), st.data())
def test_a_csv_with_a_broken_quote_or_comma_is_an_error_or_whole(captions, data):
    """Lost or added characters in a CSV never shorten a caption silently: it is whole, or refused."""
    buffer = io.StringIO(newline="")
    rows = [(f"{i}.png", text.replace('"', "'")) for i, text in enumerate(captions)]
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("file_name", "text"), *rows])
    content = buffer.getvalue()
    quotes = [i for i, c in enumerate(content) if c == '"']
    at = data.draw(st.sampled_from(quotes[4:]))
    broken = content[:at] + content[at + 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), {**{name: PICTURES[0] for name, _ in rows}, "metadata.csv": broken})
        try:
            records, _ = read_records(scratch)
        except ValueError as error:
            assert "metadata.csv" in str(error)
            return
    for record in records:
        own = rows[int(record.locator[:-4])][1].strip()
        assert record.problem or not record.captions or own in (record.captions[0], record.captions[0].strip('"'))


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(["", " "]), words, st.sampled_from(["", " "]), words), min_size=1, max_size=12), st.sampled_from(",;"), st.sampled_from([("file_name", "text", "author"), ("author", "text", "file_name"), ("file_name", "author", "text")]))  # fmt: skip
def test_a_csv_with_quotes_only_where_they_are_needed_is_read_and_its_captions_are_whole(rows, delimiter, columns):
    cells = [dict(file_name=f"{i}.png", text=before + text, author=blank + author) for i, (before, text, blank, author) in enumerate(rows)]  # fmt: skip
    buffer = io.StringIO(newline="")
    table = csv.DictWriter(buffer, columns, delimiter=delimiter)
    table.writeheader()
    table.writerows(cells)
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), {row["file_name"]: PICTURES[0] for row in cells} | {"metadata.csv": buffer.getvalue()})
        records, _ = read_records(scratch)
    for record in records:
        row = cells[int(record.locator[:-4])]
        doubtful = columns.index("author") == columns.index("text") + 1 and row["author"][:1].isspace()
        assert record.captions == [row["text"].strip()] or (doubtful and record.problem == "unreadable_caption")
