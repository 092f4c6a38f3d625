import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from tasks.curation.curate import curate, score_shard

from tasks.curation import curate as curate_module
from tasks.curation import ledger, records
from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig, TierConfig
from tasks.curation.shards import RECORDS_SCHEMA, Record, ShardWriter, read_records, shard_name
from tasks.curation.sources.made import defects

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.1))


def png(seed: int, size=(64, 64)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, (250, 250, 250))
    x, y = rng.integers(4, 30, 2)
    ImageDraw.Draw(image).ellipse((x, y, x + 24, y + 24), fill=tuple(int(v) for v in rng.integers(0, 200, 3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_records(path: Path, items: list[tuple[int, Record]]) -> Path:
    path.mkdir()
    rows = []
    for shard in sorted({shard for shard, _ in items}):
        with ShardWriter(path / shard_name(shard)) as writer:
            for of, record in items:
                if of == shard:
                    writer.add(record)
                    rows.append(record.row(shard))
    pq.write_table(pa.Table.from_pylist(rows, RECORDS_SCHEMA), path / "records.parquet")
    return path


def record(key: str, data: bytes, captions=("a circle", "a photo of a circle"), source="user") -> Record:
    return Record(key, data, {"captions": list(captions), "source": source, "meta": {"note": key}}, "png")


def run(records_dir: Path, shards: list[int], out: Path, config: CurationConfig = CONFIG) -> dict:
    score_dirs = []
    for shard in shards:
        score_dirs.append(out / f"scores-{shard}")
        score_dirs[-1].mkdir(parents=True)
        score_shard(records_dir, shard, config, score_dirs[-1])
    (out / "curated").mkdir()
    return curate(records_dir, score_dirs, config, out / "curated")


@pytest.fixture
def small(tmp_path):
    items = [(i % 2, record(f"good-{i}", png(i))) for i in range(12)]
    items += [
        (0, record("twin", png(3))),
        (1, record("silent", png(100), captions=["", "  "])),
        (1, record("no-image", b"<html>", captions=["<script>alert(1)</script>"])),
        (2, record("blank", png(0)[:60])),
    ]
    return write_records(tmp_path / "records", items)


def test_every_record_is_in_the_ledger_once_and_kept_ones_keep_their_bytes(small, tmp_path):
    report = run(small, [0, 1, 2], tmp_path)
    book = pd.read_parquet(tmp_path / "curated" / "ledger.parquet").set_index("key")
    table = pd.read_parquet(small / "records.parquet").set_index("key")
    assert list(book.index) == list(table.index)
    assert report["input"] == 16 == report["kept"] + sum(report["rejected"].values())
    assert book.loc["silent", "rule"] == "no_caption"
    assert book.loc["no-image", "rule"] == "undecodable" and book.loc["blank", "rule"] == "undecodable"
    assert sorted(book.loc[["twin", "good-3"], "rule"]) == ["", "exact_duplicate"]
    kept = {item.key: item for item in read_records(tmp_path / "curated")}
    assert set(kept) == set(book.index[book["kept"]])
    for item in kept.values():
        assert hashlib.sha256(item.data).hexdigest() == table.loc[item.key, "record_id"]
        assert item.sidecar["meta"] == {"note": item.key}
    assert not (tmp_path / "curated" / shard_name(2)).exists()


def test_curated_records_carry_scores_tier_bucket_captions_and_split(small, tmp_path):
    run(small, [0, 1, 2], tmp_path)
    curated = pd.read_parquet(tmp_path / "curated" / "records.parquet")
    needed = "key record_id shard ext width height source synthetic entropy_bits phash watermark aesthetic"
    assert {*needed.split(), "tier", "bucket", "captions", "split"} <= set(curated.columns)
    assert set(curated["tier"]) <= {"A1", "A2", "A3", "A4", "A5"}
    assert set(curated["bucket"]) <= {f"user-{i}" for i in range(4)}
    assert all(curated["split"] == [ledger.split(i) for i in curated["record_id"]])
    sidecars = {item.key: item.sidecar for item in read_records(tmp_path / "curated")}
    for row in curated.itertuples():
        assert 1 <= len(row.captions) <= CONFIG.captions.per_tier[row.tier]
        assert sidecars[row.key]["captions"] == list(row.captions)
        assert (sidecars[row.key]["tier"], sidecars[row.key]["bucket"]) == (row.tier, row.bucket)


def test_the_same_input_gives_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        run(small, [0, 1, 2] if name == "a" else [2, 0, 1], tmp_path / name)
    for file in sorted((tmp_path / "a" / "curated").rglob("*")):
        if file.is_file():
            other = tmp_path / "b" / "curated" / file.relative_to(tmp_path / "a" / "curated")
            assert file.read_bytes() == other.read_bytes(), file.name


def test_a_new_threshold_decodes_nothing_again(small, tmp_path, monkeypatch):
    run(small, [0, 1, 2], tmp_path)

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(curate_module, "score_record", decode)
    monkeypatch.setattr(curate_module.report, "picture", lambda *_: "")
    strict = CONFIG.model_copy(update={"tiers": TierConfig(thresholds=(0.4, 0.3, 0.2, 0.1))})
    (tmp_path / "again").mkdir()
    report = curate(small, [tmp_path / f"scores-{i}" for i in range(3)], strict, tmp_path / "again")
    assert report["tiers"]["A1"] == report["kept"] > 0


def test_the_report_is_self_contained_and_escaped(tmp_path):
    items = [(0, record(f"good-{i}", png(i), captions=["<b>bold</b> & 'more'"])) for i in range(5)]
    items.append((0, record("<img src=x onerror=alert(1)>"[:20].replace("/", ""), png(1, (16, 16)))))
    report = run(write_records(tmp_path / "records", items), [0], tmp_path)
    page = (tmp_path / "curated" / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "<script" not in page and not re.search(r"""(src|href)=["']?(http|//)""", page)
    for word in ("min_side", "max_watermark_score", "Thresholds", "data:image/png;base64", "<svg", "A5", "user-0"):
        assert word in page
    assert json.loads((tmp_path / "curated" / "report.json").read_text()) == report


def test_a_bare_twin_does_not_displace_one_with_captions(tmp_path):
    items = [(0, record("bare", png(1), captions=[])), (0, record("told", png(1)))]
    run(write_records(tmp_path / "records", items), [0], tmp_path)
    book = pd.read_parquet(tmp_path / "curated" / "ledger.parquet").set_index("key")
    assert list(book.loc[["bare", "told"], "rule"]) == ["no_caption", ""]


def test_an_image_repeated_for_each_of_its_captions_keeps_them_all(tmp_path):
    items = [(i % 2, record(f"row-{i}", png(1), captions=[text])) for i, text in enumerate(["one", "two words", "One"])]
    report = run(write_records(tmp_path / "records", items), [0, 1], tmp_path)
    assert report["kept"] == 1 and report["rejected"]["exact_duplicate"] == 2
    (row,) = pd.read_parquet(tmp_path / "curated" / "records.parquet").to_dict("records")
    assert list(row["captions"]) == ["one", "two words"]


def test_captions_that_are_all_too_long_say_so(tmp_path):
    limit = CONFIG.captions.max_words
    items = [
        (0, record("long", png(1), captions=["word " * (limit + 3), "", "word " * (limit + 1)])),
        (0, record("bare", png(2), captions=[" "])),
    ]
    source = write_records(tmp_path / "records", [*items, (0, record("told", png(3)))])
    run(source, [0], tmp_path)
    book = pd.read_parquet(tmp_path / "curated" / "ledger.parquet").set_index("key")
    assert book.loc["long", "detail"] == f"every caption is over max_words {limit} (the shortest has {limit + 1})"
    assert list(book.loc[["long", "bare"], "rule"]) == ["no_caption", "no_caption"]
    assert book.loc["bare", "detail"] == "no caption is left"


def test_scores_that_do_not_fit_the_records_are_refused(small, tmp_path):
    for shard in (0, 1, 2):
        (tmp_path / f"s{shard}").mkdir()
        score_shard(small, shard, CONFIG, tmp_path / f"s{shard}")
    (tmp_path / "out").mkdir()
    dirs = [tmp_path / f"s{i}" for i in range(3)]
    with pytest.raises(ValueError, match="records have no scores: score shards 1"):
        curate(small, [dirs[0], dirs[2]], CONFIG, tmp_path / "out")
    with pytest.raises(ValueError, match="scored more than once"):
        curate(small, [*dirs, dirs[0]], CONFIG, tmp_path / "out")
    other = write_records(tmp_path / "other", [(0, record("good-0", png(50)))])
    with pytest.raises(ValueError, match="of other records|other bytes"):
        curate(other, dirs, CONFIG, tmp_path / "out")
    with pytest.raises(ValueError, match="has no shard 9; it has 0, 1, 2"):
        score_shard(small, 9, CONFIG, tmp_path / "out")


def test_nothing_left_is_one_clear_error(tmp_path):
    items = [(0, record(f"text-{i}", b"hello")) for i in range(3)]
    with pytest.raises(ValueError, match=r"kept none of 3 records \(undecodable 3\)"):
        run(write_records(tmp_path / "records", items), [0], tmp_path)


def test_a_directory_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a records directory"):
        score_shard(tmp_path, 0, CONFIG, tmp_path)


def test_an_empty_shard_is_scored_as_empty(tmp_path):
    source = write_records(tmp_path / "records", [(0, record("good", png(1)))])
    with ShardWriter(source / shard_name(1)):
        pass
    report = run(source, [0, 1], tmp_path)
    assert report["kept"] == 1


def test_a_record_whose_bytes_changed_is_refused(small, tmp_path):
    path = small / shard_name(0)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="are not those that records.parquet names"):
        score_shard(small, 0, CONFIG, tmp_path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Scenes with planted defects, and digits, through the whole of curation: (truth joined with ledger, report)."""
    home = tmp_path_factory.mktemp("planted")
    (home / "records").mkdir()
    source = SourceConfig(scenes=400, digits=60, scene_size_px=128, defect_fraction=0.6, shards=2, seed=5)
    records.make_records(source, home / "records")
    report = run(home / "records", [0, 1], home)
    book = pd.read_parquet(home / "curated" / "ledger.parquet")
    truth = pd.read_parquet(home / "records" / "truth.parquet")
    return book.merge(truth.drop(columns="detail"), on="key", how="left").set_index("key"), report


EXPECTED = {
    "truncated": {"undecodable"},
    "corrupt": {"undecodable"},
    "text_file": {"undecodable"},
    "blank": {"single_color"},
    "near_uniform": {"single_color"},
    "tiny": {"min_side"},
    "extreme_aspect": {"aspect_ratio"},
    "watermark": {"watermark"},
    "border": {"border"},
}


@pytest.mark.parametrize("defect", EXPECTED)
def test_a_planted_defect_is_caught_by_its_rule(planted, defect):
    rows = planted[0][planted[0]["defect"] == defect]
    assert len(rows) == 20
    assert rows["rule"].isin(EXPECTED[defect]).mean() >= 0.95, rows["rule"].value_counts().to_dict()


@pytest.mark.parametrize("defect", defects.DUPLICATES)
def test_of_planted_duplicates_one_stays(planted, defect):
    book = planted[0]
    rows = book[book["defect"] == defect]
    merged = [not (kept and book.loc[of, "kept"]) for kept, of in zip(rows["kept"], rows["original"], strict=True)]
    assert np.mean(merged) >= (1.0 if defect == "exact_duplicate" else 0.9)


def test_clean_scenes_digits_and_rotated_ones_are_kept(planted):
    book, report = planted
    duplicated = set(book.loc[book["defect"].isin(defects.DUPLICATES), "original"])
    clean = book[book["defect"].isin(["", *defects.KEPT]) & ~book.index.isin(duplicated)]
    lost = clean[~clean["kept"]]
    assert len(lost) <= 0.005 * len(clean), lost[["rule", "detail"]].to_dict()
    assert book[book["defect"].isna()]["kept"].all(), "a digit was rejected"
    assert report["input"] == len(book) == report["kept"] + sum(report["rejected"].values())
