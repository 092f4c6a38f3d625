"""Rules that scenes cannot plant, on pictures that break one of them each."""

from __future__ import annotations

import pandas as pd
import pytest
from planted_pictures import breaking, check_table, precision_and_recall

from tasks.curation import flow
from tasks.curation.config import CurationConfig, FilterConfig, SourceConfig, TierConfig
from tasks.store import fetch_part

RULES = (
    *("aesthetic", "animated", "bytes_per_pixel", "caption_too_long", "format"),
    *("low_entropy", "mode", "no_caption", "too_many_pixels"),
)
FILTERS = FilterConfig(min_side_px=32, max_pixels=150_000, min_bytes_per_pixel=0.015, min_aesthetic=3.0)


@pytest.mark.slow
def test_rules_on_files_pixels_and_captions_find_what_is_planted_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    (tmp_path / "images").mkdir()
    truth = {}
    for number, rule in enumerate([*RULES, *[""] * 5]):
        for i in range(20):
            seed = 100 * number + i
            ending, data, caption = breaking(rule, seed)
            file = f"{seed:05d}.{ending}"
            (tmp_path / "images" / file).write_bytes(data)
            if caption:
                (tmp_path / "images" / file).with_suffix(".txt").write_text(caption)
            truth[file] = rule
    config = CurationConfig(filters=FILTERS, tiers=TierConfig(accept_proxy=True))
    _, part = flow.curate_source(SourceConfig(), str(tmp_path / "images"), config, until="decisions")
    book = pd.read_parquet(fetch_part(part) / "ledger.parquet").set_index("file")
    table = precision_and_recall(pd.Series(truth)[book.index], book["rule"])
    assert set(table) == set(RULES)
    assert (book["rule"][pd.Series(truth)[book.index] == ""] == "").all(), "a clean picture was rejected"
    check_table(table)
