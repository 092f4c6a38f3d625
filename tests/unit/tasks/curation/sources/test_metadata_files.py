import io
import json
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import captions_in, details_in, left_out, picture, read_records, tar_of, write

from tasks.curation.sources.captions import csv_text, listed, metadata_files

PNG = picture(1)


def refused(path, *words, **config):
    with pytest.raises(ValueError) as caught:
        read_records(path, **config)
    for word in words:
        assert word in str(caught.value), str(caught.value)


ROWS = [("a.png", "a red barn, at dusk"), ("b.png", 'two "boats"\non a lake'), ("b.png", "a second caption")]


def table(path, columns=("file_name", "text")):
    pq.write_table(pa.table([list(column) for column in zip(*ROWS)], names=columns), path)


def as_csv(delimiter=",", columns=("file_name", "text"), newline="\n"):
    quoted = ['"{}"'.format(text.replace('"', '""')) for _, text in ROWS]
    rows = [delimiter.join(columns), *(f"{name}{delimiter}{text}" for (name, _), text in zip(ROWS, quoted))]
    return newline.join(rows) + newline


def as_lines(columns=("file_name", "text")):
    return "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in ROWS)


def as_list(columns=("file_name", "text")):
    return json.dumps([dict(zip(columns, row)) for row in ROWS], indent=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", as_csv()),
        ("Metadata.CSV", as_csv(newline="\r\n")),
        ("metadata.csv", as_csv(";")),
        ("metadata.tsv", as_csv("\t")),
        ("metadata.csv", as_csv(columns=("file_name", " text"))),
        ("metadata.csv", as_csv(columns=(" Filename ", "TEXT"))),
        ("metadata.csv", as_csv(columns=("image", "Prompt"))),
        ("metadata.csv", as_csv(columns=("image_file_name", "text"))),
        ("metadata.csv", "\ufeff" + as_csv(columns=("path", "raw"))),
        ("METADATA.csv", as_csv().encode("utf-16")),
        ("metadata.jsonl", as_lines()),
        ("metadata.jsonl", "\n" + as_lines(("file_name", "Captions")).replace("\n", "\n\n")),
        ("metadata.json", as_list()),
        ("Metadata.json", as_lines()),
        ("metadata.json", json.dumps({"a.png": ROWS[0][1], "b.png": [text for _, text in ROWS[1:]]})),
        ("metadata.json", json.dumps({"a.png": {"caption": ROWS[0][1]}, "b.png": {"texts": [t for _, t in ROWS[1:]]}})),
        ("metadata.json", as_list().encode("utf-16-le")),
        (
            "metadata.json",
            json.dumps({"a": {"caption": ROWS[0][1]}, "b": {"tags": "x", "texts": [t for _, t in ROWS[1:]]}}),
        ),
        ("metadata.json", json.dumps({"./a": {"caption": ROWS[0][1]}, "b.PNG": {"texts": [t for _, t in ROWS[1:]]}})),
        ("metadata.jsonl", as_lines().replace('"a.png"', '["a.png"]').replace('"b.png"', '["b.png"]')),
        ("metadata.parquet", None),
    ],
)
def test_every_format_and_spelling_of_a_table_gives_the_same_captions(tmp_path, name, content):
    write(tmp_path, {"a.png": PNG, "b.png": PNG})
    config = {}
    if content is None:
        table(tmp_path / name)
    else:
        write(tmp_path, {name: content})
        if isinstance(content, bytes) and content[:1] == b"[":
            config = {"encoding": "utf-16-le"}
    assert captions_in(tmp_path, **config) == {
        "a.png": ["a red barn, at dusk"],
        "b.png": ['two "boats"\non a lake', "a second caption"],
    }
    assert left_out(tmp_path, **config) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,text\na.png,ok\nb.png,a barn, at dusk\n", ("line 3", "3 fields", "2 columns", "double quotes")),
        ("file_name,text,more\na.png,ok\n", ("line 2", "2 fields", "3 columns", "write each column")),
        ('file_name,text\na.png,"never closed\nb.png,two boats\n', ("line 2", "metadata.csv", "quotes")),
        ('file_name,text\na.png,"never closed\nb.png,"two boats"\n', ("line 2", "quotes")),
        ('file_name,text\na.png,"not closed\nb.png,two boats"\n', ("line 2", "'a.png'", "'b.png'", "not closed")),
        ('file_name,text\na.png,"a "red" barn"\nb.png,x\n', ("line 2", "quotes")),
        ("file_name,text,text\na.png,x,y\n", ("file_name, text, text", "twice")),
        ("name,text\na.png,x\n", ("name, text", "file_name")),
        ("", ("empty", "file_name")),
        ("file_name,text\na.png,caf\xe9\n".encode("latin-1"), ("UTF-8", "source.encoding")),
        ("file_name,text\n" + "".join(f"a.png,{i}\n" for i in range(5)) + '"\n' * 3, ("line 9",)),
    ],
)
def test_csv_is_strict_and_names_file_and_line(tmp_path, content, words):
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.csv": content})
    refused(tmp_path, str(tmp_path / "metadata.csv"), *words)


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("file_name,text,width", "a.png,a red barn, at noon", ("'width' (column 3)", "'at noon'")),
        ("file_name,text,similarity", "a.png,a red barn, 0.3", ("'similarity' (column 3)", "'0.3'")),
        ("file_name;text;width", "a.png;a red barn;\u00a0at noon", ("'width' (column 3)", "'at noon'", "';'")),
        ("file_name,text,author,width", "a.png,a red barn, at noon,12", ("'author' (column 3)", "'at noon'")),
        ("file_name,text,author,width", 'a.png,a red barn, at noon,"12"', ("'author' (column 3)", "'at noon'")),
        ("file_name,text,prompt", "a.png,a red barn, at noon", ("'prompt' (column 3)", "'at noon'")),
        ("text,width,file_name", "a red barn, at noon,a.png", ("'width' (column 2)", "'at noon'")),
    ],
)
def test_a_caption_that_may_continue_in_the_next_column_is_a_problem_of_its_record_alone(tmp_path, header, row, words):
    whole = row.replace("a.png", "b.png").replace("; ", ";").replace(", ", ",").replace("\u00a0", "")
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.csv": f"{header}\n{row}\n{whole}\n"})
    captions = captions_in(tmp_path)
    assert captions["a.png"] == "unreadable_caption" and captions["b.png"][0] == "a red barn"
    detail = details_in(tmp_path)["a.png"]
    assert detail.startswith("a.png: metadata.csv, line 2, has a blank before")
    for word in ("between double quotes", "JSON Lines or Parquet", *words):
        assert word in detail


def numbered(tmp_path, header, rows):
    """The captions by a table whose rows have their numbers for {i}."""
    lines = [header, *(row.format(i=i) for i, row in enumerate(rows))]
    files = {f"{i}.png": PNG for i in range(len(rows))}
    return captions_in(write(tmp_path, files | {"metadata.csv": "\n".join(lines) + "\n"}))


@pytest.mark.parametrize(
    ("header", "rows", "more"),
    [
        ("file_name,text,author", ["{i}.png,barn {i}, Jane Doe"] * 10, []),
        ("file_name;text;score", ["{i}.png;barn {i}; 0,7", "{i}.png;barn {i}; 1"] * 5, []),
        ("file_name,text,author", ['{i}.png,"barn {i}", Jane', "{i}.png,barn {i},", '{i}.png,barn {i},"Jane"', *["{i}.png,barn {i}, Jane"] * 9], []),
        ("file_name,text,prompt", ["{i}.png,barn {i}, Jane"] * 10, ["Jane"]),
    ],
)  # fmt: skip
def test_a_blank_in_every_row_behind_a_caption_is_a_habit_of_the_writer(tmp_path, header, rows, more):
    assert numbered(tmp_path, header, rows) == {f"{i}.png": [f"barn {i}", *more] for i in range(len(rows))}


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("file_name,text,author", ["{i}.png,barn {i}, Jane Doe"] * 9),  # too few
        ("file_name,text,author", ["{i}.png,barn {i}, Jane Doe"] * 20 + ["{i}.png,barn {i},Jane"]),
        ("file_name,text,width", ["{i}.png,barn {i}, 640"] * 20 + ["{i}.png,barn {i}, at noon"]),
        ("file_name,text,author", ["{i}.png,in my style, barn {i}"] * 20),
    ],
)
def test_blanks_that_may_be_of_captions_are_no_habit_of_the_writer(tmp_path, header, rows):
    expected = {f"{i}.png": "unreadable_caption" for i, row in enumerate(rows) if ", " in row}
    captions = numbered(tmp_path, header, rows)
    assert {name: value for name, value in captions.items() if value == "unreadable_caption"} == expected


def test_rows_are_read_a_second_time_once_and_only_if_a_caption_may_continue(tmp_path, monkeypatch):
    calls, real = [], csv_text.rows
    monkeypatch.setattr(csv_text, "rows", lambda *args: calls.append(args[0]) or real(*args))
    files = {f"{i}.png": PNG for i in range(12)}
    for blank, times in (("", 1), (" ", 2)):
        lines = [f"{i}.png,barn {i},{blank}Jane\n" for i in range(12)]
        write(tmp_path, {**files, "metadata.csv": "".join(["file_name,text,author\n", *lines])})
        calls.clear()
        assert captions_in(tmp_path)["3.png"] == ["barn 3"] and len(calls) == times


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("file_name, text, width", "a.png, a red barn, 12"),
        ("file_name,text,width", 'a.png,"a red barn", 12'),
        ("file_name,text,width", "a.png, a red barn,"),
        ("file_name,text", "a.png, a red barn"),
        ("text,file_name", "a red barn, a.png"),
        ("width,file_name,text", "12, a.png, a red barn"),
        ("file_name,width,text", "a.png, 12, a red barn"),
        ("file_name\ttext\twidth", "a.png\ta red barn\t 12"),
        ("file_name,author,text,width", 'a.png,"Doe, Jane", a red barn,12'),
        ("file_name,text,width", '"a.png","a red barn",12'),
        ("file_name,split,text", "a.png,train, a red barn"),
        ("file_name,width,height,text", "a.png, 640, 480,a red barn"),
        ("file_name,text,width,title", "a.png,a red barn,12, Home page"),
        ("file_name,title,text,width", "a.png, Home page,a red barn,12"),
        ("file_name,title,text", "a.png,, a red barn"),
    ],
)
def test_blanks_that_are_a_habit_of_the_writer_are_ignored(tmp_path, header, row):
    write(tmp_path, {"a.png": PNG, "metadata.csv": f"{header}\n{row}\n"})
    assert captions_in(tmp_path) == {"a.png": ["a red barn"]}


def test_a_field_of_200000_characters_is_a_caption_like_others(tmp_path):
    caption = "word " * 40_000
    write(tmp_path, {"a.png": PNG, "metadata.csv": f"file_name,text\na.png,{caption}\n"})
    assert captions_in(tmp_path) == {"a.png": [caption.strip()]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{broken\n', ("line 2", "not JSON")),
        ("metadata.jsonl", '["a.png"]\n', ("line 1", "file_name")),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}\n', ("line 1", "file_name")),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "text": "y"}\n', ("line 1", "'text' twice")),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}\n', ("line 1", "no Unicode")),
        ("metadata.jsonl", "[" * 100_000 + "\n", ("line 1", "nested")),
        ("metadata.json", '[{"file_name": "a.png", "text": "x"}, {"file_name": }]', ("element 2",)),
        ("metadata.json", '[{"file_name": "a.png", "text": "x"}', ("ends early",)),
        ("metadata.json", '[{"file_name": "a.png", "text": "x"}] []', ("follows its end",)),
        ("metadata.parquet", b"no table", ("metadata.parquet", "not a readable Parquet")),
    ],
)
def test_a_broken_table_is_named(tmp_path, name, content, words):
    write(tmp_path, {"a.png": PNG, name: content})
    refused(tmp_path, str(tmp_path / name), *words)


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.parquet"]
)
def test_a_missing_caption_column_is_named_unless_the_recipe_maps_it_or_sidecars_have_captions(tmp_path, name):
    write(tmp_path, {"a.png": PNG, "b.png": PNG})
    content = {"csv": as_csv, "tsv": lambda **c: as_csv("\t", **c), "jsonl": as_lines, "json": as_list}
    columns = ("file_name", "blurb")
    if name.endswith("parquet"):
        table(tmp_path / name, columns)
    else:
        write(tmp_path, {name: content[name.partition(".")[2]](columns=columns)})
    has = f"{name} has {'' if 'json' in name else 'columns '}file_name, blurb; it needs a caption column"
    why = f"{has} (caption, captions, text, texts, prompt, raw); name yours in source.caption_columns"
    assert details_in(tmp_path) == {"a.png": why, "b.png": why}
    assert "(prose)" in details_in(tmp_path, caption_columns=("prose",))["a.png"]
    assert captions_in(tmp_path, caption_columns=("Blurb",))["a.png"] == ["a red barn, at dusk"]
    write(tmp_path, {"a.txt": "beside"})
    assert captions_in(tmp_path) == {"a.png": ["beside"], "b.png": []}
    assert details_in(tmp_path) == {"a.png": "", "b.png": why}


def test_names_match_with_backslashes_with_the_folder_in_front_and_in_either_unicode_form(tmp_path):
    nfd = unicodedata.normalize("NFD", "café")
    write(
        tmp_path,
        {
            "windows/images/p0.png": PNG,
            "windows/metadata.csv": "file_name,text\n.\\images\\p0.png,windows\n",
            "prefix/train/p0.png": PNG,
            "prefix/train/deep/p1.png": PNG,
            "prefix/train/metadata.csv": "file_name,text\ntrain/p0.png,near\n/data/train/deep/p1.png,absolute\n",
            f"nfd/{nfd}.png": PNG,
            "nfd/metadata.csv": f"file_name,text\n{unicodedata.normalize('NFC', 'café')}.png,composed\n",
            "case/A.PNG": PNG,
            "case/metadata.csv": "file_name,text\na.png,by case\n",
            "above/in/metadata.csv": "file_name,text\n../a.png,from below\n",
            "above/a.png": PNG,
        },
    )
    assert captions_in(tmp_path) == {
        "above/a.png": ["from below"],
        "case/A.PNG": ["by case"],
        f"nfd/{nfd}.png": ["composed"],
        "prefix/train/p0.png": ["near"],
        "prefix/train/deep/p1.png": ["absolute"],
        "windows/images/p0.png": ["windows"],
    }


def test_a_table_names_files_relative_to_its_folder_even_with_an_equal_subfolder(tmp_path):
    write(tmp_path, {"train/train/a.png": PNG, "train/a.png": PNG})
    write(tmp_path, {"train/metadata.csv": "file_name,text\ntrain/a.png,inner\n"})
    assert captions_in(tmp_path) == {"train/a.png": [], "train/train/a.png": ["inner"]}


def test_a_name_that_may_mean_two_images_gives_neither_a_caption(tmp_path):
    write(tmp_path, {"É.png": PNG, unicodedata.normalize("NFD", "é") + ".png": PNG})
    write(tmp_path, {"metadata.csv": f"file_name,text\n{unicodedata.normalize('NFD', 'É')}.png,composed\n"})
    captions = captions_in(tmp_path)
    assert captions == {"É.png": ["composed"], unicodedata.normalize("NFD", "é") + ".png": []}
    write(tmp_path, {"b.PNG": PNG, "B.png": PNG, "metadata.csv": "file_name,text\nb.png,whose\n"})
    captions = captions_in(tmp_path)
    assert captions["b.PNG"] == captions["B.png"] == "ambiguous_caption"


def test_rows_that_name_no_image_are_counted_with_an_example_and_all_of_them_are_an_error(tmp_path):
    write(tmp_path, {"a.png": PNG, "metadata.csv": "file_name,text\na.png,x\ngone.png,y\n../../etc/passwd,z\n"})
    assert captions_in(tmp_path) == {"a.png": ["x"]}
    _, account = read_records(tmp_path)
    count, example = account.skipped["metadata row that names no image"]
    assert count == 2 and example.startswith("metadata.csv: ") and "gone.png (line 3)" in example
    write(tmp_path, {"metadata.csv": "file_name,text\nimages/a.png,x\ngone.png,y\n"})
    refused(tmp_path, "2 rows of", "metadata.csv name no image", "images/a.png (line 2)")


def test_examples_of_long_names_are_cut_and_keep_their_ends(tmp_path):
    long = "x" * 1_000_000 + ".png"
    lines = [f'{{"file_name": "{name}", "text": "t"}}\n' for name in (long, "a.png")]
    write(tmp_path, {"a.png": PNG, "metadata.jsonl": "".join(lines)})
    _, account = read_records(tmp_path)
    count, example = account.skipped["metadata row that names no image"]
    assert count == 1 and len(example) <= 200
    assert example.startswith("metadata.jsonl: xxx") and "x…x" in example and example.endswith("x.png (line 1)")
    write(tmp_path, {"metadata.jsonl": lines[0]})
    with pytest.raises(ValueError, match=r"metadata.jsonl name no image, such as x+…x+.png \(line 1\)") as refusal:
        read_records(tmp_path)
    assert len(str(refusal.value)) < 1000
    (tmp_path / "metadata.jsonl").unlink()
    for content in (f"{'x' * 1_000_000},text\n", f'file_name,text\n{long},"never closed\nb.png,two boats"\n'):
        write(tmp_path, {"metadata.csv": content})
        with pytest.raises(ValueError, match="metadata.csv.*xx…xx") as refusal:
            read_records(tmp_path)
        assert len(str(refusal.value)) < 1000
    tar_of(tmp_path / "tar/x.tar", {"a.png": PNG, f"b.{'x' * 4000}": b""}, format=tarfile.PAX_FORMAT)
    ((reason, (_, example)),) = read_records(tmp_path / "tar")[1].skipped.items()
    assert max(len(reason), len(example)) <= 201 and reason.startswith(".xxx") and example.startswith("x.tar:b.x")


def test_keys_without_an_extension_name_the_nearest_image_and_two_are_ambiguous(tmp_path):
    rows = {"a": {"caption": "of the stem"}, "a.png": {"caption": "of the name"}, "b": {"caption": "of either"}}
    rows |= {"c.d": {"caption": "with a dot"}, "gone": {"caption": "of none"}}
    files = {"a.png": PNG, "b.jpeg": PNG, "b.jpg": PNG, "c.d.png": PNG, "metadata.json": json.dumps(rows)}
    expected = {
        "a.png": ["of the name"],
        "b.jpeg": "ambiguous_caption",
        "b.jpg": "ambiguous_caption",
        "c.d.png": ["with a dot"],
    }
    assert captions_in(write(tmp_path / "loose", files)) == expected
    assert left_out(tmp_path / "loose") == {"metadata row that names no image": 2}
    tar_of(tmp_path / "packed/x.tar", files)
    assert captions_in(tmp_path / "packed") == {f"x.tar:{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("is_tar", [False, True])
def test_a_key_without_an_extension_describes_one_picture_in_several_formats_as_a_text_does(tmp_path, is_tar):
    rows = {name: {"caption": f"of {name}"} for name in "abcd"}
    files = dict.fromkeys(("a.png", "a.webp", "b.png", "b.psd", "c.png", "c.mp4", "d.png", "d.PNG"), PNG)
    files |= {"metadata.json": json.dumps(rows)}
    prefix = "x.tar:" if is_tar else ""
    if is_tar:
        tar_of(tmp_path / "x.tar", files)
    else:
        write(tmp_path, files)
    expected = {"a.png": ["of a"], "a.webp": ["of a"], "b.png": ["of b"], "c.png": ["of c"]}
    expected |= dict.fromkeys(("d.png", "d.PNG"), "ambiguous_caption")
    assert captions_in(tmp_path) == {prefix + name: value for name, value in expected.items()}
    assert left_out(tmp_path) == {".psd": 1, ".mp4": 1}


@pytest.mark.parametrize(
    ("rows", "captions", "detail"),
    [
        ({"a": {"tags": "x"}, "b": {"caption": "boats"}}, [[], ["boats"]], ""),
        ({"a": {"tags": "x"}}, [[], []], "metadata.json has file_name, tags; it needs a caption column"),
        ({"a.png": {"tags": "x"}}, [[], []], "metadata.json has file_name, tags; it needs a caption column"),
        ({"a": {"caption": ""}}, [[], []], ""),
        ({"a": {"caption": 7}}, ["unreadable_caption", []], "a.png: metadata.json, line 1, has a caption that is not text"),
    ],
)  # fmt: skip
def test_a_key_without_an_extension_names_its_image_whether_or_not_it_has_a_caption(tmp_path, rows, captions, detail):
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.json": json.dumps(rows)})
    assert list(captions_in(tmp_path).values()) == captions and left_out(tmp_path) == {}
    assert read_records(tmp_path)[0][0].detail.startswith(detail)


def test_objects_in_a_json_file_that_name_no_image_are_counted(tmp_path):
    files = {"license.png": PNG, "a.txt": "x", "metadata.json": '{"info": {"text": "about"}, "license": "CC0"}'}
    write(tmp_path, files)
    assert captions_in(tmp_path) == {"license.png": []}
    assert left_out(tmp_path) == {".txt": 1, "metadata row that names no image": 2}


def test_a_name_in_a_list_of_one_is_a_name_and_of_two_is_refused(tmp_path):
    write(tmp_path, {"a.png": PNG})
    pq.write_table(pa.table({"image": [["a.png"]], "text": ["a barn"]}), tmp_path / "metadata.parquet")
    assert captions_in(tmp_path) == {"a.png": ["a barn"]}
    (tmp_path / "metadata.parquet").unlink()
    write(tmp_path, {"metadata.jsonl": '{"image": ["a.png", "b.png"], "text": "a barn"}\n'})
    refused(tmp_path, "metadata.jsonl, line 1", "file_name")


def test_tables_without_rows_are_no_reason_to_compare_every_image_with_them(tmp_path):
    with listed.Listed(None, ()) as tables:
        assert tables.add("metadata.csv", "metadata.csv", "", (), "csv", io.BytesIO(b"file_name,text\n"), "x")
        assert tables.add("metadata.json", "metadata.json", "", (), "json", io.BytesIO(b'{"license": "CC0"}'), "x")
        assert not tables
        assert not tables.add("m", "m", "", (), "csv", io.BytesIO(b"file_name,text\na.png,a\n"), "x")
        assert tables


def test_a_json_file_that_is_no_table_of_images_is_left_out(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "x", "metadata.json": '{"license": "CC0", "images": [1, 2]}'})
    assert captions_in(tmp_path) == {"a.png": ["x"]}
    assert left_out(tmp_path) == {".json": 1}


@pytest.mark.parametrize(
    ("name", "content"), [("csv", "file_name,text\n"), ("jsonl", "\n"), ("json", "[]"), ("tsv", "file_name\ttext\n")]
)
def test_a_table_without_rows_is_left_out_by_name(tmp_path, name, content):
    files = {"a.png": PNG, "a.txt": "x", f"metadata.{name}": content}
    write(tmp_path / "loose", files)
    tar_of(tmp_path / "packed/x.tar", files)
    for folder, image in (("loose", "a.png"), ("packed", "x.tar:a.png")):
        assert captions_in(tmp_path / folder) == {image: ["x"]}
        assert left_out(tmp_path / folder) == {"metadata table without rows": 1}


def test_a_parquet_table_without_rows_is_left_out_and_row_groups_without_rows_change_nothing(tmp_path):
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "a.txt": "x"})
    rows = pd.DataFrame({"file_name": ["a.png", "b.png"], "text": ["of a row", "of b"]})
    rows.iloc[:0].to_parquet(tmp_path / "metadata.parquet")
    assert captions_in(tmp_path) == {"a.png": ["x"], "b.png": []}
    assert left_out(tmp_path) == {"metadata table without rows": 1}
    table = pa.table(dict(rows))
    with pq.ParquetWriter(tmp_path / "metadata.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1, 1), table.slice(0, 0)):
            writer.write_table(part)
    (tmp_path / "a.txt").unlink()
    assert captions_in(tmp_path) == {"a.png": ["of a row"], "b.png": ["of b"]}


@pytest.mark.parametrize("is_tar", [False, True])
def test_a_picture_called_metadata_has_the_json_of_its_name_and_every_other_table_is_read(tmp_path, is_tar):
    def captions(files):
        if is_tar:
            return {
                name.partition(":")[2]: value for name, value in captions_in(tar_of(tmp_path / "x.tar", files)).items()
            }
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            return captions_in(write(Path(folder), files))

    json_file = {"metadata.json": '{"text": "of the picture"}'}
    assert captions({"metadata.png": PNG, **json_file}) == {"metadata.png": ["of the picture"]}
    assert captions({**json_file, "b/Metadata.PNG": PNG, "metadata.png": PNG}) == {
        "b/Metadata.PNG": [], "metadata.png": ["of the picture"],
    }  # fmt: skip
    assert captions({"metadata.json": '{"b/metadata.png": "of the row"}', "b/metadata.png": PNG}) == {
        "b/metadata.png": ["of the row"]
    }
    for name, content in (
        ("metadata.csv", "file_name,text\na.png,of a row\n"),
        ("metadata.tsv", "file_name\ttext\na.png\tof a row\n"),
        ("METADATA.jsonl", '{"file_name": "a.png", "text": "of a row"}\n'),
    ):
        assert captions({"metadata.png": PNG, "a.png": PNG, name: content, **json_file}) == {
            "metadata.png": ["of the picture"], "a.png": ["of a row"],
        }  # fmt: skip


def test_a_table_over_its_cap_is_refused_before_it_is_read(tmp_path):
    import os

    write(tmp_path, {"a.png": PNG, "metadata.jsonl": ""})
    os.truncate(tmp_path / "metadata.jsonl", 10 * 2**30)
    refused(tmp_path, "metadata.jsonl", "64 MiB")


def test_a_table_of_too_many_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "MAX_ROWS", 3)
    rows = "".join(f'{{"file_name": "{i}.png", "text": "a"}}\n' for i in range(4))
    write(tmp_path, {"0.png": PNG, "metadata.jsonl": rows})
    refused(tmp_path, "metadata.jsonl", "more than 3 rows", "metadata.parquet")
    write(tmp_path, {"metadata.jsonl": rows[: rows.rindex("{")]})
    assert len(read_records(tmp_path)) > 0


def test_an_image_that_too_many_rows_name_is_an_error_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "MAX_ROWS_PER_IMAGE", 3)
    rows = [f'{{"file_name": "{name}", "text": "t{i}"}}\n' for i, name in enumerate(["b.png", *["a.png"] * 4])]
    write(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.jsonl": "".join(rows[:4])})
    assert captions_in(tmp_path) == {"a.png": ["t1", "t2", "t3"], "b.png": ["t0"]}
    write(tmp_path, {"metadata.jsonl": "".join(rows)})
    refused(tmp_path, "metadata.jsonl, line 5", "more than 3 rows name a.png")


def test_a_table_of_too_many_blank_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_text, "MAX_LINES", 10)
    write(tmp_path, {"a.png": PNG, "metadata.csv": "file_name,text\na.png,x\n" + "\n" * 8})
    assert captions_in(tmp_path) == {"a.png": ["x"]}
    write(tmp_path, {"metadata.csv": "file_name,text\na.png,x\n" + "\n" * 9})
    refused(tmp_path, "metadata.csv", "more than 10 lines")


def test_a_table_of_very_many_columns_is_refused_with_their_number_and_the_cap(tmp_path):
    for columns in (10_000, 10_001):
        row = "," * (columns - 2) + "\n"
        write(tmp_path, {"a.png": PNG, "metadata.csv": f"file_name,text{row}a.png,x{row}"})
        if columns == 10_000:
            assert captions_in(tmp_path) == {"a.png": ["x"]}
    refused(tmp_path, "metadata.csv has 10,001 columns", "at most 10,000 are read")


def test_a_first_line_over_the_limit_of_rows_is_refused_without_a_list_of_its_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_text, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(metadata_files, "MAX_ROW_BYTES", 1000)
    lines, real = [], csv_text.header
    monkeypatch.setattr(csv_text, "header", lambda line, delimiter: lines.append(line) or real(line, delimiter))
    write(tmp_path, {"a.png": PNG, "metadata.csv": "file_name,text" + "," * 5000 + "\na.png,x\n"})
    refused(tmp_path, "metadata.csv, line 1: a row is longer than")
    assert lines and max(map(len, lines)) <= 1000


def test_lines_with_an_escape_sequence_do_not_reach_the_terminal(tmp_path):
    write(tmp_path, {"a.png": PNG, "metadata.csv": "file_name,\x1b[31m\na.png,x\n"})
    with pytest.raises(ValueError) as caught:
        read_records(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_row_whose_caption_is_a_number_is_an_error_with_its_line(tmp_path):
    lines = '{"file_name": "a.png", "text": "a barn"}\n{"file_name": "b.png", "text": 7}\n'
    write(tmp_path, {"a.png": picture(0), "b.png": picture(1), "metadata.jsonl": lines})
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2, has a caption that is not text but of the type int"):
        read_records(tmp_path)
    write(tmp_path, {"metadata.jsonl": lines.replace("7", "NaN")})
    assert captions_in(tmp_path) == {"a.png": ["a barn"], "b.png": []}


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.list_(pa.binary()), pa.dictionary(pa.int32(), pa.binary())]
)
def test_binary_columns_of_a_parquet_table_are_decoded_as_text_files_are(tmp_path, kind):
    texts = ["naïve".encode(), b"\xef\xbb\xbfmarked", "boats".encode("utf-16"), b"caf\xe9", b"a\0b", None]
    names = [f"{i}.png" for i in range(len(texts))]
    cells = [[text] for text in texts] if pa.types.is_list(kind) else texts
    array = pa.array(cells, pa.binary()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(cells, kind)
    write(tmp_path, dict.fromkeys(names, PNG))
    pq.write_table(
        pa.table({"file_name": [name.encode() for name in names], "text": array}), tmp_path / "metadata.parquet"
    )
    expected = {"0.png": ["naïve"], "1.png": ["marked"], "2.png": ["boats"], "3.png": "unreadable_caption", "4.png": "unreadable_caption", "5.png": []}  # fmt: skip
    assert captions_in(tmp_path) == expected
    assert captions_in(tmp_path, encoding="cp1252") == expected | {"3.png": ["café"]}
    details = {record.locator: record.detail for record in read_records(tmp_path)[0]}
    assert (
        details["3.png"].startswith("3.png: metadata.parquet, line 3, is not UTF-8")
        and "source.encoding" in details["3.png"]
    )


def test_text_columns_of_a_parquet_table_that_are_not_utf8_are_decoded_too(tmp_path):
    write(tmp_path, {"a.png": PNG, "b.png": PNG})
    text = pa.array([b"caf\xe9", b"boats"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": text}), tmp_path / "metadata.parquet")
    assert captions_in(tmp_path) == {"a.png": "unreadable_caption", "b.png": ["boats"]}
    assert captions_in(tmp_path, encoding="latin-1") == {"a.png": ["café"], "b.png": ["boats"]}


def test_an_unreadable_row_of_a_table_next_to_or_in_a_tar_rejects_its_member_alone(tmp_path):
    table = pa.table({"file_name": ["a.png", "b.png"], "text": pa.array([b"caf\xe9", b"boats"])})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    tar_of(tmp_path / "beside/x.tar", {"a.png": PNG, "b.png": PNG})
    write(tmp_path, {"beside/metadata.parquet": content})
    tar_of(tmp_path / "inside/x.tar", {"a.png": PNG, "b.png": PNG, "metadata.parquet": content})
    for place in ("beside", "inside"):
        assert captions_in(tmp_path / place) == {"x.tar:a.png": "unreadable_caption", "x.tar:b.png": ["boats"]}
