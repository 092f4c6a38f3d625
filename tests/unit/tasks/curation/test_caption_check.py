"""What captions alone decide is said before any image is decoded, with ledger and report."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import png, write_folder, write_tar
from parameters import slow_except

from tasks.curation import caption_check, check, flow
from tasks.curation.config import (
    CaptionConfig,
    CaptionerConfig,
    CurationConfig,
    DedupConfig,
    FilterConfig,
    SourceConfig,
)
from tasks.curation.scoring import score
from tasks.curation.sources.base import open_corpus
from tasks.store import make_sealed

CONFIG = CurationConfig(
    filters=FilterConfig(min_side_px=32, min_entropy_bits=0.05), captions=CaptionConfig(max_words=10)
)
LONG = "one two three four five six seven eight nine ten eleven {}"


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The shards whose images are decoded."""
    names: list[str] = []
    real = score.score_shard
    monkeypatch.setattr(score, "score_shard", lambda *args: names.append(args[1].shard_id) or real(*args))
    return names


def bare(folder: Path) -> None:
    for seed in range(3):
        (folder / f"p{seed}.png").write_bytes(png(seed))
    (folder / "captions.docx").write_bytes(b"")


def bare_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for seed in range(3):
            info = tarfile.TarInfo(f"p{seed}.png")
            info.size = len(png(seed))
            tar.addfile(info, io.BytesIO(png(seed)))


def bare_table(folder: Path) -> None:
    pq.write_table(pa.table({"image": [png(seed) for seed in range(3)], "text": ["", None, " "]}), folder / "a.parquet")


def unreadable(folder: Path) -> None:
    bare(folder)
    for seed in range(3):
        (folder / f"p{seed}.txt").write_bytes(b"caf\xe9")


def mixed(folder: Path) -> None:
    write_folder(folder, range(2), LONG)
    bare(folder)
    (folder / "p0.txt").write_bytes(b"caf\xe9")


SOURCES = {
    bare: "no_caption 3 (such as p0.png: no caption). Left out: 1 x .docx (captions.docx). Captions are read from",
    bare_tar: "no_caption 3 (such as a.tar:p0.png: no caption). Captions are read from",
    bare_table: "no_caption 3 (such as a.parquet:0: no caption). Captions are read from",
    unreadable: "unreadable_caption 3 (such as p0.png: p0.txt is not UTF-8 (byte 4); save it as UTF-8, or name its "
    "encoding in source.encoding)",
    lambda folder: write_folder(folder, range(3), LONG): "caption_too_long 3 (such as p000.png: every caption is over "
    "max_words 10 (the shortest has 12)). The shortest captions have 12 words: raise curation.captions.max_words=10",
    mixed: "no_caption 2 (such as p1.png: no caption); caption_too_long 2 (such as p000.png: every caption is over "
    "max_words 10 (the shortest has 12)); unreadable_caption 1 (such as p0.png: p0.txt is not UTF-8",
}


def listed(path: Path, source: SourceConfig = SourceConfig()) -> Path:
    return make_sealed("corpus", lambda out: flow.write_corpus(source, str(path), [], out), logs=flow.CORPUS_LOGS)[0]


@pytest.mark.parametrize(
    "write", slow_except([bare, unreadable], SOURCES), ids=["bare", "tar", "table", "unreadable", "long", "mixed"]
)
def test_a_source_without_a_usable_caption_is_refused_with_causes_and_a_ledger_and_nothing_is_decoded(
    write: Callable, tmp_path, scored, monkeypatch
):
    monkeypatch.setattr("tasks.curation.scoring.decoding._open", None)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    causes = re.escape(SOURCES[write])
    with pytest.raises(ValueError, match=f"curation kept none of .*{causes}.*[.] Ledger and report: /") as refused:
        flow.curate_source(SourceConfig(), str(tmp_path / "source"), CONFIG)
    with pytest.raises(ValueError) as of_the_task:
        flow.check_captions(listed(tmp_path / "source"), CONFIG)
    assert str(of_the_task.value) == str(refused.value)
    assert not scored
    decision = Path(str(refused.value).rpartition("Ledger and report: ")[2])
    book = pd.read_parquet(decision / "ledger.parquet")
    assert len(book) == json.loads((decision / "report.json").read_text())["input"] and not book["kept"].any()
    assert book["record_id"].str.len().eq(64).all()


@pytest.mark.slow
def test_the_fates_without_pixels_are_those_that_scoring_gives(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    mixed(source)
    _, early = flow.curate_source(SourceConfig(), str(source), CONFIG, until="decisions")
    monkeypatch.setattr(caption_check, "MAX_BYTES", 0)
    _, late = flow.curate_source(SourceConfig(), str(source), CONFIG, until="decisions")
    assert early.digest != late.digest
    books = [pd.read_parquet(Path(part.uri) / "ledger.parquet") for part in (early, late)]
    pd.testing.assert_frame_equal(*books)


@pytest.mark.parametrize("config", [
    CONFIG.model_copy(update={"captions": CaptionConfig(required=False)}),
    CONFIG.model_copy(update={"captioner": CaptionerConfig(name="openai")}),
    CONFIG.model_copy(update={"captions": CaptionConfig(required=False), "dedup": DedupConfig(min_embedding_similarity=0.9)}),
], ids=["not required", "captioner", "embeddings"])  # fmt: skip
def test_a_missing_caption_is_no_reason_where_none_is_required_or_a_model_writes_them(config, tmp_path):
    (tmp_path / "source").mkdir()
    bare(tmp_path / "source")
    flow.check_captions(listed(tmp_path / "source"), config)


@pytest.mark.parametrize("embedding", [None, 0.9])
def test_unreadable_captions_are_refused_also_where_a_model_writes_captions(embedding, tmp_path):
    (tmp_path / "source").mkdir()
    unreadable(tmp_path / "source")
    update = {"captioner": CaptionerConfig(name="openai"), "dedup": DedupConfig(min_embedding_similarity=embedding)}
    with pytest.raises(ValueError, match="kept none of 3 records: unreadable_caption 3"):
        flow.check_captions(listed(tmp_path / "source"), CONFIG.model_copy(update=update))


def test_reading_ends_at_the_first_usable_caption(tmp_path, monkeypatch):
    for i, caption in enumerate((LONG, "a picture of {}", LONG)):
        write_tar(tmp_path / "source" / f"{i}.tar", range(4 * i, 4 * i + 4), caption)
    corpus, read = listed(tmp_path / "source"), []
    real = score._described
    monkeypatch.setattr(score, "_described", lambda record: read.append(record.locator) or real(record))
    flow.check_captions(corpus, CONFIG)
    assert [place[:5] for place in read] == ["0.tar"] * 4 + ["1.tar"]
    flow.check_captions(corpus, CONFIG)
    assert len(read) == 6  # the first shard is not read again


def test_the_recipes_own_images_are_not_read_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "describe_shard", None)
    parts = [flow.make_shard(SourceConfig(scenes=4, scene_size_px=64, shards=1), 0)]
    corpus, _, _ = make_sealed("corpus", lambda out: flow.write_corpus(SourceConfig(), "", parts, out))
    flow.check_captions(corpus, CONFIG)


def test_check_prints_the_fate_of_every_file_of_a_source_without_captions(tmp_path, capsys, scored):
    (tmp_path / "source").mkdir()
    bare(tmp_path / "source")
    assert check.main([str(tmp_path / "source"), "--recipe", "smoke"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["fate"] for line in lines[:3]] == ["no_caption: no caption"] * 3
    assert lines[3] == 'skipped {".docx": [1, "captions.docx"]}'
    assert lines[4].startswith("ValueError: curation kept none of 3 records") and len(lines) == 5
    assert not scored


@pytest.mark.slow
def test_an_image_whose_json_has_no_caption_names_the_keys_that_are_there(tmp_path):
    texts = {"p0.json": {"description": "a", "license": "b"}, "p1.json": {}, "p2.json": {"text": ""}}
    (tmp_path / "source").mkdir()
    bare(tmp_path / "source")
    for name, value in texts.items():
        (tmp_path / "source" / name).write_text(json.dumps(value))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "source", ".")
    for place, at in ((tmp_path / "source", ""), (tmp_path / "a.tar", "a.tar:")):
        _, decision = flow.curate_source(SourceConfig(), str(place), CONFIG, until="decisions")
        book = pd.read_parquet(Path(decision.uri) / "ledger.parquet").set_index("file")
        assert set(book["rule"]) == {"no_caption"}
        first, second, third = (book["detail"].to_dict()[name] for name in sorted(book.index))
        hint = "it needs a caption column (caption, captions, text, texts, prompt, raw); name yours in source.caption_columns"
        assert first.endswith(f"p0.json has description, license; {hint}") and at in first
        assert second.endswith(f"p1.json has nothing; {hint}") and third == "no caption"
    source = SourceConfig(caption_columns=("description",))
    directory, _ = flow.curate_source(source, str(tmp_path / "source"), CONFIG)
    assert pd.read_parquet(directory / "ledger.parquet")["kept"].sum() == 1


def saved(folder: Path) -> None:
    table = pa.table({"image": [png(seed) for seed in range(3)], "label": ["a", "b", "c"]})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def listing(name: str, text: str) -> Callable:
    def write_table(folder: Path) -> None:
        bare(folder)
        (folder / name).write_text(text)

    return write_table


def tar_with_a_table(folder: Path) -> None:
    bare_tar(folder)
    (folder / "metadata.csv").write_text("file_name,label\np0.png,a\np1.png,b\np2.png,c\n")


WITHOUT_A_COLUMN = {
    "parquet": (
        lambda folder: pq.write_table(pa.table({"image": [png(1)], "label": ["a"]}), folder / "a.parquet"),
        "a.parquet has columns image, label",
    ),
    "arrow": (saved, "a.arrow has columns image, label"),
    "csv": (listing("metadata.csv", "file_name,label\np0.png,a\np1.png,b\n"), "metadata.csv has columns file_name, label"),
    "jsonl": (listing("metadata.jsonl", '{"file_name": "p0.png", "size": 3}\n'), "metadata.jsonl has file_name, size"),
    "json": (listing("metadata.json", '[{"file_name": "p0.png", "size": 3}]'), "metadata.json has file_name, size"),
    "json of names": (listing("metadata.json", '{"p0.png": {"size": 3}}'), "metadata.json has file_name, size"),
    "tar": (tar_with_a_table, "metadata.csv has columns file_name, label"),
}  # fmt: skip


@pytest.mark.parametrize("kind", slow_except(["parquet", "csv"], WITHOUT_A_COLUMN))
def test_tables_without_a_caption_column_are_refused_by_name_only_where_a_caption_is_required(
    kind, tmp_path, monkeypatch
):
    write, why = WITHOUT_A_COLUMN[kind]
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    corpus = listed(tmp_path / "source")
    with pytest.raises(ValueError, match=f"kept none of .*no_caption.* {why}; it needs .* in source.caption_columns"):
        flow.check_captions(corpus, CONFIG)
    free = CONFIG.model_copy(update={"captions": CaptionConfig(required=False)})
    described = CONFIG.model_copy(update={"captioner": CaptionerConfig(name="openai")})
    for config in (free, described):
        flow.check_captions(corpus, config)
    monkeypatch.setattr(caption_check, "MAX_BYTES", 0)
    with pytest.raises(ValueError, match=f"no image of the source has a caption: {why}; it needs a caption column"):
        flow.check_captions(corpus, CONFIG)
    for config in (free, described):
        flow.check_captions(corpus, config)


def test_no_record_of_a_source_over_the_limit_is_read_for_it(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for i in range(3):
        pq.write_table(pa.table({"image": [png(i)], "label": ["a"]}), tmp_path / "source" / f"{i}.parquet")
    corpus = listed(tmp_path / "source")
    monkeypatch.setattr(score, "describe_shard", None)
    monkeypatch.setattr(
        caption_check, "MAX_BYTES", open_corpus(corpus).report["size_bytes"] - 1
    )  # over that of the first two
    with pytest.raises(ValueError, match="no image of the source has a caption: 0.parquet has columns image, label"):
        flow.check_captions(corpus, CONFIG)
    flow.check_captions(corpus, CONFIG.model_copy(update={"captions": CaptionConfig(required=False)}))


@pytest.mark.parametrize("kind", slow_except(["parquet", "csv"], WITHOUT_A_COLUMN))
def test_one_caption_next_to_a_table_without_captions_is_enough(kind, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    WITHOUT_A_COLUMN[kind][0](tmp_path / "source")
    write_folder(tmp_path / "source", range(9, 10), "a picture of {}")
    corpus = listed(tmp_path / "source")
    flow.check_captions(corpus, CONFIG)
    monkeypatch.setattr(caption_check, "MAX_BYTES", 0)
    flow.check_captions(corpus, CONFIG)
