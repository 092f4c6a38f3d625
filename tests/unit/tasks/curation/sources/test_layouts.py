"""Layouts and spellings of users' folders: each caption is whole and with its own image, or the reason is given."""

from __future__ import annotations

import io
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import captions_in, left_out, picture, read_records, tar_of, write

PNG = picture()
UNREADABLE, AMBIGUOUS = "unreadable_caption", "ambiguous_caption"


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def tar(folder, members) -> bytes:
    path = tar_of(folder / "made.tar", members)
    data = path.read_bytes()
    path.unlink()
    return data


STRUCTS = pa.array([{"bytes": PNG, "path": "0.png"}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
READ = {
    "a table with a mark, \\r\\n at its ends and inside quotes": (
        {
            "a.png": PNG,
            "b.png": PNG,
            "metadata.csv": '\ufefffile_name,text\r\na.png,"a barn,\r\nseen from ""below"""\r\nb.png,boats\r\n',
        },
        {"a.png": ['a barn,\r\nseen from "below"'], "b.png": ["boats"]},
    ),
    "tabs and quotes inside quotes, and inches": (
        {
            "a.png": PNG,
            "b.png": PNG,
            "metadata.tsv": 'file_name\ttext\na.png\t"a\tby ""noon"""\nb.png\t12" and 7" discs\n',
        },
        {"a.png": ['a\tby "noon"'], "b.png": ['12" and 7" discs']},
    ),
    "UTF-16 without a mark, whose Chinese has no NUL": (
        {"a.png": PNG, "a.txt": "一只红色的猫".encode("utf-16-le"), "b.png": PNG, "b.txt": "boats"},
        {"a.png": UNREADABLE, "b.png": ["boats"]},
    ),
    "ISO-2022-JP, which is ASCII with escapes": (
        {"a.png": PNG, "a.txt": "赤い猫".encode("iso2022_jp"), "b.png": PNG, "b.txt": "boats"},
        {"a.png": UNREADABLE, "b.png": ["boats"]},
    ),
    "images as structs, prompts as lists": (
        {"x.parquet": parquet(image=STRUCTS, prompt=[["one", "uno"], [], ["three", None]])},
        {"x.parquet:0": ["one", "uno"], "x.parquet:1": [], "x.parquet:2": ["three"]},
    ),
    "names that differ in case alone, each with its text": (
        {"A.png": PNG, "a.png": PNG, "A.txt": "upper", "a.txt": "lower"},
        {"A.png": ["upper"], "a.png": ["lower"]},
    ),
    "names that differ in case alone, one text": ({"A.png": PNG, "a.png": PNG, "a.txt": "lower"}, {"A.png": [], "a.png": ["lower"]}),
    "two pictures, one text, and only the case of .png differs": (
        {"a.png": PNG, "a.PNG": PNG, "a.txt": "which"},
        {"a.png": AMBIGUOUS, "a.PNG": AMBIGUOUS},
    ),
    "one picture in two formats": ({"a.png": PNG, "a.webp": PNG, "a.txt": "one"}, {"a.png": ["one"], "a.webp": ["one"]}),
    "captions beside images, two folders deep": (
        {"d/train/images/sub/a.png": PNG, "d/train/captions/sub/a.txt": "a barn"},
        {"d/train/images/sub/a.png": ["a barn"]},
    ),
    "columns `Text ` and `caption`": (
        {"a.png": PNG, "b.png": PNG, "metadata.csv": "file_name,Text ,caption\na.png,one,two\nb.png,,three\n"},
        {"a.png": ["two", "one"], "b.png": ["three"]},
    ),
    "an index of pandas": (
        {"a.png": PNG, "b.png": PNG, "metadata.csv": ",file_name,text\n0,a.png,one\n1,b.png,two\n"},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "a comma behind each row": (
        {"a.png": PNG, "b.png": PNG, "metadata.csv": "file_name,text,\na.png,one,\nb.png,two,\n"},
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "separators of Unicode inside JSON lines": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": "a\u2028barn\u0085red"}\r\n'},
        {"a.png": ["a\u2028barn\u0085red"]},
    ),
    "a table that names images above its folder": (
        {"images/a.png": PNG, "meta/metadata.csv": "file_name,text\n../images/a.png,a barn\n"},
        {"images/a.png": ["a barn"]},
    ),
    "dots inside names": (
        {"a.jpg.png": PNG, "a.png": PNG, "a.jpg.txt": "the odd", "a.txt": "the plain"},
        {"a.jpg.png": ["the odd"], "a.png": ["the plain"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_each_caption_is_whole_and_with_its_own_image(tmp_path, case):
    files, expected = READ[case]
    assert captions_in(write(tmp_path, files)) == expected


REFUSED = {
    "a comma that nobody quoted, in a row with a column to spare": (
        {"a.png": PNG, "metadata.csv": "file_name,text,\na.png,a barn, red\n"},
        ["metadata.csv, line 2", "column 3", "double quotes"],
    ),
    "more columns to spare": (
        {"a.png": PNG, "metadata.csv": "file_name,text,,\na.png,a barn, red, old\n"},
        ["metadata.csv, line 2", "column 3"],
    ),
    "a field that begins with a quote and goes on behind it": (
        {"a.png": PNG, "metadata.tsv": 'file_name\ttext\na.png\t"Stop" says a sign\n'},
        ["metadata.tsv, line 2", "quotes"],
    ),
    "a last line that is cut off": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "te'},
        ["metadata.jsonl, line 2", "not JSON"],
    ),
    "two rows on one line": (
        {"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": "one"}{"file_name": "a.png"}\n'},
        ["metadata.jsonl, line 1"],
    ),
    "`Text ` and `text`": (
        {"a.png": PNG, "metadata.csv": "file_name,Text ,text\na.png,one,two\n"},
        ["Text , text", "there twice"],
    ),
    "an encoding with escapes in a table": (
        {"a.png": PNG, "metadata.csv": "file_name,text\na.png,赤い猫\n".encode("iso2022_jp")},
        ["metadata.csv", "ISO-2022-JP", "source.encoding"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_may_cut_or_mix_captions_is_refused_with_file_and_line(tmp_path, case):
    files, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        read_records(write(tmp_path, files))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_named_encoding_with_escapes_is_read(tmp_path):
    files = {"a.png": PNG, "a.txt": "赤い猫".encode("iso2022_jp"), "b.png": PNG, "b.txt": "naïve"}
    assert captions_in(write(tmp_path, files), encoding="iso2022_jp") == {"a.png": ["赤い猫"], "b.png": ["naïve"]}


def test_links_in_circles_are_counted_and_not_followed(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "a barn", "sub/b.png": PNG})
    for name, target in (("loop", "."), ("x", "y"), ("y", "x"), ("sub/up", ".."), ("self.png", "self.png")):
        (tmp_path / name).symlink_to(target)
    assert captions_in(tmp_path) == {"a.png": ["a barn"], "sub/b.png": []}
    assert left_out(tmp_path) == {"symbolic link": 5}


def test_captions_of_a_parallel_folder_inside_a_tar_belong_to_its_images(tmp_path):
    members = [
        ("./images/a.png", PNG), ("./images/b.png", PNG), ("./images/sub/a.png", PNG), ("./images/c.png", PNG),
        ("./captions/a.txt", "a barn"), ("./captions/sub/a.txt", "a boat"), ("./captions/z.txt", "of none"),
        ("./texts/c.txt", "one"), ("./captions/c.txt", "two"), ("./images/b.txt", "beside"), ("./captions/b.txt", "apart"),
    ]  # fmt: skip
    tar_of(tmp_path / "x.tar", members)
    assert captions_in(tmp_path) == {
        "x.tar:./images/a.png": ["a barn"],
        "x.tar:./images/b.png": ["beside"],
        "x.tar:./images/sub/a.png": ["a boat"],
        "x.tar:./images/c.png": AMBIGUOUS,
    }
    assert left_out(tmp_path) == {".txt": 4}, "of none, of an image with its own text, and two of the ambiguous one"


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({"images/a.png": PNG, "captions/a.txt": "short", "long/images/a.txt": "long"}, {"captions_folder": "long"}),
        ({"images/a.png": PNG, "captions/a.txt": "a barn", "images/metadata.csv": "file_name,width\na.png,10\n"}, {}),
        ({"Images/a.png": PNG, "CAPTIONS/a.txt": "a barn"}, {}),
    ],
    ids=["a named folder of captions", "a table without captions", "other cases of letters"],
)
def test_a_tar_is_read_as_its_files_in_a_folder_are(tmp_path, files, config):
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    write(folder, files)
    tar_of(packed / "x.tar", files)
    loose = captions_in(folder, **config)
    assert {name.removeprefix("x.tar:"): captions for name, captions in captions_in(packed, **config).items()} == loose
    assert all(loose.values())


@pytest.mark.slow
def test_a_tar_of_many_spellings_of_folders_is_read_in_linear_time(tmp_path):
    word = "abcdefghijklmno"
    spelled = ["".join(c.upper() if n >> i & 1 else c for i, c in enumerate(word)) for n in range(1500)]
    members = [(f"images/{one}/a.png", PNG) for one in spelled] + [(f"captions/{one}/b.txt", "b") for one in spelled]
    tar_of(tmp_path / "x.tar", members)
    begun = time.process_time()
    assert len(captions_in(tmp_path)) == 1500
    assert time.process_time() - begun < 10  # all pairs of folders take 25 s


def test_a_tar_inside_a_tar_is_left_out_by_name_also_where_nothing_else_is_there(tmp_path):
    inner = tar(tmp_path, {"a.png": PNG})
    outer = tar_of(tmp_path / "some" / "x.tar", {"inner.tar": inner, "b.png": PNG, "b.txt": "boats"}).parent
    assert captions_in(outer) == {"x.tar:b.png": ["boats"]} and left_out(outer) == {".tar": 1}
    only = tar_of(tmp_path / "only" / "x.tar", {"inner.tar": inner}).parent
    with pytest.raises(ValueError, match=r"has no image; left out: 1 x \.tar \(.*x\.tar:inner\.tar\)"):
        read_records(only)
