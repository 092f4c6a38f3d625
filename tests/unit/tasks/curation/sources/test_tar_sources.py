import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc

import pytest
from parameters import slow_except
from source_files import captions_in, details_in, left_out, picture, read_records, tar_of, write

from tasks.curation.config import SourceConfig
from tasks.curation.sources import scan, tar_format
from tasks.curation.sources.base import MAX_IMAGE_BYTES

PNG = picture(1)


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        read_records(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz"), (".tar", "w:gz")])  # fmt: skip
def test_members_are_read_in_memory_whatever_their_names_say(tmp_path, suffix, mode):
    members = [
        ("../../escape.png", picture(1)),
        ("/abs/b.jpg", picture(2, "JPEG")),
        ("/abs/b.txt", "absolute"),
        ("d/c.json", '{"captions": ["x", "y"]}'),
        ("d/c.png", picture(3)),
        ("d/c.cls", "7"),
        (link("link.png", "/etc/passwd", tarfile.SYMTYPE), b""),
        (link("pipe.png", "", tarfile.FIFOTYPE), b""),
        (link("d", "", tarfile.DIRTYPE), b""),
        (".hidden.png", PNG),
        ("__MACOSX/._a.png", PNG),
        (".git/a.png", PNG),
    ]
    path = tar_of(tmp_path / "in" / f"s{suffix}", members, mode)
    records, account = read_records(path)
    assert {record.locator: (record.data, record.captions) for record in records} == {
        f"s{suffix}:../../escape.png": (picture(1), []),
        f"s{suffix}:/abs/b.jpg": (picture(2, "JPEG"), ["absolute"]),
        f"s{suffix}:d/c.png": (picture(3), ["x", "y"]),
    }
    name = f"s{suffix}:"
    assert account.skipped == {
        ".cls": (1, f"{name}d/c.cls"),
        "symbolic link": (1, f"{name}link.png"),
        "neither a file nor a folder": (1, f"{name}pipe.png"),
        "hidden": (3, f"{name}.git/a.png"),
    }
    assert account.seen == 1 + 11, "the tar, and its members without the folder"
    assert [p.name for p in tmp_path.rglob("*")] == ["in", f"s{suffix}"], "nothing is extracted"


def test_samples_pair_by_websdatasets_key(tmp_path):
    members = {
        "0.image.png": picture(0),
        "0.caption.txt": "zero",
        "0.json": '{"width": 3}',
        "./1.jpg": picture(1),
        "./1.txt": "one",
        "2.png": picture(2),
        "2.png.txt": "two",
        "a.b/3.png": picture(3),
        "a.b/3.txt": "three",
    }
    tar_of(tmp_path / "x.tar", members)
    assert list(captions_in(tmp_path / "x.tar").values()) == [["zero"], ["one"], ["two"], ["three"]]


def test_a_repeated_name_pairs_with_its_own_caption_or_with_none(tmp_path):
    def read(*names):
        members = [(name, picture(i) if name.endswith("png") else f"caption {i}") for i, name in enumerate(names)]
        return {r.locator[6:]: r.problem or r.captions for r in read_records(tar_of(tmp_path / "x.tar", members))[0]}

    appended = read("a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt")
    assert appended == {"a.png": ["caption 1"], "b.png": ["caption 3"], "a.png#2": ["caption 5"]}
    assert read("a.txt", "a.png", "a.txt", "a.png") == {"a.png": ["caption 0"], "a.png#2": ["caption 2"]}
    lost = {"a.png": "ambiguous_caption", "a.png#2": "ambiguous_caption"}
    assert read("a.png", "a.png", "a.txt", "a.txt") == lost
    assert read("a.png", "a.txt", "a.png") == lost
    assert read("a.png", "a.txt", "b.png", "a.txt") == {"a.png": "ambiguous_caption", "b.png": []}
    assert read("a.png", "b.png", "a.png") == {"a.png": [], "b.png": [], "a.png#2": []}


def test_archives_in_one_file_are_read_to_the_last(tmp_path):
    one = tar_of(tmp_path / "one.tar", {"a.png": PNG, "a.txt": "one"}).read_bytes()
    two = tar_of(tmp_path / "two.tar", {"b.png": PNG, "b.txt": "two"}).read_bytes()
    write(tmp_path / "source", {"x.tar": one + two, "y.tar.gz": gzip.compress(one) + gzip.compress(two)})
    assert captions_in(tmp_path / "source") == {
        "x.tar:a.png": ["one"],
        "x.tar:b.png": ["two"],
        "y.tar.gz:a.png": ["one"],
        "y.tar.gz:b.png": ["two"],
    }


def test_data_behind_the_end_of_a_tar_is_reported(tmp_path):
    data = tar_of(tmp_path / "x.tar", {"a.png": PNG}).read_bytes()
    (tmp_path / "x.tar").write_bytes(data + b"garbage" * 200)
    _, account = read_records(tmp_path / "x.tar")
    assert account.skipped == {"data behind the end of a tar": (1, f"x.tar at byte {len(data):,}")}


def test_hard_links_are_the_files_that_they_name(tmp_path):
    members = [
        ("pool/1.png", picture(1)),
        (link("train/a.png", "pool/1.png", tarfile.LNKTYPE), b""),
        ("train/a.txt", "linked"),
        (link("train/b.png", "pool/none.png", tarfile.LNKTYPE), b""),
    ]
    records, account = read_records(tar_of(tmp_path / "x.tar", members))
    assert {r.locator: (r.data, r.captions) for r in records} == {
        "x.tar:pool/1.png": (picture(1), []),
        "x.tar:train/a.png": (picture(1), ["linked"]),
    }
    assert account.skipped == {"hard link to no member": (1, "x.tar:train/b.png")}


def test_metadata_inside_a_tar_names_its_members(tmp_path):
    members = {
        "data/a.png": PNG,
        "data/b.png": PNG,
        "data/metadata.jsonl": '{"file_name": "a.png", "text": "in"}\n{"file_name": "data/b.png", "prompt": "side"}\n',
    }
    tar_of(tmp_path / "x.tar", members)
    assert captions_in(tmp_path) == {"x.tar:data/a.png": ["in"], "x.tar:data/b.png": ["side"]}


@pytest.mark.parametrize("name", ["a.png", "x.tar/a.png", "x/a.png", "./a.png"])
def test_metadata_beside_a_tar_names_its_members(tmp_path, name):
    tar_of(tmp_path / "x.tar", {"a.png": PNG, "b.png": PNG})
    write(tmp_path, {"metadata.csv": f"file_name,text\n{name},beside\n"})
    assert captions_in(tmp_path) == {"x.tar:a.png": ["beside"], "x.tar:b.png": []}


def test_metadata_beside_two_tars_with_one_name_is_ambiguous_until_it_names_the_tar(tmp_path):
    for tar in ("x", "y"):
        tar_of(tmp_path / f"{tar}.tar", {"a.png": picture(ord(tar)), "only.png" if tar == "x" else "b.png": PNG})
    write(tmp_path, {"metadata.csv": "file_name,text\na.png,whose\nonly.png,one\n"})
    captions = captions_in(tmp_path)
    assert captions["x.tar:a.png"] == captions["y.tar:a.png"] == "ambiguous_caption"
    assert captions["x.tar:only.png"] == ["one"] and captions["y.tar:b.png"] == []
    write(tmp_path, {"metadata.csv": "file_name,text\nx/a.png,of x\ny/a.png,of y\n"})
    captions = captions_in(tmp_path)
    assert captions["x.tar:a.png"] == ["of x"] and captions["y.tar:a.png"] == ["of y"]


def test_the_scan_indexes_a_tar_next_to_a_table_once(tmp_path, monkeypatch):
    """A remote tar is downloaded for it, although its images claim rows before any row is assigned."""
    source = tmp_path / "source"
    tar_of(source / "x.tar", {"a.png": PNG, "b.png": PNG})
    write(source, {"metadata.csv": "file_name,text\na.png,beside\n"})
    indexed, real = [], scan.tars.samples
    monkeypatch.setattr(scan.tars, "samples", lambda *args: indexed.append(args[0]) or real(*args))
    scan.write_corpus(SourceConfig(), str(source), tmp_path / "corpus")
    assert indexed == [f"{source}/x.tar"]


def test_broken_metadata_inside_a_tar_names_tar_member_and_line(tmp_path):
    tar_of(tmp_path / "x.tar", {"a.png": PNG, "metadata.csv": "file_name,text\na.png,one,two\n"})
    refused(tmp_path, f"{tmp_path}/x.tar:metadata.csv, line 2", "3 fields")
    tar_of(tmp_path / "x.tar", {"a.png": PNG, "metadata.csv": "file_name,text\nb.png,one\n"})
    refused(tmp_path, "x.tar:metadata.csv", "1 row", "name no image", "b.png")


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_the_images_of_a_tar_whose_table_has_no_captions_name_its_columns_unless_they_have_texts(tmp_path, place):
    members = {"a.png": PNG, "b.png": PNG, "b.txt": "own", "images/c.png": PNG, "captions/c.txt": "apart", "d.png": PNG}
    table = "file_name,blurb\na.png,one\nb.png,two\nimages/c.png,three\n"
    tar_of(tmp_path / "x.tar", members | ({"metadata.csv": table} if place == "inside" else {}))
    if place == "beside":
        write(tmp_path, {"metadata.csv": table})
    captions = {"x.tar:a.png": [], "x.tar:b.png": ["own"], "x.tar:images/c.png": ["apart"], "x.tar:d.png": []}
    assert captions_in(tmp_path) == captions
    details = details_in(tmp_path)
    name = "x.tar:metadata.csv" if place == "inside" else "metadata.csv"
    assert details.pop("x.tar:a.png").startswith(f"{name} has columns file_name, blurb; it needs a caption column")
    assert not any(details.values())


def test_a_tar_that_is_none_or_is_cut_off_is_named(tmp_path):
    data = tar_of(tmp_path / "x.tar", {f"{i}.png": picture(i) for i in range(6)}).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        third = tar.getmembers()[3].offset
    broken = data[:third] + b"\xff" * 512 + data[third + 512 :]
    for content in (
        data[: third + 100],
        data[: third + 600],
        data[:third],
        broken,
        b"no tar" * 200,
        b"",
        b"\x1f\x8b broken",
    ):
        (tmp_path / "x.tar").write_bytes(content)
        refused(tmp_path, str(tmp_path / "x.tar"), "not a readable tar")
    for kind in ("gz", "bz2", "xz"):
        whole = tar_of(tmp_path / "x.tar", {"a.png": PNG}, f"w:{kind}").read_bytes()
        (tmp_path / "x.tar").write_bytes(whole[: len(whole) // 2])
        refused(tmp_path, str(tmp_path / "x.tar"), "not a readable tar")


@pytest.mark.slow
def test_headers_over_a_mebibyte_are_refused_before_they_are_kept(tmp_path):
    for name, flag in (("long", b"L"), ("pax", b"x"), ("global", b"g")):
        info = tarfile.TarInfo("x")
        info.size, info.type = 2**26, flag
        block = info.tobuf(tarfile.USTAR_FORMAT)
        write(tmp_path / name, {"x.tar.gz": gzip.compress(block + b"a" * 2**26 + bytes(1024), 1)})
        tracemalloc.start()
        refused(tmp_path / name, "header of 67,108,864 bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4294967296"}
    tar_of(tmp_path / "x.tar", [(info, PNG)], format=tarfile.PAX_FORMAT)
    refused(tmp_path / "x.tar", "sparse member 'a.png'", "--sparse")


@pytest.mark.parametrize("kind", slow_except(["gz"], ["gz", "bz2", "xz"]))
def test_an_archive_that_decompresses_to_far_more_than_it_has_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tar_format, "RATIO_FREE_BYTES", 2**20)
    info = tarfile.TarInfo("a.png")
    info.size = 2**24
    with tarfile.open(tmp_path / f"x.tar.{kind}", f"w:{kind}") as tar:
        tar.addfile(info, io.BytesIO(bytes(2**24)))
    refused(tmp_path, f"x.tar.{kind}", "decompresses to more than")


@pytest.mark.slow
def test_a_member_over_the_cap_is_a_problem_of_its_own(tmp_path):
    info = tarfile.TarInfo("big.png")
    info.size = MAX_IMAGE_BYTES + 1
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + MAX_IMAGE_BYTES + 512)
        end = tar_of(tmp_path / "end.tar", {"a.png": PNG, "a.txt": "a"})
        file.write(end.read_bytes())
    end.unlink()
    records, _ = read_records(tmp_path)
    assert [(r.locator, r.problem) for r in records] == [("x.tar:big.png", "unreadable_file"), ("x.tar:a.png", "")]


def test_a_tar_without_images_beside_others_is_no_error(tmp_path):
    tar_of(tmp_path / "x.tar", {"readme.md": "x"})
    tar_of(tmp_path / "y.tar", {"a.png": PNG})
    assert list(captions_in(tmp_path)) == ["y.tar:a.png"]
    assert left_out(tmp_path) == {".md": 1}


@pytest.mark.slow
def test_zeros_between_and_behind_archives_are_passed_over_up_to_a_bound(tmp_path, monkeypatch):
    one = tar_of(tmp_path / "one.tar", {"a.png": PNG}).read_bytes()
    two = tar_of(tmp_path / "two.tar", {"b.png": PNG}).read_bytes()
    for gap in (0, 512, 2**20 - 512, 2**20, 3 * 2**20 + 512):
        for pack in (bytes, gzip.compress):
            monkeypatch.setattr(tar_format, "MAX_RATIO", 10_000)
            (tmp_path / "x.tar").write_bytes(pack(one + bytes(gap) + two + bytes(gap)))
            assert list(captions_in(tmp_path / "x.tar")) == ["x.tar:a.png", "x.tar:b.png"]
    monkeypatch.setattr(tar_format, "MAX_ZEROS", 2**20)
    refused(tmp_path / "x.tar", "of zeros behind its end")


@pytest.mark.parametrize("suffix", [".tgz", ".taz", ".tbz2", ".tbz", ".tb2", ".txz", ".tlz", ".TAR.BZ2", ".tar.lzma"])
def test_every_usual_suffix_of_a_compressed_tar_is_read_and_left_out_of_names(tmp_path, suffix):
    plain = tar_of(tmp_path / "x", {"a.png": PNG}).read_bytes()
    pack = {"g": gzip.compress, "a": gzip.compress, "b": bz2.compress, "x": lzma.compress}
    pack["l"] = lambda data: lzma.compress(data, lzma.FORMAT_ALONE)
    kind = suffix.lower().removeprefix(".tar").lstrip(".").removeprefix("t")[0]
    write(tmp_path / "source", {f"x{suffix}": pack[kind](plain), "metadata.csv": "file_name,text\nx/a.png,one\n"})
    assert captions_in(tmp_path / "source") == {f"x{suffix}:a.png": ["one"]}
    assert left_out(tmp_path / "source") == {}


def test_a_zstd_tar_is_left_out_by_name_with_what_to_do(tmp_path):
    zstd = b"\x28\xb5\x2f\xfd" + bytes(600)
    write(tmp_path, {"a.png": PNG, "x.tar.zst": zstd, "y.TZST": zstd})
    _, account = read_records(tmp_path)
    assert account.skipped == {"zstd tar; decompress it with `zstd -d`": (2, "x.tar.zst")}
    write(tmp_path, {"x.tar": zstd})
    refused(tmp_path, f"{tmp_path}/x.tar", "zstd -d")
