"""Container formats on `Archive`: what a hostile or broken file inside one does."""

from __future__ import annotations

import functools
import io
import zipfile

import pytest

from tasks.curation.sources import archives, base, tar_format, tars
from tasks.curation.sources.archives import Archive
from tasks.curation.sources.file_trees import at


class Zip(Archive):
    def members(self, file):
        archive = zipfile.ZipFile(file)
        return [(info.filename, functools.partial(archive.open, info)) for info in archive.infolist()]


def records(folder, files, damage=None, options=base.Options()):
    """The records of a zip of these files (a dict, or pairs with repeats), by the name inside, and the account."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
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
        assert Zip().scan("x.zip", file, ()) == (3, [], "")


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
            return [("a.png", lambda: Measured(bytes(10**6))), ("b.png", lambda: Measured(bytes(1000)))]

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


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_are_records_of_their_own_without_a_guessed_caption(tmp_path):
    members = [
        ("a.png", b"1"),
        ("a.txt", b"which"),
        ("b.png", b"x"),
        ("a.png", b"2"),
        ("c.txt", b"x"),
        ("c.txt", b"y"),
        ("c.png", b"3"),
    ]
    read, account = records(tmp_path, members)
    assert {name: (record.data, record.problem) for name, record in read.items()} == {
        "a.png": (b"1", base.AMBIGUOUS_CAPTION), "b.png": (b"x", ""),
        "a.png#2": (b"2", base.AMBIGUOUS_CAPTION), "c.png": (b"3", base.AMBIGUOUS_CAPTION),
    }  # fmt: skip
    assert account.seen == len(members) and len({record.key for record in read.values()}) == 4


def test_folders_of_captions_and_metadata_files_are_read_as_in_a_tar(tmp_path):
    files = {
        "images/x/a.png": b"1", "captions/x/a.txt": b"apart", "captions/x/b.txt": b"of no image",
        "t/metadata.csv": b"file_name,text\nc.png,of a row\ngone.png,x\n", "t/c.png": b"3",
        "p/metadata.png": b"4", "p/metadata.json": b'{"text": "of the picture"}',
        "v/clip.mp4": b"", "v/clip.txt": b"of the video", "v/clip.f0.png": b"5",
    }  # fmt: skip
    read, account = records(tmp_path, files)
    assert {name: record.captions for name, record in read.items()} == {
        "images/x/a.png": ["apart"], "t/c.png": ["of a row"], "p/metadata.png": ["of the picture"], "v/clip.f0.png": [],
    }  # fmt: skip
    assert {reason: count for reason, (count, _) in account.skipped.items()} == {
        ".mp4": 1, ".txt": 1, "metadata row that names no image": 1, base.TEXT_OF_LEFT_OUT: 1,
    }  # fmt: skip
    options = base.Options(captions_folder="texts/deep")
    read, _ = records(tmp_path, {"a.png": b"1", "texts/deep/a.txt": b"configured"}, options=options)
    assert read["a.png"].captions == ["configured"]


@pytest.mark.parametrize("table", [b"file_name,text\na.png,a,b\n", b"A" * 64])
def test_a_broken_metadata_file_inside_is_refused_by_its_name(tmp_path, table):
    files = {"a.png": b"1", "s/metadata.csv": table}
    with pytest.raises(ValueError, match=r"x\.zip:s/metadata\.csv(, line 2,| cannot be read: Bad CRC)"):
        records(tmp_path, files, lambda data: data.replace(b"A" * 64, b"B" * 64))


def test_metadata_files_over_their_limit_are_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_METADATA_BYTES", 2 * 2**20)
    table = b"file_name,text\n" + b"\n" * 2**20
    files = {"a.png": b"1", "s/metadata.csv": table}
    assert len(records(tmp_path, files)[0]) == 1
    with pytest.raises(ValueError, match=r"x\.zip: its metadata files have more than 2 MiB"):
        records(tmp_path, files | {"t/metadata.csv": table})


def test_an_archive_over_a_limit_is_refused_by_its_name(tmp_path, monkeypatch):
    files = {f"{i}.png": bytes(1000) for i in range(5)}
    assert len(records(tmp_path, files)[0]) == 5
    for module, name, value, why in (
        (base, "MAX_CONTAINER_BYTES", 100, "is larger than"),
        (tar_format, "MAX_MEMBERS", 4, "more than 4 members"),
        (tar_format, "MAX_NAMES_BYTES", 20, "of names"),
        (tar_format, "MAX_NAME_BYTES", 4, "a name of 5 bytes"),
        (archives, "MAX_CONTAINER_BYTES", 4999, "unpacks to more than"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            with pytest.raises(ValueError, match=rf"x\.zip .*{why}"):
                records(tmp_path, files)
            if module is tar_format:
                with pytest.raises(ValueError, match=why), open(tmp_path / "x.zip", "rb") as file:
                    Zip().scan("x.zip", file, ())
    monkeypatch.setattr(archives, "RATIO_FREE_BYTES", 100)
    monkeypatch.setattr(archives, "MAX_RATIO", 1)
    with pytest.raises(ValueError, match=r"x\.shared unpacks to more than"):  # members that share their bytes
        (tmp_path / "x.shared").write_bytes(bytes(1000))

        class Shared(Archive):
            def members(self, file):
                return [(f"{i}.png", lambda: io.BytesIO(bytes(600))) for i in range(2)]

        list(Shared().read(at(str(tmp_path)), "x.shared", base.Options(), base.Account()))
