"""Container formats on `Archive`: what a hostile or broken file inside one does."""

from __future__ import annotations

import functools
import io
import zipfile

import pytest

from tasks.curation.sources import archives, base
from tasks.curation.sources.archives import Archive
from tasks.curation.sources.file_trees import at


class Zip(Archive):
    def members(self, file):
        archive = zipfile.ZipFile(file)
        return {name: functools.partial(archive.open, name) for name in archive.namelist()}


def records(folder, files: dict[str, bytes], damage=None, options=base.Options()):
    """The records of a zip of these files, by the name inside, and the account."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = buffer.getvalue()
    (folder / "x.zip").write_bytes(damage(data) if damage else data)
    account = base.Account()
    read = list(Zip().read(at(str(folder)), "x.zip", options, account))
    account.check()
    assert account.records == len(read)
    return {record.locator.partition(":")[2]: record for record in read}, account


def test_texts_are_paired_with_images_folder_by_folder_and_everything_is_counted(tmp_path):
    files = {
        "a.png": b"1", "a.txt": b"one\nfirst", "b/a.png": b"2", "b/a.json": b'{"caption": "two"}', "b/": b"",
        "c.png": b"3", "d.txt": b"of no image", "notes.doc": b"", "__MACOSX/._a.png": b"resource fork", ".hidden/e.png": b"4",
    }  # fmt: skip
    read, account = records(tmp_path, files)
    assert {name: (record.data, record.captions) for name, record in read.items()} == {
        "a.png": (b"1", ["one", "first"]), "b/a.png": (b"2", ["two"]), "c.png": (b"3", []),
    }  # fmt: skip
    assert not any(record.problem for record in read.values())
    assert (account.seen, account.used) == (9, 5)
    skipped = {reason: count for reason, (count, _) in account.skipped.items()}
    assert skipped == {"hidden": 2, ".doc": 1, ".txt": 1}
    with open(tmp_path / "x.zip", "rb") as file:
        assert Zip().scan("x.zip", file, ()) == (3, [])


def test_keys_depend_on_the_names_alone(tmp_path):
    few, _ = records(tmp_path, {"b.png": b"2"})
    many, _ = records(tmp_path, {"a.png": b"1", "b.png": b"2", "c/b.png": b"2"})
    assert few["b.png"].key == many["b.png"].key and len({record.key for record in many.values()}) == 3


def test_one_member_that_cannot_be_read_costs_its_own_record_and_is_named(tmp_path):
    files = {
        "a.png": b"A" * 64,
        "a.txt": b"one",
        "b.png": b"B" * 64,
        "b.txt": b"C" * 64,
        "c.png": b"3",
        "c.txt": b"\xff",
    }
    read, _ = records(tmp_path, files, lambda data: data.replace(b"A" * 64, b"X" * 64).replace(b"C" * 64, b"Y" * 64))
    assert [read[name].problem for name in ("a.png", "b.png", "c.png")] == [
        base.UNREADABLE_FILE, base.UNREADABLE_CAPTION, base.UNREADABLE_CAPTION,
    ]  # fmt: skip
    assert read["a.png"].detail.startswith("x.zip:a.png cannot be read: Bad CRC-32") and read["a.png"].data == b""
    assert read["a.png"].captions == []
    assert read["b.png"].detail.startswith("x.zip:b.txt cannot be read") and read["b.png"].captions == []
    assert read["c.png"].detail.startswith("x.zip:c.txt is not UTF-8")


def test_no_more_than_the_limit_is_read_of_a_member_that_unpacks_to_more(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_IMAGE_BYTES", 1000)
    asked = []

    class Measured(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    class Bomb(Archive):
        def members(self, file):
            return {"a.png": lambda: Measured(bytes(10**6)), "b.png": lambda: Measured(bytes(1000))}

    (tmp_path / "x.bomb").write_bytes(b"")
    read = list(Bomb().read(at(str(tmp_path)), "x.bomb", base.Options(), base.Account()))
    assert asked == [1001, 1001]
    assert [(record.problem, len(record.data)) for record in read] == [(base.UNREADABLE_FILE, 0), ("", 1000)]


def test_two_images_that_one_text_may_describe_get_no_caption(tmp_path):
    read, _ = records(tmp_path, {"a.png": b"1", "a.PNG": b"2", "a.txt": b"which?"})
    assert {record.problem for record in read.values()} == {base.AMBIGUOUS_CAPTION}


def test_a_text_of_a_file_that_is_left_out_is_of_no_other_image(tmp_path):
    read, account = records(tmp_path, {"a.mp4": b"0", "a.txt": b"the film", "a.frame0.png": b"1", "b.png": b"2"})
    assert {name: record.captions for name, record in read.items()} == {"a.frame0.png": [], "b.png": []}
    assert account.skipped == {".mp4": (1, "x.zip:a.mp4"), "text of a file that is left out": (1, "x.zip:a.txt")}


def test_a_caption_that_is_no_text_is_an_error_only_if_there_is_no_other(tmp_path):
    files = {"a.png": b"1", "a.json": b'{"caption": 7}', "b.png": b"2", "b.json": b'{"caption": 7}', "b.txt": b"two"}
    read, _ = records(tmp_path, files)
    assert read["a.png"].problem == base.UNREADABLE_CAPTION and not read["b.png"].problem
    assert read["b.png"].captions == ["two"]


def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"x\.zip cannot be read: File is not a zip file"):
        list(Zip().read(at(str(tmp_path)), "x.zip", base.Options(), base.Account()))
