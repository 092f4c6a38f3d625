"""Every record is kept, or has the first rule that rejected it; what is left out is counted and named."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from own_images import picture, png, write_folder
from planted_pictures import check_table, precision_and_recall
from score_tables import good_row, records_of

from tasks.curation import check, flow, replay
from tasks.curation.config import CaptionConfig, CaptionerConfig, CurationConfig, FilterConfig, SourceConfig, TierConfig
from tasks.curation.curated import open_curated
from tasks.curation.decisions import decide as decide_module
from tasks.curation.decisions import rules
from tasks.curation.scoring import decoding, score
from tasks.curation.sources.base import PROBLEMS
from tasks.curation.sources.made import defects
from tasks.recipe import load_recipe
from tasks.store import fetch_part, make_sealed

CONFIG = CurationConfig(
    filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05), tiers=TierConfig(accept_proxy=True)
)


pytestmark = pytest.mark.usefixtures("home")


def decide(folder: Path, config: CurationConfig = CONFIG, source: SourceConfig | None = None) -> Path:
    _, part = flow.curate_source(source or SourceConfig(images_per_shard=5), str(folder), config, until="decisions")
    return fetch_part(part)


def book_of(decision: Path) -> pd.DataFrame:
    return pd.read_parquet(decision / "ledger.parquet").set_index("file", drop=False)


def make_folder(folder: Path) -> Path:
    write_folder(folder, range(10))
    (folder / "twin.png").write_bytes(png(3))
    (folder / "twin.txt").write_text("another caption of it")
    (folder / "silent.png").write_bytes(png(100))
    (folder / "page.png").write_bytes(b"<html>")
    (folder / "page.txt").write_text("<script>alert(1)</script>")
    (folder / "cut.png").write_bytes(png(101)[:200])
    (folder / "cut.txt").write_text("cut off")
    (folder / "long.png").write_bytes(png(102))
    (folder / "long.txt").write_text("word " * 300)
    (folder / "latin.png").write_bytes(png(103))
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "IMG.CR2").write_bytes(b"raw")
    (folder / "notes.docx").write_bytes(b"docx")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def decided(tmp_path_factory) -> tuple[Path, Path]:
    """(folder, decision on its images), for tests that change neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCLEUS_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("NUCLEUS_STORE", raising=False)
        folder = make_folder(tmp_path_factory.mktemp("source") / "images")
        return folder, decide(folder)


def test_every_record_is_in_the_ledger_once_with_the_file_that_its_owner_knows(decided):
    folder, decision = decided
    book = book_of(decision)
    report = json.loads((decision / "report.json").read_text())
    assert len(book) == 16 == report["input"] == report["kept"] + sum(report["rejected"].values())
    assert book["file"].is_unique and set(book["file"]) == {p.name for p in folder.glob("*.png")}
    fates = book["rule"].to_dict()
    assert {name: fates[name] for name in ("silent.png", "page.png", "cut.png", "long.png", "latin.png")} == {
        "silent.png": "no_caption",
        "page.png": "undecodable",
        "cut.png": "undecodable",
        "long.png": "caption_too_long",
        "latin.png": "unreadable_caption",
    }
    assert sorted([fates["twin.png"], fates["p003.png"]]) == ["", "exact_duplicate"]
    assert book.loc["twin.png", "detail"] == "same bytes as p003.png"
    assert book.loc["long.png", "detail"] == "every caption is over max_words 200 (the shortest has 300)"
    assert (book["kept"] == (book["rule"] == "")).all()


def test_every_file_of_the_source_is_accounted_for(decided):
    folder, decision = decided
    account = json.loads((decision / "report.json").read_text())["account"]
    assert account["seen"] == len(list(folder.iterdir()))
    assert account["seen"] == account["used"] + sum(count for count, _ in account["skipped"].values())
    assert account["records"] == len(book_of(decision))
    assert account["skipped"] == {".docx": [1, "notes.docx"], ".cr2": [1, "IMG.CR2"]}
    page = (decision / "report.html").read_text()
    assert "notes.docx" in page and "IMG.CR2" in page


def test_the_summary_line_names_what_was_left_out_with_an_example_each(decided):
    _, decision = decided
    line = flow.result_line(decision, None, CONFIG)
    assert "kept 10 of 16 records" in line and "2 x undecodable (cut.png)" in line
    assert "1 x .cr2 (IMG.CR2)" in line and "1 x .docx (notes.docx)" in line


def test_nothing_left_keeps_ledger_and_report_and_names_causes_and_remedies(tmp_path):
    folder = write_folder(tmp_path / "images", range(3), caption="word " * 20)
    (folder / "bare.png").write_bytes(png(9))
    limit = CONFIG.model_copy(update={"captions": CaptionConfig(max_words=14)})
    with pytest.raises(ValueError) as caught:
        flow.curate_source(SourceConfig(), str(folder), limit)
    message = str(caught.value)
    assert "kept none of 4 records: caption_too_long 3 (such as p000.png: every caption is over max_words 14" in message
    assert "have 20 words: raise curation.captions.max_words=14" in message
    assert "no_caption 1 (such as bare.png" in message and "source.caption_columns" in message
    kept = Path(re.search(r"Ledger and report: (\S+)", message)[1])
    assert len(book_of(kept)) == 4 and "<html" in (kept / "report.html").read_text()


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    made = []
    for name in ("a", "b"):
        monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / name))
        made.append(decide(folder))
    files = [p.relative_to(made[0]) for p in made[0].rglob("*") if p.is_file() and p.name != "manifest.json"]
    for name in files:
        if name.name != "locations.parquet":
            assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes(), name


@pytest.mark.slow
def test_deciding_again_reads_no_image(folder, monkeypatch):
    decide(folder)
    monkeypatch.setattr(score, "measure", None)
    monkeypatch.setattr(decoding, "decode", None)
    strict = CONFIG.model_copy(update={"tiers": TierConfig(thresholds=(0.4, 0.3, 0.2, 0.1))})
    report = json.loads((decide(folder, strict) / "report.json").read_text())
    assert report["tiers"]["A1"] == report["kept"] > 0


@pytest.mark.slow
def test_the_report_is_self_contained_and_escaped(tmp_path):
    folder = write_folder(tmp_path / "images", range(5), caption="<b>bold</b> & 'more' {}")
    (folder / "<img src=x onerror=1>.png").write_bytes(png(50, (16, 16)))
    (folder / "<img src=x onerror=1>.txt").write_text("small")
    page = (decide(folder) / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "<script" not in page and not re.search(r"""(src|href)=["']?(http|//)""", page)
    for word in ("min_side", "max_watermark_score", "Thresholds", "data:image/jpeg;base64", "<svg", "A5", "Shapes"):
        assert word in page


@pytest.mark.slow
def test_a_bare_twin_does_not_displace_one_with_captions(tmp_path):
    folder = write_folder(tmp_path / "images", [1])
    (folder / "a.png").write_bytes(png(1))
    assert book_of(decide(folder))["rule"].to_dict() == {"a.png": "no_caption", "p001.png": ""}


@pytest.mark.slow
def test_an_image_repeated_for_each_of_its_captions_keeps_them_all(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, text in enumerate(["one", "two words", "One", "far too long for this limit"]):
        (folder / f"{i}.png").write_bytes(png(1))
        (folder / f"{i}.txt").write_text(text)
    config = CONFIG.model_copy(update={"captions": CaptionConfig(max_words=3)})
    path, _ = flow.curate_source(SourceConfig(images_per_shard=1), str(folder), config)
    curated = open_curated(path)
    (part,) = curated.parts()
    assert curated.selection(part)["captions"].to_pylist() == [["one", "two words"]]


@pytest.mark.slow
def test_own_images_of_every_shape_up_to_the_limit_are_kept_and_counted(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(160, 90), (90, 160), (96, 96), (128, 52)]):
        picture(i, size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    decision = decide(folder)
    assert book_of(decision)["kept"].all()
    assert sum(json.loads((decision / "report.json").read_text())["shapes"]["kept"]) == 4


@pytest.mark.slow
def test_an_image_that_crashes_its_decoder_costs_one_record(folder, monkeypatch):
    real = score.measure

    def measure(data, config, **options):
        if data == png(5):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, config, **options)

    monkeypatch.setattr(score, "measure", measure)
    book = book_of(decide(folder))
    assert (
        book.loc["p005.png", "rule"] == "undecodable"
        and "crashed its decoder (signal 9)" in book.loc["p005.png", "detail"]
    )
    assert book["kept"].sum() == 9


@pytest.mark.slow
def test_check_prints_the_fate_of_each_file(folder, capsys):
    assert check.main([str(folder), "--overrides", "curation.filters.min_side_px=32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fates = {line["file"]: line for line in map(json.loads, lines[:-1])}
    assert fates["p000.png"] == {"file": "p000.png", "captions": ["a picture of 0"], "fate": "kept"}
    assert fates["silent.png"]["fate"] == "no_caption: no caption" and fates["silent.png"]["captions"] == []
    assert lines[-1].startswith("skipped ") and json.loads(lines[-1][8:])[".cr2"] == [1, "IMG.CR2"]


def test_check_of_a_source_that_is_refused_is_one_line(tmp_path, capsys):
    assert check.main([str(tmp_path / "nothing")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("ValueError: ") and len(out.splitlines()) == 1


@pytest.mark.slow
def test_replay_gives_the_decisions_that_a_run_would_give_and_reads_no_image(folder, tmp_path, capsys, monkeypatch):
    (folder / "p000.txt").write_text("a picture")
    strict = CONFIG.model_copy(update={"captions": CaptionConfig(max_words=3)})
    curated, _ = flow.curate_source(SourceConfig(images_per_shard=5), str(folder), strict)
    monkeypatch.setattr(score, "measure", None)
    monkeypatch.setattr(decoding, "decode", None)
    capsys.readouterr()
    arguments = [str(curated), "--overrides", "curation.captions.max_words=200", "--out", str(tmp_path / "out")]
    assert replay.main(arguments) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "kept 1 -> 10 of 16 records"
    changes = [json.loads(line) for line in lines if line.startswith("{")]
    assert {line["file"] for line in changes if line["after"] == "kept"} >= {"p001.png", "p009.png"}
    (rejected,) = [line for line in lines if line.startswith("rejected: ")]
    assert "caption_too_long 11 -> 1" in rejected  # twin.png has four words, too
    assert replay.main([*arguments[:3], "--examples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8 more change from caption_too_long to kept" in lines
    monkeypatch.undo()
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    pd.testing.assert_frame_equal(book_of(tmp_path / "out"), book_of(decide(folder)))


@pytest.mark.slow
def test_scores_are_replayed_with_a_recipe(folder, capsys):
    config = load_recipe("smoke").curation
    corpus, _, _ = make_sealed("corpus", lambda out: flow.write_corpus(SourceConfig(), str(folder), [], out))
    scores = flow._index("scores", flow.score_group(corpus, config, 0, 1))
    capsys.readouterr()
    assert replay.main([str(scores), "--overrides", "curation.filters.min_side_px=97"]) == 1
    assert "name the recipe" in capsys.readouterr().out
    arguments = [str(scores), "--recipe", "smoke", "--overrides", "curation.filters.min_side_px=97"]
    assert replay.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "kept 10 -> 0 of 16 records"
    assert json.loads(lines[0])["after"] == "min_side: 128x96 px: a side is under min_side_px 97"


@pytest.fixture(scope="module")
def curated_two(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCLEUS_HOME", str(tmp_path_factory.mktemp("two")))
        patch.delenv("NUCLEUS_STORE", raising=False)
        source = write_folder(tmp_path_factory.mktemp("source") / "images", range(2))
        return flow.curate_source(SourceConfig(), str(source), CONFIG)[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curation.scorers.aesthetic=none", "changes the scores"),
        ("train.seed=1", "only decisions of curation"),
        ("curation.filters.min_side=1", "min_side_px"),
        ("curation.captioner.name=scenes", "curation.captioner is not replayed: new captions"),
        ('curation.captioner={"name": "scenes"}', "curation.captioner is not replayed"),
        *(
            (f"curation.{key}", f"curation.{key.split('=')[0]} is not replayed")
            for key in ("engine=spark", "max_groups=3", "concurrency=2", "min_success_ratio=0.5")
        ),
        ("curation.takedown=missing.txt", "missing.txt' does not exist"),
    ],
)
def test_what_cannot_be_replayed_is_refused(override, message, curated_two, capsys):
    assert replay.main([str(curated_two), "--overrides", override]) == 1
    assert re.match(f"ValueError: .*{message}", capsys.readouterr().out)


def test_every_setting_that_decisions_do_not_have_is_replayed_or_refused_by_name():
    other = CurationConfig(
        captioner=CaptionerConfig(name="scenes"),
        takedown="x",
        engine="spark",
        max_groups=3,
        concurrency=4,
        min_success_ratio=0.5,
    )
    left_out = {key for key in CurationConfig.model_fields if getattr(other, key) != getattr(other.deciding(), key)}
    assert left_out == {*replay.NOT_REPLAYED, "takedown"}


def test_a_takedown_list_is_replayed(curated_two, tmp_path, capsys):
    (taken,) = [row for row in book_of(curated_two).itertuples() if row.file == "p000.png"]
    (tmp_path / "list.txt").write_text(f"{taken.record_id}\n")
    arguments = [
        str(curated_two),
        "--overrides",
        f"curation.takedown={tmp_path / 'list.txt'}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert replay.main(arguments) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "kept 2 -> 1 of 2 records"
    assert book_of(tmp_path / "out").loc["p000.png"].rule == "takedown"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The whole curation of scenes with planted defects, and digits: (ledger with truth, report)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCLEUS_HOME", str(tmp_path_factory.mktemp("planted")))
        patch.delenv("NUCLEUS_STORE", raising=False)
        source = SourceConfig(scenes=400, digits=60, scene_size_px=128, defect_fraction=0.6, shards=2, seed=5)
        _, part = flow.curate_source(source, "", CurationConfig(filters=CONFIG.filters), until="decisions")
        decision = fetch_part(part)
        truth = [
            pd.read_parquet(fetch_part(flow.make_shard(source, index)) / "truth.parquet")
            for index in range(source.shards)
        ]
        book = pd.read_parquet(decision / "ledger.parquet")
        book = book.merge(pd.concat(truth).drop(columns="detail"), on="key", how="left").set_index("key")
        return book, json.loads((decision / "report.json").read_text())


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


def with_truth(book: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(rule that must reject each record, rule that did); "" for none. Which of an original and its copies stays is free,
    so rejections in such a group count for its copies."""
    truth, result = pd.Series("", index=book.index), book["rule"].copy()
    for defect, (rule,) in EXPECTED.items():
        truth[book["defect"] == defect] = rule
    for original, copies in book[book["defect"].isin(defects.DUPLICATES)].groupby("original"):
        members = [original, *copies.index]
        rejected = [result[key] for key in members if result[key] in defects.DUPLICATES]
        result[[key for key in members if result[key] in defects.DUPLICATES]] = ""
        for key, defect in copies["defect"].items():
            truth[key] = defect
            if defect in rejected:
                rejected.remove(defect)
                result[key] = defect
        if rejected:
            result[original] = rejected[0]
    return truth, result


@pytest.mark.slow
def test_every_rule_has_its_precision_and_recall_on_planted_truth(planted):
    table = precision_and_recall(*with_truth(planted[0]))
    assert set(table) == {*(rule for (rule,) in EXPECTED.values()), *defects.DUPLICATES}
    check_table(table)


# Rule -> columns of a record that it must reject, and of one just within its limit. Pictures cannot plant all of these.
LIMITS = FilterConfig(
    min_side_px=100,
    max_pixels=10**6,
    min_bytes_per_pixel=0.1,
    min_aesthetic=4.0,
    min_image_text_similarity=0.2,
    max_nsfw=0.5,
    max_quality=45.0,
    max_text_area=0.2,
)
PLANTED_COLUMNS: dict[str, tuple[dict, dict]] = {
    **{name: ({"problem": name}, {}) for name in PROBLEMS},
    "too_many_pixels": ({"width": 1001, "height": 1000}, {"width": 1000, "height": 1000}),
    "undecodable": ({"error_rule": "undecodable"}, {}),
    "format": ({"format": "GIF"}, {"format": "WEBP"}),
    "mode": ({"mode": "CMYK"}, {"mode": "P"}),
    "animated": ({"animated": True}, {}),
    "min_side": ({"height": 99, "width": 200}, {"height": 100, "width": 200}),
    "aspect_ratio": ({"width": 301, "height": 100}, {"width": 300, "height": 100}),
    "bytes_per_pixel": ({"bytes_per_pixel": 0.09}, {"bytes_per_pixel": 0.1}),
    "single_color": ({"single_color_fraction": 0.991}, {"single_color_fraction": 0.99}),
    "low_entropy": ({"entropy_bits": 0.49}, {"entropy_bits": 0.5}),
    "border": ({"border_fraction": 0.51}, {"border_fraction": 0.5}),
    "nsfw": ({"nsfw": 0.51}, {"nsfw": 0.5}),
    "watermark": ({"watermark": 0.51}, {"watermark": 0.5}),
    "text_area": ({"text_area": 0.21}, {"text_area": 0.2}),
    "quality": ({"quality": 45.1}, {"quality": 45.0}),
    "aesthetic": ({"aesthetic": 3.9}, {"aesthetic": 4.0}),
    "image_text_similarity": ({"similarity": 0.19}, {"similarity": 0.2}),
    "no_caption": ({"captions": [], "words": []}, {}),
    "caption_too_long": ({"words": [201, 300]}, {"words": [200, 300]}),
}


def test_every_rule_rejects_what_breaks_it_and_nothing_at_its_limit():
    assert set(PLANTED_COLUMNS) == {rule.name for rule in rules.RULES} - set(rules.DUPLICATES)
    rows, truth = [], []
    for rule, cases in PLANTED_COLUMNS.items():
        for expected, columns in zip((rule, ""), cases):
            rows.append(good_row(len(rows), **columns))
            truth.append(expected)
    assert [row["rule"] for row in records_of(rows, CurationConfig(filters=LIMITS))] == truth


@pytest.mark.slow
@pytest.mark.parametrize("defect", defects.DUPLICATES)
def test_of_planted_duplicates_one_stays(planted, defect):
    book = planted[0]
    rows = book[book["defect"] == defect]
    merged = [not (kept and book.loc[of, "kept"]) for kept, of in zip(rows["kept"], rows["original"], strict=True)]
    assert np.mean(merged) >= (1.0 if defect == "exact_duplicate" else 0.9)


@pytest.mark.slow
def test_clean_scenes_digits_and_rotated_ones_are_kept(planted):
    book, report = planted
    duplicated = set(book.loc[book["defect"].isin(defects.DUPLICATES), "original"])
    clean = book[book["defect"].isin(["", *defects.KEPT]) & ~book.index.isin(duplicated)]
    lost = clean[~clean["kept"]]
    assert len(lost) <= 0.005 * len(clean), lost[["rule", "detail"]].to_dict()
    assert book[book["defect"].isna()]["kept"].all(), "a digit was rejected"
    assert report["input"] == len(book) == report["kept"] + sum(report["rejected"].values())


@pytest.mark.slow
def test_a_summary_is_made_of_equal_pictures_and_some_that_do_not_decode(tmp_path, capsys):
    """DuckDB ended in an internal error: bins of log2(width / height), where sizes of 0 are filtered out."""
    folder = write_folder(tmp_path / "images", range(3))
    for i in range(3):
        (folder / f"cut{i}.jpg").write_bytes(b"x")
        (folder / f"cut{i}.txt").write_text(f"cut {i}")
    assert check.main([str(folder), "--overrides", "curation.filters.min_side_px=32"]) == 0
    fates = [json.loads(line)["fate"].partition(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert sorted(fates) == ["kept"] * 3 + ["undecodable"] * 3


@pytest.mark.slow
def test_deciding_reads_each_part_once_and_counts_the_files_of_all(folder, monkeypatch):
    fetched, real = [], decide_module.fetch_part
    monkeypatch.setattr(
        decide_module, "fetch_part", lambda part, **options: fetched.append(part.name) or real(part, **options)
    )
    decision = decide(folder)
    assert len(fetched) == len(set(fetched)) == len(book_of(decision)["shard"].unique()) > 1
    account = json.loads((decision / "report.json").read_text())["account"]
    assert account["seen"] == sum(1 for path in folder.rglob("*") if path.is_file())
