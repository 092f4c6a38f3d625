"""The Deck's page shows the scores, the grid and the files, and escapes what comes from data."""

from __future__ import annotations

import base64
import json

from tasks.manifest import seal
from tasks.publishing.summary import published_html

SCORE = {"mean": 0.5, "std": None, "runs": 1, "seeds": [0], "interval": [0.4, 0.6]}


def test_the_page_has_scores_grid_files_and_the_seal(tmp_path):
    scorecard = {"benchmark": "shapes", "overall": {**SCORE, "std": 0.25}, "tasks": {"colors": SCORE}}
    (tmp_path / "scorecard.json").write_text(json.dumps(scorecard))
    (tmp_path / "grid.png").write_bytes(b"picture")
    manifest = seal(tmp_path, "pipeline")
    page = published_html(tmp_path)
    assert "<td>colors</td><td>0.500</td><td>one run</td><td>0.400 to 0.600</td>" in page
    assert "<td>overall</td><td>0.500</td><td>0.250</td>" in page
    assert base64.b64encode(b"picture").decode() in page
    assert manifest.digest in page and "<code>grid.png</code>" in page


def test_a_page_without_scores_still_lists_the_files(tmp_path):
    (tmp_path / "README.md").write_text("card")
    page = published_html(tmp_path)
    assert "<code>README.md</code>" in page and "<img" not in page and "seeds" not in page


def test_what_comes_from_data_is_escaped(tmp_path):
    scorecard = {"benchmark": "<script>", "overall": SCORE, "tasks": {"<b>": SCORE}}
    (tmp_path / "scorecard.json").write_text(json.dumps(scorecard))
    page = published_html(tmp_path)
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page
