"""Evaluation samples merged weights with diffusers' transformer or, for an ablation, with ours."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import TransformerConfig
from model.sampling.pipeline_transformer import PipelineTransformer
from model.transformer import NucleusTransformer
from model.weights.export import export_transformer, load_transformer, read_config
from tasks.evaluation.evaluate import load_pipeline
from tasks.planning.sections import check_workflow
from tasks.publishing import publish
from tasks.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """components/ and merged/transformer/ of random weights."""
    spec = importlib.util.spec_from_file_location("tiny_pipeline", ROOT / "tests/fixtures/models/tiny_pipeline.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("parts")
    make.make_components(folder / "components")
    make.make_transformer(folder / "merged")
    return folder


def ablation_of(merged: Path, out: Path, **routing) -> TransformerConfig:
    """The same weights, without those that the ablation lacks."""
    config = TransformerConfig(**{**read_config(merged / "transformer").model_dump(), "routing": routing})
    torch.manual_seed(0)
    model = NucleusTransformer(config)
    model.load_state_dict(load_transformer(merged / "transformer").state_dict(), strict=False)
    export_transformer(model, out / "transformer")
    return config


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline("a red circle", height=64, width=64, num_inference_steps=2, guidance_scale=3.0, generator=noise,
                    output_type="np").images[0]  # fmt: skip


def test_our_model_in_diffusers_place_draws_the_same_image(parts):
    theirs = load_pipeline(parts / "merged", parts / "components")
    assert type(theirs.transformer).__name__ == "NucleusMoEImageTransformer2DModel"
    expected = draw(theirs)
    theirs.register_modules(transformer=PipelineTransformer(load_transformer(parts / "merged" / "transformer")))
    actual = draw(theirs)
    assert np.abs(actual - expected).max() < 1e-4 and expected.std() > 0.01


@pytest.mark.slow
def test_every_ablation_is_drawn_by_its_own_rules(parts, tmp_path):
    plain = draw(load_pipeline(parts / "merged", parts / "components"))
    for i, routing in enumerate(({"kind": "token_choice"}, {"coupled": True}, {"kind": "dense"})):
        config = ablation_of(parts / "merged", tmp_path / str(i), **routing)
        assert read_config(tmp_path / str(i) / "transformer") == config
        image = draw(load_pipeline(tmp_path / str(i), parts / "components"))
        assert np.isfinite(image).all() and np.abs(image - plain).max() > 1e-3


def test_an_ablation_under_diffusers_name_is_refused(parts, tmp_path):
    ablation_of(parts / "merged", tmp_path, coupled=True)
    path = tmp_path / "transformer" / "config.json"
    values = json.loads(path.read_text())
    assert values["_class_name"] == "NucleusTransformer"
    path.write_text(json.dumps({**values, "_class_name": "NucleusMoEImageTransformer2DModel"}))
    with pytest.raises(ValueError, match="is of class NucleusMoEImageTransformer2DModel, not NucleusTransformer"):
        read_config(tmp_path / "transformer")


def test_an_ablation_is_not_published(parts, tmp_path):
    recipe = load_recipe("tiny").model_dump(mode="json")
    ablation_of(parts / "merged", tmp_path / "merged", kind="token_choice")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="of class NucleusTransformer: only NucleusMoEImageTransformer2DModel can be"):
        publish.publish(tmp_path / "merged", parts / "components", None, recipe, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["coupled_routing", "token_choice", "dense_ffn"])
def test_an_ablation_is_refused_before_any_work_where_the_end_is_a_pipeline(name):
    recipe = load_recipe(f"ablations/{name}")
    with pytest.raises(
        ValueError, match=r"model.routing=\{.*is an ablation.*workflows/ablate.py ablate ends in its score"
    ):
        check_workflow(recipe)
    check_workflow(recipe, ends_in="scorecard")


def test_another_optimiser_is_no_ablation_of_the_model_and_is_published():
    check_workflow(load_recipe("ablations/adamw_alone"))
