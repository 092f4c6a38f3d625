"""Scorers as parts: each has a revision in its key and its table, a new one runs alone, and one embedding feeds several."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import write_tar

from tasks.curation import flow, scorers
from tasks.curation.config import CurationConfig, DedupConfig, FilterConfig, ScorerChoice, ScorerConfig, SourceConfig
from tasks.curation.scorers import ScorerSpec, build_scorer, check_settings, chosen_scorers, identity, revision
from tasks.curation.scorers.base import COLUMNS, check_range
from tasks.curation.scoring import score, scored_shard
from tasks.manifest import load_manifest
from tasks.store import Part, fetch_part, make_sealed

COMMIT = "0123456789abcdef" * 2 + "01234567"
calls: Counter = Counter()
builders: dict = {}


def __getattr__(name):
    if name.removeprefix("built_") not in builders:
        raise AttributeError(name)
    return builders[name.removeprefix("built_")]


class Fake:
    """A scorer that counts its calls and gives one value, or a vector."""

    def __init__(self, name, column, value):
        self.name, self.column, self.value = name, column, value

    def __call__(self, samples):
        calls[self.name] += len(samples)
        if self.column == "embedding":
            return {"embedding": np.tile(np.array([0.6, 0.8], np.float16), (len(samples), 1))}
        if self.value == "embedding":
            return {self.column: np.array([sample.embedding.sum() for sample in samples], np.float32)}
        return {self.column: np.full(len(samples), self.value, np.float32)}


def spec(name, column, value, **options):
    builders[name] = lambda: Fake(name, column, value)
    return ScorerSpec(name, (column,), f"{__name__}:built_{name}", **options)


@pytest.fixture
def fakes(monkeypatch):
    """Scorers `nsfw1`, `nsfw2`, `vector`, `vector2` and two heads on the vector."""
    head = {"needs": frozenset({"embedding"})}
    entries = (
        spec("nsfw1", "nsfw", 0.25),
        spec("nsfw2", "nsfw", 0.5),
        spec("vector", "embedding", None, resources="gpu_single"),
        spec("vector2", "embedding", None, resources="gpu_single"),
        spec("beauty", "aesthetic", "embedding", **head),
        spec("clean", "watermark", 0.0, **head),
    )
    monkeypatch.setattr(scorers, "SCORERS", (*scorers.SCORERS, *entries))
    calls.clear()


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    write_tar(tmp_path / "source" / "0.tar", range(5))
    made, _, _ = make_sealed(
        "corpus",
        lambda out: flow.write_corpus(SourceConfig(), str(tmp_path / "source"), [], out),
        logs=flow.CORPUS_LOGS,
    )
    return made


def config(**columns) -> CurationConfig:
    filters = FilterConfig(min_side_px=32, min_entropy_bits=0.05)
    return CurationConfig(filters=filters, scorers=ScorerConfig(**columns))


def scored(corpus: Path, resources=None, **columns) -> Part:
    (part,) = flow.score_group(corpus, config(**columns), 0, 1, resources)
    assert not part.error, part.error
    return part


def table(part: Part) -> pa.Table:
    return pq.read_table(fetch_part(part) / score.SCORES_TABLE)


def test_a_new_scorer_runs_alone_and_the_others_keep_their_columns(corpus, fakes, monkeypatch):
    first = scored(corpus, nsfw="nsfw1")
    assert calls == {"nsfw1": 5}
    parts = {path.name for path in (corpus.parents[1] / "columns").iterdir()}
    measured: Counter = Counter()
    monkeypatch.setattr(score, "score_shard", _counted(score.score_shard, measured))
    second = scored(corpus, nsfw="nsfw2")
    assert calls == {"nsfw1": 5, "nsfw2": 5}
    assert measured == {"measured": 0, "scorers": 1}, "passes 1 and 2 and the other scorers are not made again"
    assert parts < {path.name for path in (corpus.parents[1] / "columns").iterdir()}
    before, after = table(first), table(second)
    assert before["nsfw"].to_pylist() == [0.25] * 5 and after["nsfw"].to_pylist() == [0.5] * 5
    pd.testing.assert_frame_equal(before.drop(["nsfw"]).to_pandas(), after.drop(["nsfw"]).to_pandas())
    assert np.isfinite(before["aesthetic"].to_numpy()).all()
    scored(corpus, nsfw="nsfw1")
    assert calls == {"nsfw1": 5, "nsfw2": 5}, "what was scored once is known"


def _counted(real, counts):
    def score_shard(corpus, shard, config, measured_dir, running):
        counts["measured"] += measured_dir is not None
        counts["scorers"] += len(running)
        return real(corpus, shard, config, measured_dir, running)

    return score_shard


def test_one_embedding_feeds_several_heads_and_a_new_head_reads_no_image(corpus, fakes, monkeypatch):
    part = scored(corpus, embedding="vector", aesthetic="beauty", watermark="none")
    assert calls == {"vector": 5, "beauty": 5}
    assert table(part)["aesthetic"].to_pylist() == pytest.approx([1.4] * 5, abs=1e-3)
    monkeypatch.setattr(score, "score_shard", None)  # no image is read
    part = scored(corpus, embedding="vector", aesthetic="beauty", watermark="clean")
    assert calls == {"vector": 5, "beauty": 5, "clean": 5}
    assert table(part)["watermark"].to_pylist() == [0.0] * 5


@pytest.mark.slow
def test_an_embedding_is_stored_in_half_precision_and_another_one_runs_its_heads_again(corpus, fakes):
    scored(corpus, embedding="vector", aesthetic="beauty")
    tables = [pq.read_table(path) for path in (corpus.parents[1] / "columns").glob("*/columns.parquet")]
    (vectors,) = [result for result in tables if "embedding" in result.column_names]
    assert vectors.schema.field("embedding").type == pa.list_(pa.float16()) and len(vectors) == 5
    scored(corpus, embedding="vector2", aesthetic="beauty")
    assert calls["beauty"] == calls["vector"] + calls["vector2"]


def test_the_scores_have_the_embedding_where_duplicates_are_looked_for_by_it(corpus, fakes):
    assert "embedding" not in table(scored(corpus, embedding="vector")).column_names
    dedup = DedupConfig(min_embedding_similarity=0.97)
    (part,) = flow.score_group(corpus, config(embedding="vector").model_copy(update={"dedup": dedup}), 0, 1)
    assert not part.error, part.error
    assert np.stack(table(part)["embedding"].to_pylist()) == pytest.approx(np.tile([0.6, 0.8], (5, 1)), abs=1e-3)
    assert calls == {"vector": 5}


@pytest.mark.slow
def test_a_scorer_that_asks_for_a_gpu_waits_for_the_task_that_has_one(corpus, fakes):
    waiting = scored(corpus, "shard", embedding="vector", aesthetic="beauty", nsfw="nsfw1")
    assert waiting.kind == "measured" and calls == {"nsfw1": 5}
    part = scored(corpus, "gpu_single", embedding="vector", aesthetic="beauty", nsfw="nsfw1")
    assert part.kind == "scores" and calls == {"nsfw1": 5, "vector": 5, "beauty": 5}
    assert scorers.needs_gpu(config(embedding="vector")) and not scorers.needs_gpu(config())


def test_columns_carry_their_unit_range_and_revision(corpus, fakes):
    part = scored(corpus, nsfw="nsfw1")
    parents = {parent.kind: parent for parent in load_manifest(fetch_part(part)).parents}
    assert set(parents) == {"measured", "columns"}
    columns = [pq.read_schema(path) for path in (corpus.parents[1] / "columns").glob("*/columns.parquet")]
    (nsfw,) = [schema for schema in columns if "nsfw" in schema.names]
    assert nsfw.field("nsfw").type == pa.float32()
    assert nsfw.field("nsfw").metadata == {b"unit": b"probability", b"range": b"0 to 1"}
    (one,) = [one for one in chosen_scorers(config(nsfw="nsfw1").scorers) if one.columns == ("nsfw",)]
    assert nsfw.metadata[b"revision"].decode() == revision(one)
    revisions = json.loads(table(part).schema.metadata[b"revisions"])
    assert revisions["nsfw"] == revision(one) and set(revisions) == {"nsfw", "watermark", "aesthetic"}


def test_thumbnails_are_found_from_the_scores(corpus, fakes):
    part = scored(corpus)
    assert not (fetch_part(part) / score.THUMBNAILS_TABLE).exists()
    assert len(pq.read_table(scored_shard.fetch_pictures(part) / score.THUMBNAILS_TABLE)) == 5


def test_code_commits_and_settings_are_the_identity_of_a_scorer(tmp_path, monkeypatch):
    (tmp_path / "scorer_of_mine.py").write_text('"""Scores."""\n\ndef build():\n    # the mean\n    return 1\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    def code():
        from tasks.curation.scorers import base as scorer_base

        scorer_base._code_digest.cache_clear()
        return ScorerSpec("mine", ("nsfw",), "scorer_of_mine:build").code_digest()

    first = code()
    (tmp_path / "scorer_of_mine.py").write_text('"""Another text."""\n\n\ndef build():\n    return 1  # changed\n')
    assert code() == first, "comments, docstrings and layout decide no number"
    (tmp_path / "scorer_of_mine.py").write_text("def build():\n    return 2\n")
    assert code() != first
    choice = ScorerChoice(name="nsfw-classifier", repo_id="a/b", revision=COMMIT, label="nsfw")
    (one,) = [c for c in chosen_scorers(ScorerConfig(nsfw=choice)) if c.columns == ("nsfw",)]
    assert COMMIT in revision(one) and identity(one)["settings"]["revision"] == COMMIT
    other = one._replace(choice=choice.model_copy(update={"revision": COMMIT[::-1]}))
    assert (
        identity(other) != identity(one) != identity(one._replace(choice=choice.model_copy(update={"label": "sexy"})))
    )


def test_a_scorer_that_two_columns_name_runs_once():
    chosen = chosen_scorers(ScorerConfig(watermark="pp-ocr", text_area="pp-ocr", aesthetic="none"))
    assert [one.columns for one in chosen] == [("watermark", "text_area")]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"aesthetic": {"name": "proxy", "repo_id": "a/b"}}, "aesthetic.repo_id is set, and 'proxy' takes no settings"),
        (
            {"aesthetic": {"name": "aesthetic-head", "repo_id": "a/b"}},
            "reads the column embedding, which nothing fills",
        ),
        ({"nsfw": {"name": "nsfw-classifier", "repo_id": "a/b", "revision": "main"}}, "not a commit of 40 hex digits"),
        (
            {
                "embedding": {"name": "image-text-embedding", "repo_id": "a/b", "revision": COMMIT},
                "similarity": {"name": "embedding-similarity", "repo_id": "a/c", "revision": COMMIT},
            },
            "must name the repo_id and revision of curation.scorers.embedding",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(columns, why):
    with pytest.raises(ValueError, match=why):
        chosen_scorers(ScorerConfig(**columns))


def test_a_missing_commit_is_named_before_a_run_and_not_before():
    choice = {"name": "watermark-classifier", "repo_id": "a/b", "label": 1}
    chosen_scorers(ScorerConfig(watermark=choice))
    with pytest.raises(ValueError, match="curation.scorers.watermark.revision is not set: give a commit of a/b"):
        check_settings(ScorerConfig(watermark=choice))
    with pytest.raises(ValueError, match="curation.scorers.watermark.revision is not set"):
        build_scorer(chosen_scorers(ScorerConfig(watermark=choice))[0])
    check_settings(ScorerConfig(watermark=choice | {"revision": COMMIT}))


def test_a_value_outside_of_its_columns_range_is_refused_with_the_scorers_name():
    check_range("mine", COLUMNS["nsfw"], np.array([0.0, 1.0, np.nan]))
    with pytest.raises(ValueError, match="scorer 'mine' gives nsfw the value 3; its range is 0 to 1"):
        check_range("mine", COLUMNS["nsfw"], np.array([0.5, 3.0]))
