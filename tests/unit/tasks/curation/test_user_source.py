import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.curation import records
from tasks.curation.config import SourceConfig
from tasks.curation.sources import user_source


def picture(seed, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def read(path):
    """{locator: (bytes, captions)}, and what was skipped in scan and reading."""
    source = user_source.scan(path)
    skipped = Counter(source.skipped)
    items = list(source.read(0, source.count, skipped))
    assert len({item.key for item in items}) == len(items)
    return {item.locator: (item.data, item.captions) for item in items}, skipped


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_folder_takes_captions_from_every_kind_of_sidecar(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.JPG", "sub/c.webp", "sub/d.e.png", "f.png", "g.png", "plain.png"):
        (tmp_path / name).write_bytes(picture(len(name)))
    (tmp_path / "a.txt").write_text("\ufeffone line\n\n another \none line\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "from json", "width": 8}))
    (tmp_path / "b.JPG.txt").write_text("a name with its extension")
    (tmp_path / "sub/c.json").write_text(json.dumps(["first", "second"]))
    (tmp_path / "sub/d.e.txt").write_bytes(b"caf\xe9")
    (tmp_path / "metadata.csv").write_text('file_name,text,licence\nf.png,"said, in csv",x\n../../etc/passwd,no,x\n')
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "../g.png", "captions": ["p", "q"]}\n\n')
    found, skipped = read(tmp_path)
    texts = {locator: captions for locator, (_, captions) in found.items()}
    assert texts == {
        "a.png": ["from json", "one line", "another"],
        "b.JPG": ["a name with its extension"],
        "sub/c.webp": ["first", "second"],
        "sub/d.e.png": ["caf\ufffd"],
        "f.png": ["said, in csv"],
        "g.png": ["p", "q"],
        "plain.png": [],
    }
    assert skipped == {"listed but absent": 1}


def test_bytes_pass_untouched_even_when_they_are_no_image(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "good.png").write_bytes(picture(1))
    found, _ = read(tmp_path)
    assert [found[name][0] for name in ("broken.jpg", "empty.png", "good.png")] == [b"no image at all", b"", picture(1)]


def test_other_files_are_skipped_and_counted(tmp_path):
    for name in ("a.png", "notes.md", "stray.txt", "stats.json", ".hidden.png", "README"):
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/b.png").write_bytes(picture(2))
    (tmp_path / "a.json").write_text("{broken")
    found, skipped = read(tmp_path)
    assert list(found) == ["a.png"]
    assert skipped == {
        ".md": 1,
        ".txt": 1,
        ".json": 1,
        "hidden": 1,
        "no extension": 1,
        "unreadable .json sidecar": 1,
    }


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_tars_are_read_in_memory_whatever_their_names_say(tmp_path, suffix):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("../../escape.png", picture(1)),
        ("/abs/b.jpg", picture(2, "JPEG")),
        ("/abs/b.txt", b"absolute"),
        ("d/c.json", json.dumps({"captions": ["x", "y"], "source": "user"}).encode()),
        ("d/c.png", picture(3)),
        ("twice.png", picture(4)),
        ("twice.png", picture(5)),
        ("d/c.cls", b"7"),
        (link, b""),
    ]
    inside = tmp_path / "in"
    inside.mkdir()
    tar_of(inside / f"s{suffix}", members, "w" if suffix == ".tar" else "w:gz")
    found, skipped = read(inside / f"s{suffix}")
    name = f"s{suffix}:"
    assert found == {
        name + "../../escape.png": (picture(1), []),
        name + "/abs/b.jpg": (picture(2, "JPEG"), ["absolute"]),
        name + "d/c.png": (picture(3), ["x", "y"]),
        name + "twice.png": (picture(4), []),
        name + "twice.png#2": (picture(5), []),
    }
    assert skipped == {".cls": 1, "not a plain file": 1}
    assert [p.name for p in tmp_path.rglob("*")] == ["in", f"s{suffix}"], "nothing is extracted"


def test_a_tar_made_of_the_current_folder_keeps_its_captions(tmp_path):
    members = [("./a.png", picture(1)), ("./a.txt", b"by stem"), ("./b.png", picture(2)), ("./b.png.txt", b"by name")]
    tar_of(tmp_path / "x.tar", members)
    found, skipped = read(tmp_path / "x.tar")
    assert [captions for _, captions in found.values()] == [["by stem"], ["by name"]]
    assert not skipped


def test_a_linked_folder_is_not_entered_and_is_counted(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for folder in (source, elsewhere):
        folder.mkdir()
        (folder / "a.png").write_bytes(picture(1))
    (source / "link").symlink_to(elsewhere)
    (source / "circle").symlink_to(source)
    found, skipped = read(source)
    assert set(found) == {"a.png"} and skipped == {"linked folder": 2}


def test_what_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(user_source, "MAX_MEMBER_BYTES", 1000)
    monkeypatch.setattr(user_source, "MAX_SIDECAR_BYTES", 100)
    (tmp_path / "big.png").write_bytes(bytes(1001))
    (tmp_path / "small.png").write_bytes(picture(1))
    (tmp_path / "small.txt").write_text("x" * 101)
    tar_of(tmp_path / "a.tar", [("big.png", bytes(1001)), ("small.png", picture(2))])
    pq.write_table(pa.table({"image": [bytes(1001), picture(3)]}), tmp_path / "p.parquet")
    found, skipped = read(tmp_path)
    assert found == {
        "small.png": (picture(1), []),
        "a.tar:small.png": (picture(2), []),
        "p.parquet:1": (picture(3), []),
    }
    assert skipped == {"larger than 256 MiB": 3, "sidecar over 1 MiB": 1}


def test_parquet_holds_bytes_or_structs_and_captions(tmp_path):
    images = [picture(i, "JPEG" if i % 2 else "PNG") for i in range(7)]
    plain = pa.table({"image": images, "text": [f"t{i}" for i in range(7)]})
    pq.write_table(plain, tmp_path / "plain.parquet", row_group_size=3)
    structs = [{"bytes": images[0], "path": "x/y.webp"}, {"bytes": None, "path": "gone.png"}]
    table = pa.table({"image": structs, "captions": [["a", "b"], ["c"]], "caption": [None, "d"]})
    pq.write_table(table, tmp_path / "structs.parquet")
    source = user_source.scan(tmp_path)
    skipped = Counter()
    items = list(source.read(0, source.count, skipped))
    assert [item.data for item in items] == [*images, images[0]]
    assert [item.captions for item in items] == [[f"t{i}"] for i in range(7)] + [["a", "b"]]
    assert [item.ext for item in items] == ["png", "jpg"] * 3 + ["png", "webp"]
    assert skipped == {"row without image bytes": 1}
    for start, stop in [(0, 1), (2, 5), (3, 3), (4, 8), (6, 7)]:
        assert [item.data for item in source.read(start, stop)] == [*images, images[0]][start:stop]


def test_shards_split_every_kind_of_source_without_loss(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.png").write_bytes(picture(i))
    (source / "3.txt").write_text("three")
    (source / "notes.md").write_text("skipped once")
    tar_of(source / "t.tar", [(f"{i}.png", picture(10 + i)) for i in range(5)])
    pq.write_table(pa.table({"image": [picture(20 + i) for i in range(4)]}), source / "p.parquet")
    config = SourceConfig(path=str(source), shards=4)
    assert sum(spec.count for spec in records.plan_shards(config)) == 14
    (tmp_path / "whole").mkdir()
    whole = records.make_records(config, tmp_path / "whole")
    parts = []
    for i in range(4):
        parts.append(tmp_path / f"part{i}")
        parts[i].mkdir()
        assert records.make_shard(config, i, parts[i])["records"] in (3, 4)
    (tmp_path / "merged").mkdir()
    assert records.gather(parts, tmp_path / "merged") == whole
    assert whole["records"] == 14 and whole["without_caption"] == 13 and whole["skipped"] == {".md": 1}
    found = list(records.read_records(tmp_path / "merged"))
    assert {record.data for record in found} == {picture(i) for i in [*range(5), *range(10, 15), *range(20, 24)]}
    assert not (tmp_path / "merged/truth.parquet").exists()
    captioned = [record for record in found if record.sidecar["captions"]]
    assert [record.sidecar for record in captioned] == [
        {"captions": ["three"], "source": "user", "meta": {"path": "3.png"}}
    ]
    row = pq.read_table(tmp_path / "merged/records.parquet").to_pylist()[0]
    assert row["source"] == "user" and row["synthetic"] is False


def test_adding_an_image_renames_no_other(tmp_path):
    (tmp_path / "b.png").write_bytes(picture(1))
    before = next(user_source.scan(tmp_path).read(0, 1)).key
    (tmp_path / "a.png").write_bytes(picture(2))
    assert [item.key for item in user_source.scan(tmp_path).read(0, 2)][1] == before


def test_our_own_records_are_a_source_too(tmp_path):
    made, again = tmp_path / "made", tmp_path / "again"
    made.mkdir(), again.mkdir()
    records.make_records(SourceConfig(scenes=4, scene_size_px=32, defect_fraction=0, shards=2), made)
    report = records.make_records(SourceConfig(path=str(made)), again)
    assert report["records"] == 4 and report["skipped"] == {".json": 1, ".parquet without image bytes": 2}
    texts = [[record.sidecar["captions"] for record in records.read_records(d)] for d in (made, again)]
    assert texts[0] == texts[1]


def test_captions_that_are_no_unicode_do_not_stop_the_table(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.json").write_text('{"caption": "half \\ud800 pair", "text": 7}')
    (tmp_path / "out").mkdir()
    report = records.make_records(SourceConfig(path=str(tmp_path / "a.png")), tmp_path / "out")
    assert report["without_caption"] == 1  # one file by itself has no sidecar
    assert read(tmp_path)[0]["a.png"][1] == ["half ? pair"]


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        records.plan_shards(SourceConfig(path=str(path)))
    for word in words:
        assert word in str(caught.value)


def test_a_source_without_images_is_one_clear_error(tmp_path):
    refused(tmp_path / "missing", "missing", "does not exist", "folder of images")
    refused(tmp_path, "holds no image", "nothing")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    refused(tmp_path, "holds no image", "2 x .txt", "WebDataset")
    refused(tmp_path / "a.txt", "holds no image")
    pq.write_table(pa.table({"image": ["a path"], "text": ["x"]}), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", ".parquet without image bytes")


def test_a_broken_container_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    refused(tmp_path, "x.tar", "not a readable tar")
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b broken")
    refused(tmp_path, "x.tar.gz", "not a readable tar")
    (tmp_path / "x.tar.gz").unlink()
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    refused(tmp_path, "y.parquet", "not a readable Parquet")


def test_a_tar_cut_short_or_broken_inside_is_refused_not_shortened(tmp_path):
    whole = tmp_path / "whole.tar"
    tar_of(whole, [(f"{i}.png", picture(i)) for i in range(6)])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        third = tar.getmembers()[3].offset
    whole.unlink()
    for broken in (data[: third + 100], data[: third + 600], data[:third] + b"\xff" * 512 + data[third + 512 :]):
        (tmp_path / "x.tar").write_bytes(broken)
        refused(tmp_path, "x.tar")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("metadata.csv", "name,text\na.png,x\n", "file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{broken\n', "line 2"),
        ("metadata.jsonl", '["a.png"]\n', "line 1"),
    ],
)
def test_a_broken_metadata_file_is_named(tmp_path, name, text, word):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / name).write_text(text)
    refused(tmp_path, name, word)
