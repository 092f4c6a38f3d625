"""Properties of a corpus of any sources: identities, which shards read what, and errors before any decoding."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from source_files import picture, read_records, tar_of, write

from tasks.curation.config import SourceConfig
from tasks.curation.sources import file_trees
from tasks.curation.sources.base import SHARDS, Account, open_corpus, visible, write_corpus


def mixed(folder):
    write(folder, {f"{i}.png": picture(i) for i in range(6)})
    write(folder, {"3.txt": "three", "sub/a.png": picture(7), "sub/metadata.csv": "file_name,text\na.png,in a table\n"})
    tar_of(folder / "x.tar", {"a.png": picture(8), "a.txt": "of a tar"})
    table = pa.table({"image": [picture(20 + i) for i in range(6)], "text": ["row"] * 6})
    pq.write_table(table, folder / "p.parquet", row_group_size=2)
    return folder


def written(source, out, **config):
    report = write_corpus(SourceConfig(images_per_shard=2, **config), str(source), out)
    return open_corpus(out), report


def by_id(corpus):
    return {shard.shard_id: shard for shard in corpus.shards()}


def test_the_table_has_a_row_for_each_shard_and_the_report_counts_them(tmp_path):
    corpus, report = written(mixed(tmp_path / "source"), tmp_path / "corpus")
    shards = list(corpus.shards())
    assert pq.read_schema(tmp_path / "corpus/shards.parquet").equals(SHARDS)
    assert {shard.kind for shard in shards} == {"files", "tar", "parquet"}
    assert all(len(shard.shard_id) == 16 and int(shard.shard_id, 16) >= 0 for shard in shards)
    assert report == json.loads((tmp_path / "corpus/report.json").read_text()) | {"options": report["options"]}
    assert report["images"] == sum(shard.num_rows for shard in shards) == 14 and report["shards"] == len(shards)
    with pytest.raises(ValueError, match="not a corpus"):
        open_corpus(tmp_path)


def test_the_digest_follows_contents_and_names_and_not_the_place_or_the_clock(tmp_path):
    source = mixed(tmp_path / "source")
    first, report = written(source, tmp_path / "one")
    os.utime(source / "0.png", (1, 1))
    source.rename(tmp_path / "moved")
    second, again = written(tmp_path / "moved", tmp_path / "two")
    assert report["digest"] == again["digest"] and list(by_id(first)) == list(by_id(second))
    write(tmp_path / "moved", {".DS_Store": "x", ".cache/b.png": "x"})
    assert written(tmp_path / "moved", tmp_path / "three")[1]["digest"] == report["digest"]
    (tmp_path / "moved/0.png").rename(tmp_path / "moved/00.png")
    assert written(tmp_path / "moved", tmp_path / "four")[1]["digest"] != report["digest"]


def test_one_file_and_a_path_in_the_home_folder_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tar_of(tmp_path / "a.tar", {"a.png": picture(0)})
    first = write_corpus(SourceConfig(), "~/a.tar", tmp_path / "one")["digest"]
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    assert write_corpus(SourceConfig(), "~/b.tar", tmp_path / "two")["digest"] != first


def test_the_projects_own_output_inside_a_source_is_no_part_of_it(tmp_path, monkeypatch):
    source = write(tmp_path / "source", {"a.png": picture(0), "out/artifacts/pipelines/x/grid.png": picture(1)})
    assert len(read_records(source)[0]) == 2
    monkeypatch.setenv("NUCLEUS_HOME", str(source / "out"))
    records, account = read_records(source)
    assert [record.locator for record in records] == ["a.png"]
    assert account.skipped == {"this project's own output (NUCLEUS_HOME)": (1, "out")}


@pytest.mark.slow
def test_adding_and_changing_files_changes_their_own_shards_alone(tmp_path):
    source = write(tmp_path / "source", {f"{i:03d}.png": picture(i) for i in range(60)})
    mixed(source / "more")
    before = set(by_id(written(source, tmp_path / "0")[0]))
    assert len(before) > 15
    write(source, {"030a.png": picture(99)})
    added = set(by_id(written(source, tmp_path / "1")[0]))
    assert len(before - added) <= 1 <= len(added - before) <= 2
    tar_of(source / "new.tar", {"a.png": picture(1)})
    with_tar = set(by_id(written(source, tmp_path / "2")[0]))
    assert added < with_tar and len(with_tar - added) == 1
    for i, change in enumerate(({"more/3.txt": "other"}, {"more/sub/metadata.csv": "file_name,text\na.png,new\n"})):
        earlier = set(by_id(written(source, tmp_path / f"a{i}")[0]))
        write(source, change)
        later = set(by_id(written(source, tmp_path / f"b{i}")[0]))
        assert len(earlier - later) == len(later - earlier) == 1


def test_a_table_beside_a_tar_and_the_readers_settings_are_part_of_a_shards_identity(tmp_path):
    tar_of(tmp_path / "s/x.tar", {"a.png": picture(1)})
    ids = [list(by_id(written(tmp_path / "s", tmp_path / "0")[0]))]
    for i, text in enumerate(("one", "two"), start=1):
        write(tmp_path / "s", {"metadata.csv": f"file_name,text\na.png,{text}\n"})
        ids.append(list(by_id(written(tmp_path / "s", tmp_path / str(i))[0])))
    ids.append(list(by_id(written(tmp_path / "s", tmp_path / "3", encoding="cp1252")[0])))
    assert len({tuple(one) for one in ids}) == 4


def test_keys_keep_their_published_form(tmp_path):
    import hashlib

    source = mixed(tmp_path / "source")
    for record in read_records(source)[0]:
        assert record.key == f"user-{hashlib.sha256(record.locator.encode()).hexdigest()[:20]}"


def test_reading_a_shard_opens_its_own_files_alone(tmp_path, monkeypatch):
    corpus, _ = written(mixed(tmp_path / "source"), tmp_path / "corpus")
    opened = []
    real = file_trees.LocalFileTree.open
    monkeypatch.setattr(file_trees.LocalFileTree, "open", lambda self, name: opened.append(name) or real(self, name))
    for shard in corpus.shards():
        opened.clear()
        records = list(corpus.read(shard, Account()))
        own = {record.locator.partition(":")[0] for record in records}
        captions = {"3.txt"} & {f"{name[:-4]}.txt" for name in own}
        assert set(opened) == own | captions, "captions of metadata.csv are in the table"
        assert not any(name == "walk" for name in opened)


@pytest.mark.parametrize("change", ["3.png", "3.txt", "x.tar", "p.parquet"])
def test_a_file_that_changed_after_the_scan_is_named(tmp_path, change):
    source = mixed(tmp_path / "source")
    corpus, _ = written(source, tmp_path / "corpus")
    data = bytearray((source / change).read_bytes())
    data[4 if change != "x.tar" else 600] ^= 1
    (source / change).write_bytes(data)
    with pytest.raises(ValueError, match=f"{change} has changed since the source was scanned"):
        for shard in corpus.shards():
            list(corpus.read(shard, Account()))


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(tmp_path, monkeypatch):
    source = mixed(tmp_path / "source")
    first, report = written(source, tmp_path / "one")
    real = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return reversed(list(self.entries))

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(file_trees.os, "scandir", Reversed)
    assert written(source, tmp_path / "two")[1]["digest"] == report["digest"]


@pytest.mark.parametrize("what", ["file", "text", "tar", "table", "metadata", "folder"])
def test_what_cannot_be_read_is_named_by_the_scan(tmp_path, what, monkeypatch):
    source = mixed(tmp_path / "source")
    name = {"file": "0.png", "text": "3.txt", "tar": "x.tar", "table": "p.parquet", "metadata": "sub/metadata.csv", "folder": "sub"}[what]  # fmt: skip
    refused = OSError(13, "Permission denied")
    real_open, real_scandir = file_trees.LocalFileTree.open, os.scandir

    def deny(real, is_denied):
        def denied(*args):
            if is_denied(args[-1]):
                raise refused
            return real(*args)

        return denied

    monkeypatch.setattr(file_trees.LocalFileTree, "open", deny(real_open, lambda asked: asked == name))
    monkeypatch.setattr(file_trees.os, "scandir", deny(real_scandir, lambda asked: str(asked).endswith(f"/{name}")))
    with pytest.raises(ValueError) as caught:
        written(source, tmp_path / "corpus")
    assert str(source / name) in str(caught.value) and "Permission denied" in str(caught.value)


def test_an_image_that_can_no_longer_be_read_is_a_problem_of_its_own(tmp_path):
    source = write(tmp_path / "source", {"a.png": picture(1), "b.png": picture(2)})
    write_corpus(SourceConfig(), str(source), tmp_path / "corpus")
    (source / "a.png").unlink()
    corpus = open_corpus(tmp_path / "corpus")
    records = [record for shard in corpus.shards() for record in corpus.read(shard, Account())]
    assert [(r.locator, r.problem, r.data) for r in records] == [
        ("a.png", "unreadable_file", b""),
        ("b.png", "", picture(2)),
    ]
    assert records[0].detail == "a.png cannot be read: No such file or directory"


def test_a_source_without_images_is_one_error_with_what_was_seen(tmp_path):
    def refused(path, *words):
        with pytest.raises(ValueError) as caught:
            write_corpus(SourceConfig(), str(path), tmp_path / "corpus")
        for word in words:
            assert word in str(caught.value)

    source = write(tmp_path / "source", {})
    refused(tmp_path / "missing", "missing", "does not exist", "folder of images")
    refused(source / "missing" / "deep", "does not exist")
    refused(source, "is empty", "WebDataset")
    write(source, {"a.txt": "x", "b.txt": "x", "c.cr2": "x"})
    refused(source, "has no image", "2 x .txt (a.txt), 1 x .cr2 (c.cr2)")
    refused(source / "a.txt", "has no image")
    with pytest.raises(ValueError, match="there is no source"):
        write_corpus(SourceConfig(), None, tmp_path / "corpus")


def test_accounts_add_up_and_survive_json():
    one, two = Account(), Account()
    one.use(3)
    one.skip(".cr2", "b.cr2")
    two.skip(".cr2", "a\x1b.cr2", 2)
    two.skip(".zip", "z.zip", 0)
    total = Account.total([one, two])
    total.check()
    assert total.skipped == {".cr2": (3, "a\\x1b.cr2")} and (total.seen, total.used) == (6, 3)
    assert Account.from_json(json.loads(json.dumps(total.to_json()))) == total
    total.seen += 1
    with pytest.raises(AssertionError):
        total.check()


def test_what_a_terminal_obeys_is_made_visible():
    assert visible("a b/ü\u3000日本🎉.png") == "a b/ü\u3000日本🎉.png"
    assert visible("\x1b[2J\r\n\x07\x9b\u202e\udcff\u200b") == "\\x1b[2J\\r\\n\\x07\\x9b\\u202e\\udcff\\u200b"


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("seed", 2**32, "less than 4294967296"),
        ("seed", -1, "greater than or equal to 0"),
        ("encoding", "no-such-encoding", "text encoding"),
        ("encoding", "zlib", "text encoding"),
        ("caption_columns", ["a", " "], "empty column"),
        ("captions_folder", "../x", "inside the source"),
        ("captions_folder", "/x", "inside the source"),
        ("images_per_shard", 0, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(key, value, word):
    with pytest.raises(ValidationError, match=word):
        SourceConfig(**{key: value})
    assert SourceConfig(seed=2**32 - 1, captions_folder="a/b/", encoding="utf-16").captions_folder == "a/b"
