"""A text or row belongs to its nearest image of the whole source, or to none: never to two pictures."""

from __future__ import annotations

import io
import resource
import tarfile
import unicodedata
from pathlib import Path

import pytest
from source_files import captions_in, left_out, picture, read_records, tar_of, write

from tasks.curation.sources import base
from tasks.curation.sources.captions.listed import Listed
from tasks.curation.sources.captions.parallel import ParallelTexts

PNG = picture()
AMBIGUOUS = "ambiguous_caption"
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def rows(*pairs) -> str:
    return "file_name,text\n" + "".join(f'"{name}",{text}\n' for name, text in pairs)


LOOSE = {
    "folders that differ in case, each with its row": (
        {"train/a.png": PNG, "Train/a.png": PNG, "metadata.csv": rows(("train/a.png", "low"), ("Train/a.png", "high"))},
        {"train/a.png": ["low"], "Train/a.png": ["high"]},
    ),
    "folders that differ in case, and a row of one": (
        {"train/a.png": PNG, "Train/a.png": PNG, "metadata.csv": rows(("Train/a.png", "high"))},
        {"train/a.png": [], "Train/a.png": ["high"]},
    ),
    "folders that differ in case, and a row that is neither": (
        {"train/a.png": PNG, "Train/a.png": PNG, "metadata.csv": rows(("TRAIN/a.png", "whose"))},
        {"train/a.png": AMBIGUOUS, "Train/a.png": AMBIGUOUS},
    ),
    "folders that differ in Unicode form, each with its row": (
        {f"{NFC}/a.png": PNG, f"{NFD}/a.png": PNG, "metadata.csv": rows((f"{NFC}/a.png", "one"), (f"{NFD}/a.png", "two"))},
        {f"{NFC}/a.png": ["one"], f"{NFD}/a.png": ["two"]},
    ),
    "one image, and rows that differ in case: the equal one": (
        {"a.png": PNG, "metadata.csv": rows(("A.png", "of a lost image"), ("a.png", "own"))},
        {"a.png": ["own"]},
    ),
    "one image, and two rows that are equally far": (
        {"Ab.png": PNG, "b.png": PNG, "metadata.csv": rows(("AB.png", "one"), ("ab.png", "two"), ("b.png", "b"))},
        {"Ab.png": AMBIGUOUS, "b.png": ["b"]},
    ),
    "a backslash in a name and in a folder's place": (
        {"img/a.png": PNG, "img\\a.png": PNG, "metadata.csv": rows(("img/a.png", "slash"), ("img\\a.png", "backslash"))},
        {"img/a.png": ["slash"], "img\\a.png": ["backslash"]},
    ),
    "a row of the folder does not name the file with a backslash": (
        {"img/a.png": PNG, "img\\a.png": PNG, "metadata.csv": rows(("img/a.png", "slash"))},
        {"img/a.png": ["slash"], "img\\a.png": []},
    ),
    "rows with backslashes prefer the equal case": (
        {"img/a.png": PNG, "Img/A.png": PNG, "metadata.csv": rows(("Img\\A.png", "upper"), ("img\\a.png", "lower"))},
        {"img/a.png": ["lower"], "Img/A.png": ["upper"]},
    ),
    "names with blanks around, each with its row": (
        {"a.png": PNG, " a.png": PNG, "metadata.csv": rows((" a.png", "blank"), ("a.png", "none"))},
        {"a.png": ["none"], " a.png": ["blank"]},
    ),
    "a row with blanks around names the only image": ({"a.png": PNG, "metadata.csv": rows((" a.png ", "own"))}, {"a.png": ["own"]}),
    "a row with the folder in front, and the plain one": (
        {"train/a.png": PNG, "train/metadata.csv": rows(("other/train/a.png", "other"), ("a.png", "own"))},
        {"train/a.png": ["own"]},
    ),
    "two rows with different folders in front": (
        {"train/a.png": PNG, "train/metadata.csv": rows(("x/train/a.png", "one"), ("y/train/a.png", "two"))},
        {"train/a.png": AMBIGUOUS},
    ),
    "a path that repeats the folder's name": (
        {"train/a.png": PNG, "train/train/a.png": PNG, "train/metadata.csv": rows(("/x/train/train/a.png", "which"))},
        {"train/a.png": AMBIGUOUS, "train/train/a.png": AMBIGUOUS},
    ),
    "one image, and texts that differ in case: the equal one": (
        {"a.png": PNG, "A.txt": "of a lost image", "a.txt": "own"},
        {"a.png": ["own"]},
    ),
    "one image, and two texts that are equally far": ({"Ab.png": PNG, "AB.txt": "one", "ab.txt": "two"}, {"Ab.png": AMBIGUOUS}),
    "texts that differ in the case of their extension": ({"a.png": PNG, "a.txt": "one", "a.TXT": "two"}, {"a.png": AMBIGUOUS}),
    "an image keeps its own text, and the other image does not get what is left": (
        {"é.png": PNG, "É.png": PNG, "é.txt": "own", f"{unicodedata.normalize('NFD', 'é')}.TXT": "form", "x.png": PNG},
        {"é.png": ["own"], "É.png": [], "x.png": []},
    ),
    "a text of a key is of none of two images, though one has its own": (
        {"a.image.png": PNG, "a.rgb.png": PNG, "a.rgb.txt": "left", "a.txt": "which"},
        {"a.rgb.png": ["left"], "a.image.png": AMBIGUOUS},
    ),
    "a name with two extensions, and a text of one": (
        {"a.jpg": PNG, "a.jpg.png": PNG, "a.jpg.txt": "which"},
        {"a.jpg": AMBIGUOUS, "a.jpg.png": AMBIGUOUS},
    ),
    "two formats, one with a text of its full name": (
        {"a.jpg": PNG, "a.png": PNG, "a.jpg.txt": "of the jpg", "a.txt": "of the png"},
        {"a.jpg": ["of the jpg"], "a.png": ["of the png"]},
    ),
    "two pictures of one format": (
        {"a.jpg": PNG, "a.jpeg": PNG, "a.txt": "which", "b.tif": PNG, "b.jpg": PNG, "b.txt": "one in two formats"},
        {"a.jpg": AMBIGUOUS, "a.jpeg": AMBIGUOUS, "b.tif": ["one in two formats"], "b.jpg": ["one in two formats"]},
    ),
    "one image with texts of both names": (
        {"a.jpg": PNG, "a.jpg.json": '{"text": "json"}', "a.txt": "tags"},
        {"a.jpg": ["json", "tags"]},
    ),
    "two folders of images and one folder of captions": (
        {"images/a.png": PNG, "photos/a.png": PNG, "photos/b.png": PNG, "captions/a.txt": "whose", "captions/b.txt": "b"},
        {"images/a.png": AMBIGUOUS, "photos/a.png": AMBIGUOUS, "photos/b.png": ["b"]},
    ),
    "two folders of images, one with its own text": (
        {"images/a.png": PNG, "images/a.txt": "own", "photos/a.png": PNG, "captions/a.txt": "whose"},
        {"images/a.png": ["own"], "photos/a.png": AMBIGUOUS},
    ),
    "a text beside its image is not of a parallel image": (
        {"photos/a.png": PNG, "photos/captions/a.png": PNG, "photos/captions/a.txt": "beside"},
        {"photos/a.png": [], "photos/captions/a.png": ["beside"]},
    ),
    "parallel folders that differ in case": (
        {"images/x/a.png": PNG, "images/X/a.png": PNG, "captions/x/a.txt": "low", "captions/X/a.txt": "high"},
        {"images/x/a.png": ["low"], "images/X/a.png": ["high"]},
    ),
    "parallel folders that differ in case, and one of captions": (
        {"images/x/a.png": PNG, "images/X/a.png": PNG, "captions/x/a.txt": "low"},
        {"images/x/a.png": ["low"], "images/X/a.png": []},
    ),
    "parallel folders that differ in Unicode form, and neither of captions": (
        {f"images/{NFC}/a.png": PNG, f"images/{NFD}/a.png": PNG, "captions/É/a.txt": "whose"},
        {f"images/{NFC}/a.png": AMBIGUOUS, f"images/{NFD}/a.png": AMBIGUOUS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOSE)
def test_a_text_or_row_is_of_its_nearest_image_or_of_none(tmp_path, case):
    files, expected = LOOSE[case]
    assert captions_in(write(tmp_path, files)) == expected
    read_records(tmp_path)  # which checks the account


@pytest.mark.parametrize(
    "case", [case for case, (files, _) in LOOSE.items() if not any("\\" in name for name in files)]
)
def test_a_tar_has_the_captions_of_its_files_in_a_folder(tmp_path, case):
    files, expected = LOOSE[case]
    tar_of(tmp_path / "x.tar", files)
    assert captions_in(tmp_path) == {f"x.tar:{name}": captions for name, captions in expected.items()}


def test_rows_that_are_farther_than_others_are_left_out_with_an_example(tmp_path):
    write(tmp_path, {"a.png": PNG, "metadata.csv": rows(("A.png", "lost"), ("a.png", "own")), "A.txt": "lost", "a.txt": "own"})  # fmt: skip
    assert captions_in(tmp_path) == {"a.png": ["own"]}
    _, account = read_records(tmp_path)
    assert account.skipped == {
        "metadata row that names no image": (1, "metadata.csv: A.png (line 2)"),
        ".txt": (1, "A.txt"),
    }


def test_one_configured_folder_of_captions_and_two_images_of_one_name(tmp_path):
    files = {"one/a.png": PNG, "two/a.png": PNG, "two/b.png": PNG, "texts/a.txt": "whose", "texts/b.txt": "b"}
    write(tmp_path, files | {"texts/two/c.txt": "mirrored", "texts/c.txt": "short", "two/c.png": PNG})
    assert captions_in(tmp_path, captions_folder="texts") == {
        "one/a.png": AMBIGUOUS,
        "two/a.png": AMBIGUOUS,
        "two/b.png": ["b"],
        "two/c.png": ["mirrored"],
    }
    assert left_out(tmp_path, captions_folder="texts") == {".txt": 2}


def test_a_row_of_a_repeated_member_is_of_neither(tmp_path):
    members = [("a.png", picture(1)), ("b.png", picture(2)), ("a.png", picture(3))]
    tar_of(tmp_path / "x.tar", members)
    write(tmp_path, {"metadata.csv": rows(("a.png", "whose"), ("b.png", "b"))})
    expected = {"x.tar:a.png": AMBIGUOUS, "x.tar:b.png": ["b"], "x.tar:a.png#2": AMBIGUOUS}
    assert captions_in(tmp_path) == expected
    (tmp_path / "metadata.csv").unlink()
    tar_of(tmp_path / "x.tar", [*members, ("metadata.csv", rows(("a.png", "whose"), ("b.png", "b")))])
    assert captions_in(tmp_path) == expected


def test_members_of_tars_that_differ_in_case_get_each_its_own_row(tmp_path):
    tar_of(tmp_path / "x.tar", {"a.png": PNG, "A.png": PNG, "s/b.png": PNG, "S/b.png": PNG})
    tar_of(tmp_path / "X.tar", {"a.png": PNG})
    write(tmp_path, {"metadata.csv": rows(("x/a.png", "low"), ("x/A.png", "high"), ("X/a.png", "X"), ("S/b.png", "S"))})
    assert captions_in(tmp_path) == {
        "x.tar:a.png": ["low"],
        "x.tar:A.png": ["high"],
        "X.tar:a.png": ["X"],
        "x.tar:s/b.png": [],
        "x.tar:S/b.png": ["S"],
    }


def test_a_row_of_a_loose_image_is_not_of_a_member_of_that_name(tmp_path):
    tar_of(tmp_path / "x.tar", {"a.png": picture(1), "b.png": picture(2)})
    tar_of(tmp_path / "y.tar", {"x/b.png": picture(3)})
    write(tmp_path, {"x/a.png": picture(4), "metadata.csv": rows(("x/a.png", "loose"), ("x/b.png", "whose"))})
    assert captions_in(tmp_path) == {
        "x.tar:a.png": [],
        "x.tar:b.png": AMBIGUOUS,
        "x/a.png": ["loose"],
        "y.tar:x/b.png": AMBIGUOUS,
    }


def test_an_ambiguous_record_names_the_texts_or_the_images_in_question(tmp_path):
    write(tmp_path, {"b.png": PNG, "b.PNG": PNG, "b.txt": "x", "Ab.png": PNG, "AB.txt": "x", "ab.txt": "x"})
    write(tmp_path, {"t/Cd.png": PNG, "t/metadata.csv": rows(("CD.png", "x"), ("cd.png", "y"))})
    details = {record.locator: record.detail for record in read_records(tmp_path)[0]}
    assert details == {
        "Ab.png": "Ab.png: 'AB.txt' and 'ab.txt' may both describe it; keep the one that does",
        "b.PNG": "b.PNG: 'b.txt' may describe 'b.PNG' and 'b.png'; give each image its own text file",
        "b.png": "b.png: 'b.txt' may describe 'b.PNG' and 'b.png'; give each image its own text file",
        "t/Cd.png": "t/Cd.png: t/metadata.csv, line 2, and t/metadata.csv, line 3, may both name it",
    }


def _memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_texts_and_rows_with_long_names_are_not_kept_in_memory(tmp_path):
    long = "x" * 3900
    with ParallelTexts((), None, loose=True) as texts, Listed(None, ()) as tables:
        texts.add("captions/a.txt")
        before = _memory_mib()
        for i in range(10_000):
            texts.add(f"captions/{long}{i}/a.txt")
        assert _memory_mib() - before < 20, "the names alone have 37 MiB, and were thrice in tables and indices"
        before = _memory_mib()
        for part in range(10):
            lines = b"file_name,text\n" + b"".join(
                b"%s%d/a.png,a\n" % (long.encode(), part * 1000 + i) for i in range(1000)
            )
            tables.add("m", "m", "", (), "csv", io.BytesIO(lines), "")
        assert _memory_mib() - before < 60
        image = f"images/{long}77/a.png"
        texts.claim(image)
        assert [text.path for text in texts.match(image)[0]] == [f"captions/{long}77/a.txt"]


LEFT_OUT = {
    "a video and one of its frames": ({"clip.mp4": b"", "clip.frame0.png": PNG, "clip.txt": "the clip"}, {"clip.frame0.png": []}, 1),
    "another format and another case": ({"IMG_1.jxl": b"", "IMG_1.txt": "the jxl", "img_1.png": PNG}, {"img_1.png": []}, 1),
    "a raw photograph, and a picture with a text of its own": (
        {"A.NEF": b"", "A.txt": "the raw", "a.png": PNG, "a.json": '{"text": "own"}'},
        {"a.png": ["own"]},
        1,
    ),
    "parallel folders": (
        {"images/a.jxl": b"", "captions/a.txt": "whose", "photos/a.png": PNG, "images/b.jxl": b"", "captions/b.txt": "the jxl"},
        {"photos/a.png": AMBIGUOUS},
        1,
    ),
    "parallel folders that differ in case": (
        {"images/x/a.jxl": b"", "captions/x/a.txt": "the jxl", "images/X/a.png": PNG},
        {"images/X/a.png": []},
        1,
    ),
    "one picture in two formats": ({"a.psd": b"", "a.png": PNG, "a.txt": "both"}, {"a.png": ["both"]}, 0),
    "files next to an image that are no media": (
        {"a.npz": b"", "a.xmp": b"", "a.cls": b"", "a.image.png": PNG, "a.txt": "own"},
        {"a.image.png": ["own"]},
        0,
    ),
}  # fmt: skip


# Whether a text of one key is of an image: in a loose folder, and in an archive.
KEYS = {
    "a version in a name": ({"sd1.5.png": PNG, "sd1.txt": "of another"}, {"sd1.5.png": []}, {"sd1.5.png": ["of another"]}),
    "a time in a name": (
        {"S at 10.00.01.png": PNG, "S at 10.txt": "of another", "sd1.5.png": PNG, "sd1.caption.txt": "of another"},
        {"S at 10.00.01.png": [], "sd1.5.png": []},
        {"S at 10.00.01.png": ["of another"], "sd1.5.png": ["of another"]},
    ),
    "two pictures of one key": (
        {"a.left.png": PNG, "a.right.png": PNG, "a.txt": "which"},
        {"a.left.png": [], "a.right.png": []},
        {"a.left.png": AMBIGUOUS, "a.right.png": AMBIGUOUS},
    ),
    **{
        f"a sample of {other}": ({f"1.{image}.png": PNG, f"1.{other}": PNG, f"1.{text}": "own"}, *[{f"1.{image}.png": ["own"]}] * 2)
        for image, other, text in (
            ("image", "audio.wav", "caption.txt"),
            ("rgb", "depth.exr", "txt"),
            ("IMG", "depth.unknown", "txt"),
            ("image", "wav.json", "caption.txt"),
            ("image", "npy", "txt"),
        )
    },
    "a sample of two pictures, one named as the image": (
        {"1.image.png": PNG, "1.mask.png": PNG, "1.caption.txt": "own", "2.png": PNG, "2.mask.png": PNG, "2.prompt.txt": "two"},
        *[{"1.image.png": ["own"], "1.mask.png": [], "2.png": ["two"], "2.mask.png": []}] * 2,
    ),
    "a sample with texts of the stem and of the key": (
        {"1.left.png": PNG, "1.left.txt": "stem", "1.caption.txt": "key"},
        {"1.left.png": ["stem"]},
        {"1.left.png": ["key", "stem"]},
    ),
    "a sample whose image is left out": (
        {"1.image.jxl": b"", "1.mask.png": PNG, "1.caption.txt": "the jxl", "2.rgb.unknown": b"", "2.mask.png": PNG, "2.txt": "two"},
        *[{"1.mask.png": [], "2.mask.png": []}] * 2,
    ),
    "a sample of a video and a frame": (
        {"1.video.mp4": b"", "1.frame.png": PNG, "1.txt": "the video"},
        {"1.frame.png": []},
        {"1.frame.png": AMBIGUOUS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("case", KEYS)
def test_a_text_of_one_key_is_of_the_image_of_the_sample_and_in_a_folder_of_no_other(tmp_path, case, container):
    files, loose, packed = KEYS[case]
    if container == "tar":
        tar_of(tmp_path / "x.tar", files)
        assert captions_in(tmp_path) == {f"x.tar:{name}": captions for name, captions in packed.items()}
    else:
        assert captions_in(write(tmp_path, files)) == loose


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("extension", ["vob", "wma", "ts", "docx", "html", "made-up", ""])
@pytest.mark.parametrize("form", ["frame1", "image"])
def test_a_text_named_as_a_file_of_any_unknown_kind_is_of_no_image_of_its_key(tmp_path, extension, form, container):
    files = {f"c.{extension}".rstrip("."): b"x", "c.txt": "whose", f"c.{form}.png": PNG, "d/E.docx": b"x", "d/E.txt": "E", "d/e.png": PNG}  # fmt: skip
    files |= {"images/f.html": b"x", f"images/f.{form}.png": PNG, "captions/f.txt": "whose"}
    prefix = "x.tar:" if container == "tar" else ""
    tar_of(tmp_path / "x.tar", files) if prefix else write(tmp_path, files)
    assert captions_in(tmp_path) == {prefix + name: [] for name in (f"c.{form}.png", "d/e.png", f"images/f.{form}.png")}  # fmt: skip
    of_left_out = 3 if prefix or form == "image" else 1 + (extension in base.OTHER_MEDIA)
    skipped = left_out(tmp_path)
    assert (skipped["text of a file that is left out"], skipped.get(".txt", 0)) == (of_left_out, 3 - of_left_out)


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_an_unknown_file_takes_no_text_of_an_image_of_the_same_name(tmp_path, container):
    files = {
        "a.png": PNG,
        "a.docx": b"x",
        "a.txt": "a",
        "b.jpg": PNG,
        "b.jpg.meta": b"x",
        "b.jpg.txt": "b",
        "b.txt": "b2",
    }
    files |= {"images/c.png": PNG, "captions/c.txt": "c", "captions/c.html": b"x", "images/c.html": b"x"}
    prefix = "x.tar:" if container == "tar" else ""
    tar_of(tmp_path / "x.tar", files) if prefix else write(tmp_path, files)
    expected = {"a.png": ["a"], "b.jpg": ["b", "b2"], "images/c.png": ["c"]}
    assert captions_in(tmp_path) == {prefix + name: captions for name, captions in expected.items()}


def test_a_tar_that_is_read_takes_no_text(tmp_path):
    write(tmp_path, {"T.png": PNG, "t.txt": "own"})
    tar_of(tmp_path / "t.tar", {"b.png": PNG})
    assert captions_in(tmp_path) == {"T.png": ["own"], "t.tar:b.png": []} and left_out(tmp_path) == {}


def test_a_link_to_a_tar_is_not_read_for_a_table(tmp_path):
    tar_of(tmp_path / "elsewhere/x.tar", {"b.png": PNG})
    write(tmp_path / "source", {"a.png": PNG, "x.txt": "x", "metadata.csv": rows(("a.png", "a"))})
    (tmp_path / "source/x.tar").symlink_to(tmp_path / "elsewhere/x.tar")
    assert captions_in(tmp_path / "source") == {"a.png": ["a"]}
    assert left_out(tmp_path / "source") == {"symbolic link": 1, ".txt": 1}


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_an_image_whose_own_text_is_a_link_has_no_other_text(tmp_path, container):
    files = {
        "a.png": PNG,
        "A.txt": "of another",
        "images/b.png": PNG,
        "captions/b.txt": "of another",
        "c.png": PNG,
        "c.json": '"own"',
    }
    links, prefix = ("a.txt", "images/b.txt", "c.txt"), "x.tar:" if container == "tar" else ""
    if prefix:
        infos = [tarfile.TarInfo(name) for name in links]
        for info in infos:
            info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
        tar_of(tmp_path / "x.tar", [*files.items(), *((info, b"") for info in infos)])
    else:
        write(tmp_path, files)
        for name in links:
            (tmp_path / name).symlink_to("elsewhere")
    expected = {"a.png": [], "images/b.png": [], "c.png": ["own"]}
    assert captions_in(tmp_path) == {prefix + name: captions for name, captions in expected.items()}
    assert left_out(tmp_path) == {"symbolic link": 3, ".txt": 2}
    details = {record.locator: record.detail for record in read_records(tmp_path)[0]}
    assert details[f"{prefix}a.png"] == f"{prefix}a.png: its text 'a.txt' is a link, which is not read"


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_text_of_a_file_that_is_left_out_is_of_no_other_image(tmp_path, case, container):
    files, expected, texts = LEFT_OUT[case]
    if container == "tar":
        tar_of(tmp_path / "x.tar", files)
        expected = {f"x.tar:{name}": captions for name, captions in expected.items()}
    else:
        write(tmp_path, files)
    assert captions_in(tmp_path) == expected
    assert left_out(tmp_path).get("text of a file that is left out", 0) == texts


def test_heic_images_without_their_extra_keep_their_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "IMAGE_EXTENSIONS", tuple(set(base.IMAGE_EXTENSIONS) - {"heic"}))
    write(tmp_path, {"IMG_2.HEIC": b"", "IMG_2.txt": "the photograph", "IMG_2.crop.png": PNG})
    assert captions_in(tmp_path) == {"IMG_2.crop.png": []}
    assert left_out(tmp_path) == {".heic": 1, "text of a file that is left out": 1}


def test_the_text_of_a_link_is_of_no_other_image(tmp_path):
    write(tmp_path, {"A.png": PNG, "a.txt": "of the link", "d/B.png": PNG, "d/c.png": PNG})
    (tmp_path / "a.png").symlink_to("A.png")
    (tmp_path / "d/b.png").symlink_to("B.png")
    write(tmp_path, {"d/metadata.csv": rows(("b.png", "of the link"), ("c.png", "c"))})
    assert captions_in(tmp_path) == {"A.png": [], "d/B.png": [], "d/c.png": ["c"]}
    assert left_out(tmp_path) == {
        "symbolic link": 2,
        "text of a file that is left out": 1,
        "metadata row that names no image": 1,
    }


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
@pytest.mark.parametrize("table", ["inside", "beside"])
def test_the_text_or_row_of_a_dead_link_in_a_tar_is_of_no_other_image(tmp_path, kind, table):
    links = [tarfile.TarInfo(name) for name in ("7.jpg", "8.jpg")]
    for link in links:
        link.type, link.linkname = kind, f"pool/{link.name}"
    text = rows(("8.jpg", "of the link"), ("pool/7.jpg", "pool"))
    members = [(links[0], b""), ("7.txt", "of the link"), ("7.depth.png", PNG), ("pool/7.jpg", PNG)]
    members += [(links[1], b""), ("8.JPG", PNG)]
    tar_of(tmp_path / "x.tar", members + ([("metadata.csv", text)] if table == "inside" else []))
    if table == "beside":
        write(tmp_path, {"metadata.csv": text})
    assert captions_in(tmp_path) == {"x.tar:7.depth.png": [], "x.tar:pool/7.jpg": ["pool"], "x.tar:8.JPG": []}
    assert left_out(tmp_path) == {
        "hard link to no member" if kind == tarfile.LNKTYPE else "symbolic link": 2,
        "text of a file that is left out": 1,
        "metadata row that names no image": 1,
    }
