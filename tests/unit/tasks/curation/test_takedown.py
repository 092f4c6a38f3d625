"""A list of records that must not be used: curation leaves them out, and names the artifacts that have them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import picture, png, write_folder

from tasks.curation import flow, takedown
from tasks.curation.captioning.run import CAPTIONS_TABLE
from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig
from tasks.curation.curated import open_curated
from tasks.curation.scoring.score import SCORES_TABLE, THUMBNAILS_TABLE
from tasks.curation.scoring.scored_shard import fetch_pictures
from tasks.manifest import load_manifest
from tasks.store import Part, fetch_part, make_part, make_sealed, read_index

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05))


pytestmark = pytest.mark.usefixtures("home")


def sha(seed: int) -> str:
    return hashlib.sha256(png(seed)).hexdigest()


def curate(source: Path, entries: list[str] | None = None) -> Path:
    config = CONFIG
    if entries is not None:
        path = source.parent / "takedown.txt"
        path.write_text("\n".join(entries))
        config = CONFIG.model_copy(update={"takedown": str(path)})
    return flow.curate_source(SourceConfig(images_per_shard=3), str(source), config)[0]


def kept(curated: Path) -> set[str]:
    read = open_curated(curated)
    return {name for part in read.parts() for name in read.selection(part)["locator"].to_pylist()}


@pytest.mark.slow
def test_records_are_left_out_by_id_key_and_file_with_a_rule_of_their_own(tmp_path):
    source = write_folder(tmp_path / "source", range(8))
    key = pd.read_parquet(curate(source) / "ledger.parquet").set_index("file")["key"]["p001.png"]
    curated = curate(source, ["# removed by request", sha(0).upper(), f"{key}  # by its key", "p002.png", "", sha(99)])
    book = pd.read_parquet(curated / "ledger.parquet").set_index("file")
    assert len(book) == 8 and book["rule"].value_counts().to_dict() == {"": 5, "takedown": 3}
    assert kept(curated) == {f"p00{i}.png" for i in range(3, 8)}
    report = json.loads((curated / "report.json").read_text())
    assert report["rejected"]["takedown"] == 3 and report["kept"] == 5


@pytest.mark.slow
def test_every_copy_of_the_bytes_is_left_out(tmp_path):
    source = write_folder(tmp_path / "source", range(4))
    (source / "copy.png").write_bytes(png(0))
    (source / "copy.txt").write_text("the same picture")
    book = pd.read_parquet(curate(source, [sha(0)]) / "ledger.parquet").set_index("file")
    assert book.loc[["p000.png", "copy.png"], "rule"].tolist() == ["takedown"] * 2


@pytest.mark.slow
def test_the_small_picture_of_a_record_is_not_in_what_is_made_afterwards(tmp_path):
    source = write_folder(tmp_path / "source", range(3))
    before, after = curate(source), curate(source, [sha(1)])
    assert "takedown" in (after / "report.html").read_text()
    for curated, expected in ((before, 3), (after, 2)):
        pictures = 0
        for part in read_index(curated):
            (scores,) = load_manifest(fetch_part(part)).parents
            path = fetch_pictures(part._replace(kind=scores.kind, digest=scores.digest, uri=scores.uri))
            pictures += len(pd.read_parquet(path / THUMBNAILS_TABLE))
        assert pictures == expected


@pytest.mark.slow
def test_a_shard_that_has_no_record_of_the_list_keeps_its_parts(tmp_path, home):
    source = write_folder(tmp_path / "source", range(9))
    curate(source)

    def parts() -> set[str]:
        return {path.name for path in (home / "artifacts" / "selections").iterdir()}

    known = parts()
    curated = curate(source, [sha(0)])
    new = {part.digest for part in read_index(curated)} - known
    assert len(new) == 1 < len(list(read_index(curated)))


def test_only_the_scores_are_read_to_look_for_the_records_of_a_list():
    def make(out: Path) -> int:
        row = {"row": 0, "record_id": sha(0), "key": "k", "locator": "p000.png", "problem": ""}
        pq.write_table(pa.Table.from_pylist([row]), out / SCORES_TABLE)
        for name in (THUMBNAILS_TABLE, CAPTIONS_TABLE):
            (out / name).write_text("a large table")
        return 1

    parts = [make_part("captions", "0", "1", {}, make), Part("1", "captions", error="no such file")]
    directory = fetch_part(parts[0])
    for name in (THUMBNAILS_TABLE, CAPTIONS_TABLE):
        (directory / name).unlink()
    assert takedown.remove(parts, [sha(1)]) == parts


def test_a_list_that_cannot_be_read_or_is_empty_is_refused(tmp_path):
    source = write_folder(tmp_path / "source", range(3))
    with pytest.raises(ValueError, match="names no record"):
        curate(source, ["# nothing"])
    with pytest.raises(ValueError, match="does not exist"):
        takedown.read_list(str(tmp_path / "no.txt"))
    for device in ("/dev/zero", str(tmp_path)):
        with pytest.raises(ValueError, match="is not a file"):
            takedown.read_list(device)
    (tmp_path / "link.txt").symlink_to(tmp_path / "huge.txt")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(takedown.MAX_LIST_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 1024 MiB"):
        takedown.read_list(str(tmp_path / "link.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        takedown.read_list(str(tmp_path / "binary"))
    (tmp_path / "urls.txt").write_text("https://a.test/b.png#c # a comment\n")
    assert takedown.read_list(str(tmp_path / "urls.txt")) == ["https://a.test/b.png#c"]


@pytest.mark.slow
def test_the_command_names_artifacts_pipelines_and_near_duplicates(tmp_path, home, capsys):
    source = write_folder(tmp_path / "source", range(5))
    picture(0).save(source / "z.jpg", quality=85)  # near to p000.png
    (source / "z.txt").write_text("saved again")
    curated = curate(source)
    assert pd.read_parquet(curated / "ledger.parquet").set_index("file")["rule"]["z.jpg"] == "near_duplicate"

    def sealed(kind: str, parents: list[Path]) -> Path:
        return make_sealed(kind, lambda out: (out / "weights.txt").write_text(kind), parents)[0]

    merged = sealed("merged", [curated])
    pipeline = sealed("pipeline", [merged, curated])
    path = tmp_path / "list.txt"
    path.write_text(f"{sha(0)}\np001.png\n{sha(77)}\n")
    assert takedown.main([str(path), str(home)]) == 1
    out = capsys.readouterr().out
    for directory in (curated, merged, pipeline):
        assert load_manifest(directory).digest in out
    assert "near duplicate: z.jpg" in out and f"{sha(77)}: 0 artifacts had it" in out
    assert "3 records on the list, 2 of them used; 1 published pipelines had one" in out
    assert takedown.main([str(path), str(home), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["record"] for line in lines] == [sha(0), "p001.png", sha(77)]
    assert lines[0]["near_duplicates"][0]["file"] == "z.jpg"
    path.write_text(sha(77))
    assert takedown.main([str(path), str(home)]) == 0
    assert takedown.main([str(path), str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_near_duplicates_are_named_whatever_their_files_are_called(tmp_path, home, capsys):
    source = write_folder(tmp_path / "source", range(3))
    for suffix in (".png", ".txt"):
        (source / f"p000{suffix}").rename(source / f"a card from rome with love{suffix}")
    picture(0).save(source / "z.jpg", quality=85)
    (source / "z.txt").write_text("saved again")
    detail = pd.read_parquet(curate(source) / "ledger.parquet").set_index("file")["detail"]["z.jpg"]
    assert detail.endswith(" from a card from rome with love.png")
    (tmp_path / "list.txt").write_text(sha(0))
    takedown.main([str(tmp_path / "list.txt"), str(home)])
    assert "near duplicate: z.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "detail",
    [
        "embedding has cosine 0.97 with {}",
        "pHash-256 differs in 3 of 256 bits from {}",
        "thumbnail differs by 1.5 from {}",
    ],
)
def test_a_near_duplicate_is_named_however_it_was_matched(detail, monkeypatch):
    keeper, sentence = "kept from with.png", detail.format("kept from with.png")
    row = {"record_id": "b" * 64, "key": "k", "file": "copy.png", "rule": takedown.NEAR, "detail": sentence}
    kept = {"record_id": "a" * 64, "key": "l", "file": keeper, "rule": "", "detail": ""}
    monkeypatch.setattr(takedown, "_ledger", lambda uri, rule: [row] if rule else [kept, row])
    uses = {"a" * 64: [takedown.RecordUse("curated", "d" * 64, "here", True, "")]}
    assert takedown._near_duplicates(["a" * 64], uses) == {"a" * 64: {("b" * 64, "copy.png")}}


@pytest.mark.slow
def test_after_the_takedown_nothing_new_has_the_record(tmp_path, home):
    source = write_folder(tmp_path / "source", range(5))
    curated = curate(source, [sha(0)])
    pipeline = make_sealed("pipeline", lambda out: (out / "weights.txt").write_text("-"), [curated])[0]
    (result,) = takedown.find([sha(0)], [str(home)])
    assert load_manifest(pipeline).digest not in {use.digest for use in result.uses}
    assert {use.kind for use in result.uses if use.has} <= {"measured", "columns", "scores"}  # from before the list
    assert any(use.kind == "curated" and not use.has and "takedown" in use.why for use in result.uses)


@pytest.mark.slow
def test_an_image_is_taken_down_by_its_url(tmp_path, monkeypatch):
    from image_site import image_site

    from tasks.curation.config import UrlConfig

    with image_site(monkeypatch) as site:
        urls = [site.url(f"/ok/{i}.png") for i in range(3)]
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "urls.csv").write_text("url,text\n" + "".join(f"{url},a picture\n" for url in urls))
        path = tmp_path / "takedown.txt"
        path.write_text(urls[1])
        config = CONFIG.model_copy(update={"takedown": str(path)})
        source = SourceConfig(urls=UrlConfig(allow_http=True))
        curated, _ = flow.curate_source(source, str(tmp_path / "source"), config)
    assert kept(curated) == {urls[0], urls[2]}
