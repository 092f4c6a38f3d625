import json
import os
import socket
import unicodedata

import pytest
from source_files import captions_in, left_out, picture, read_records, tar_of, write

from tasks.curation.sources import file_trees, folder
from tasks.curation.sources.base import MAX_IMAGE_BYTES
from tasks.curation.sources.captions.parallel import caption_folders

PNG = picture(1)


def nfd(text):
    return unicodedata.normalize("NFD", text)


def test_captions_come_from_every_kind_of_file_beside_an_image(tmp_path):
    write(
        tmp_path,
        {
            **dict.fromkeys(
                ("a.png", "b.JPG", "sub/c.webp", "sub/d.e.png", "f.png", "g.png", "plain.png", "h.png"), PNG
            ),
            "a.txt": "\ufeffone line\n\n another \none line\r\nlast\rof all",
            "a.json": json.dumps({"caption": "from json", "width": 8}),
            "b.JPG.txt": "a name with its extension",
            "sub/c.json": json.dumps(["first", "second"]),
            "sub/d.e.txt": "café",
            "h.caption": "of kohya",
            "metadata.csv": 'file_name,text,licence\nf.png,"said, in csv",x\n',
            "sub/metadata.jsonl": '{"file_name": "../g.png", "captions": ["p", "q"]}\n\n',
        },
    )
    assert captions_in(tmp_path) == {
        "a.png": ["from json", "one line", "another", "last", "of all"],
        "b.JPG": ["a name with its extension"],
        "f.png": ["said, in csv"],
        "g.png": ["p", "q"],
        "h.png": ["of kohya"],
        "plain.png": [],
        "sub/c.webp": ["first", "second"],
        "sub/d.e.png": ["café"],
    }
    assert left_out(tmp_path) == {}


def test_a_caption_file_pairs_by_the_key_of_an_image_that_is_named_as_in_a_sample(tmp_path):
    write(
        tmp_path,
        {
            "1.image.png": PNG,
            "1.caption.txt": "of one",
            "2.png": PNG,
            "2.prompt.txt": "of two",
            "3.png": PNG,
            "3.ocr.txt": "words in the picture",
            "4.left.png": PNG,
            "4.right.png": PNG,
            "4.txt": "whose?",
            "5.v1.png": PNG,
            "5.v1.txt": "its own",
            "5.txt": "of another picture",
            "6.png": PNG,
            "6.webp": PNG,
            "6.txt": "two formats of one picture",
            "7.png": PNG,
            "7.blurb.txt": "by the recipe",
        },
    )
    captions = captions_in(tmp_path, caption_columns=("blurb",))
    assert captions == {
        "1.image.png": ["of one"],
        "2.png": ["of two"],
        "3.png": [],
        "4.left.png": [],
        "4.right.png": [],
        "5.v1.png": ["its own"],
        "6.png": ["two formats of one picture"],
        "6.webp": ["two formats of one picture"],
        "7.png": ["by the recipe"],
    }
    assert left_out(tmp_path, caption_columns=("blurb",)) == {".txt": 3}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_match_in_either_unicode_form_and_case(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    names = [unicodedata.normalize(form, name) for name in ("café", "Ångström", "한국")]
    for name in names:
        write(tmp_path, {f"{name}.png": PNG, f"{unicodedata.normalize(other, name)}.txt": name})
    write(tmp_path, {"UPPER.PNG": PNG, "upper.TXT": "by case"})
    assert captions_in(tmp_path) == {**{f"{name}.png": [name] for name in names}, "UPPER.PNG": ["by case"]}


def test_two_images_that_differ_in_unicode_form_alone_get_each_its_own_caption_or_none(tmp_path):
    one, two = unicodedata.normalize("NFC", "é"), nfd("é")
    write(tmp_path, {f"{one}.png": PNG, f"{two}.png": PNG, f"{one}.txt": "composed", f"{two}.txt": "decomposed"})
    assert captions_in(tmp_path) == {f"{one}.png": ["composed"], f"{two}.png": ["decomposed"]}
    (tmp_path / f"{two}.txt").unlink()
    assert captions_in(tmp_path) == {f"{one}.png": ["composed"], f"{two}.png": []}
    write(tmp_path, {"É.txt": "of which?"})
    (tmp_path / f"{one}.txt").unlink()
    assert set(captions_in(tmp_path).values()) == {"ambiguous_caption"}


@pytest.mark.parametrize(
    ("images", "texts", "config"),
    [
        ("images", "captions", {}),
        ("train/images/deep", "train/captions/deep", {}),
        ("photos", "photos/captions", {}),
        ("pictures", "blurbs", {"captions_folder": "blurbs"}),
        ("pictures/deep", "blurbs/deep", {"captions_folder": "blurbs"}),
        ("pictures", "blurbs/pictures", {"captions_folder": "blurbs"}),
        ("pictures", "Blurbs", {"captions_folder": "bLURBS"}),
        ("train/images", "train/labels", {"captions_folder": "train/labels"}),
        ("train/images/deep", "train/labels/deep", {"captions_folder": "train/labels"}),
        ("Train/images/deep", "train/LABELS/images/deep", {"captions_folder": "train/labels"}),
        ("val/images", "train/labels/images", {"captions_folder": "train/labels"}),
    ],
)
def test_captions_of_a_parallel_folder_are_found(tmp_path, images, texts, config):
    write(tmp_path, {f"{images}/a.png": PNG, f"{images}/b.png": PNG, f"{texts}/a.txt": "of a", f"{texts}/c.txt": "c"})
    assert captions_in(tmp_path, **config) == {f"{images}/a.png": ["of a"], f"{images}/b.png": []}
    assert left_out(tmp_path, **config) == {".txt": 1}


def test_two_parallel_folders_with_a_caption_of_one_image_are_ambiguous(tmp_path):
    write(tmp_path, {"images/a.png": PNG, "captions/a.txt": "one", "prompts/a.txt": "two"})
    records, _ = read_records(tmp_path)
    assert records[0].problem == "ambiguous_caption"
    assert "captions" in records[0].detail and "prompts" in records[0].detail


def test_every_file_is_accounted_for_by_its_kind_with_an_example(tmp_path):
    names = ("notes.md", "stray.txt", "stats.json", ".hidden.png", "README", "b.CR2", "a.cr2", "z.zip", "j.jxl")
    write(tmp_path, {"a.png": PNG, **dict.fromkeys(names, b"x"), ".git/b.png": PNG, ".git/hooks/x": b"x"})
    records, account = read_records(tmp_path)
    assert [record.locator for record in records] == ["a.png"]
    assert account.skipped == {
        ".md": (1, "notes.md"),
        ".txt": (1, "stray.txt"),
        ".json": (1, "stats.json"),
        ".cr2": (2, "a.cr2"),
        ".zip": (1, "z.zip"),
        ".jxl": (1, "j.jxl"),
        "hidden": (3, ".git/b.png"),
        "no extension": (1, "README"),
    }
    assert account.seen == sum(len(files) for _, _, files in os.walk(tmp_path)) == 12
    assert account.left_out().startswith("3 x hidden (.git/b.png), 2 x .cr2 (a.cr2)")


def test_bytes_pass_untouched_even_when_they_are_no_image(tmp_path):
    files = {"broken.jpg": b"no image at all", "empty.png": b"", "good.png": PNG}
    write(tmp_path, files)
    assert {record.locator: record.data for record in read_records(tmp_path)[0]} == files


@pytest.mark.parametrize(
    "content", [b"caf\xe9", "two boats".encode("utf-16-le"), b"\xff\xfe\x00\xd8", "ランプ".encode("shift_jis"), b"a\0b"]
)
def test_text_that_cannot_be_decoded_is_a_problem_of_its_image_alone(tmp_path, content):
    write(tmp_path, {"a.png": PNG, "a.txt": content, "b.png": PNG, "b.txt": "whole"})
    records, _ = read_records(tmp_path)
    assert [(r.problem, r.captions) for r in records] == [("unreadable_caption", []), ("", ["whole"])]
    assert records[0].detail.startswith("a.txt ")
    assert records[0].data == PNG


@pytest.mark.parametrize(
    "content", [b"{broken", b'{"text": "half \\ud800 pair"}', b'{"text": "a", "text": "b"}', b"[" * 100_000]
)
def test_json_that_cannot_be_read_is_a_problem_of_its_image(tmp_path, content):
    write(tmp_path, {"a.png": PNG, "a.json": content, "a.txt": "another caption"})
    (record,), _ = read_records(tmp_path)
    assert record.problem == "unreadable_caption" and not record.captions and "a.json" in record.detail


def test_the_recipes_encoding_is_used_after_utf8(tmp_path):
    write(tmp_path, {"w.png": PNG, "w.txt": "the barn\u2019s café".encode("cp1252"), "u.png": PNG, "u.txt": "日本"})
    assert captions_in(tmp_path) == {"u.png": ["日本"], "w.png": "unreadable_caption"}
    assert captions_in(tmp_path, encoding="cp1252") == {"u.png": ["日本"], "w.png": ["the barn\u2019s café"]}


def test_caption_keys_of_json_match_in_any_case_or_by_the_recipe(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.json": json.dumps({" Caption ": "x", "blurb": "y"})})
    assert captions_in(tmp_path) == {"a.png": ["x"]}
    assert captions_in(tmp_path, caption_columns=("Blurb",)) == {"a.png": ["y"]}


def test_what_is_too_large_is_a_problem_and_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": b"", "b.png": PNG, "b.txt": b"", "c.png": PNG})
    os.truncate(tmp_path / "a.png", MAX_IMAGE_BYTES + 1)
    os.truncate(tmp_path / "b.txt", 2**20 + 1)
    opened = []
    real = file_trees.LocalFileTree.open
    monkeypatch.setattr(file_trees.LocalFileTree, "open", lambda self, name: opened.append(name) or real(self, name))
    records, _ = read_records(tmp_path)
    assert [record.problem for record in records] == ["unreadable_file", "unreadable_caption", ""]
    assert "a.png" in records[0].detail and "256 MiB" in records[0].detail and "b.txt" in records[1].detail
    assert "a.png" not in opened


def test_links_pipes_and_sockets_are_counted_and_never_opened(tmp_path):
    source, outside = tmp_path / "source", tmp_path / "outside"
    write(source, {"a.png": PNG, "b.png": PNG})
    write(outside, {"secret.txt": "a secret", "c.png": PNG})
    (source / "a.txt").symlink_to(outside / "secret.txt")
    (source / "c.png").symlink_to(outside / "c.png")
    (source / "metadata.csv").symlink_to(outside / "secret.txt")
    (source / "folder").symlink_to(outside)
    (source / "circle").symlink_to(source)
    os.mkfifo(source / "b.txt")
    os.mkfifo(source / "p.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "s.png"))
    assert captions_in(source) == {"a.png": [], "b.png": []}
    assert left_out(source) == {"symbolic link": 5, "neither a file nor a folder": 3}


def test_a_folder_swapped_for_a_link_after_the_scan_is_not_followed(tmp_path):
    from tasks.curation.config import SourceConfig
    from tasks.curation.sources.base import Account, open_corpus, write_corpus

    source = write(tmp_path / "source", {"sub/a.png": PNG})
    write_corpus(SourceConfig(), str(source), tmp_path / "corpus")
    (source / "sub").rename(tmp_path / "elsewhere")
    (source / "sub").symlink_to(tmp_path / "elsewhere")
    corpus = open_corpus(tmp_path / "corpus")
    (record,) = corpus.read(next(corpus.shards()), Account())
    assert record.problem == "unreadable_file" and record.data == b""


def test_names_that_are_not_utf8_or_would_steer_a_terminal_are_read_and_shown_escaped(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), "\x1b[31mred.png", "line\nbreak.png", "a b\u3000c.png", "\u202egnp.png"]
    for name in names:
        write(tmp_path, {name: PNG})
        write(tmp_path, {f"{name}.txt": b"\xff"})
    records, _ = read_records(tmp_path)
    assert len(records) == 5
    for record in records:
        assert record.problem == "unreadable_caption"
        for text in (record.locator, record.detail):
            assert text.encode() and not any(c in text for c in "\x1b\n\u202e")
    assert {"\\x1b[31mred.png", "caf\\udce9.png", "a b\u3000c.png"} <= {record.locator for record in records}


def test_a_loose_file_named_like_a_member_or_row_does_not_share_its_key(tmp_path):
    tar_of(tmp_path / "x.tar", {"a.png": PNG})
    tar_of(tmp_path / "x.tar:y.tar", {"b.png": PNG})
    tar_of(tmp_path / "y.tar", {"a.png": PNG})
    write(tmp_path, {"x.tar:a.png": PNG, "x.tar:y.tar:b.png": PNG})
    assert len(read_records(tmp_path)[0]) == 5  # which compares keys


def test_one_file_is_a_source_too_also_through_a_link(tmp_path):
    write(tmp_path, {"sub/a.png": PNG, "sub/a.txt": "not read: the source is one file", "sub/metadata.csv": "broken"})
    (tmp_path / "link.png").symlink_to(tmp_path / "sub/a.png")
    assert captions_in(tmp_path / "sub/a.png") == {"a.png": []}
    assert captions_in(tmp_path / "link.png") == {"link.png": []}


def test_lists_of_files_stay_what_they_are_when_files_are_added(tmp_path):
    files = [folder.File(f"{i:04d}.png", 1, "x") for i in range(400)]
    before = {tuple(run) for run in folder.cut(iter(files), 10)}
    assert 20 < len(before) < 80 and max(map(len, before)) <= 40
    for new in ("0000a.png", "0200a.png", "0399a.png"):
        more = sorted([*files, folder.File(new, 1, "x")])
        after = {tuple(run) for run in folder.cut(iter(more), 10)}
        assert len(before - after) <= 1 and len(after - before) <= 2
        assert sorted(file for run in after for file in run) == more


def test_a_captions_folder_that_is_not_there_is_an_error(tmp_path):
    write(tmp_path, {"a.png": PNG, "a/.blurbs/a.txt": "hidden", "real/a.txt": "linked", "blurbs2/a.txt": "another"})
    (tmp_path / "blurbs").symlink_to("real")
    for name in ("blurbs", "a/.blurbs", "real/a.txt"):
        with pytest.raises(ValueError, match=rf"source.captions_folder='{name}': .*/{name} is not a folder"):
            read_records(tmp_path, captions_folder=name)
    tar_of(tmp_path / "x.tar", {"b.png": PNG, "blurbs": "a file", "c/blurbs/b.txt": "deeper"})
    with pytest.raises(
        ValueError, match=r"source.captions_folder='blurbs': .* is not a folder of the source, nor of a tar"
    ):
        read_records(tmp_path, captions_folder="blurbs")


@pytest.mark.parametrize("alone", [True, False])
def test_a_captions_folder_may_be_inside_of_tars_alone(tmp_path, alone):
    path = tar_of(tmp_path / "x.tar", {"a.png": PNG, "Blurbs/a.txt": "of a", "captions/a.txt": "not of a"})
    assert captions_in(path if alone else tmp_path, captions_folder="blurbs") == {"x.tar:a.png": ["of a"]}


def test_a_caption_that_is_no_text_is_unreadable_unless_the_image_has_another(tmp_path):
    write(
        tmp_path, {"a.png": picture(0), "a.json": '{"text": 7}', "b.png": picture(1), "b.json": '{"text": {"en": "x"}}'}
    )
    write(tmp_path, {"c.png": picture(2), "c.json": '{"raw": {"id": 1}}', "c.txt": "a barn"})
    write(tmp_path, {"d.png": picture(3), "d.json": '{"text": [null, NaN, "a boat"], "raw": 3}'})
    write(tmp_path, {"e.png": picture(4), "e.json": '{"text": null}'})
    expected = {"a.png": "unreadable_caption", "b.png": "unreadable_caption"}
    assert captions_in(tmp_path) == expected | {"c.png": ["a barn"], "d.png": ["a boat"], "e.png": []}
    details = {record.locator: record.detail for record in read_records(tmp_path)[0]}
    assert details["a.png"].endswith("a.json has a caption that is not text but of the type int")
    tar_of(tmp_path / "t/x.tar", {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()})
    assert captions_in(tmp_path / "t") == {f"x.tar:{k}": v for k, v in captions_in(tmp_path).items() if "tar" not in k}


def test_text_files_of_other_names_and_folders_in_any_case_are_captions(tmp_path):
    files = {"a.png": picture(), "a.text": "one", "b.png": picture(1), "b.prompt": "two"}
    files |= {"Images/s/c.png": picture(2), "Captions/s/C.TXT": "three"}
    records, account = read_records(write(tmp_path, files))
    assert {record.locator: record.captions for record in records} == {"a.png": ["one"], "b.png": ["two"], "Images/s/c.png": ["three"]}  # fmt: skip
    assert not account.skipped


def test_two_caption_folders_that_differ_in_case_alone_are_neither_chosen(tmp_path):
    files = {"images/a.png": picture(), "Captions/a.txt": "one", "CAPTIONS/a.txt": "two"}
    records, account = read_records(write(tmp_path, files))
    assert records[0].problem == "ambiguous_caption" and account.skipped[".txt"][0] == 2


def test_rows_name_files_that_windows_archives_left_with_backslashes(tmp_path):
    files = {"img\\a.png": picture(), "metadata.csv": "file_name,text\nimg/a.png,one\n"}
    records, _ = read_records(write(tmp_path, files))
    assert [record.captions for record in records] == [["one"]]


def test_a_path_that_repeats_a_name_of_image_folders_is_tried_at_a_few_places_only():
    assert (0, "captions/train") in caption_folders("images/train", None)
    assert len(caption_folders("/".join(["images"] * 60), None)) <= 30
    assert caption_folders("/".join(["images"] * 1000), None) == []
