"""The real trainer trains every overlay for two stages, and evaluation loads the result."""

import dataclasses
import json
import math

import pytest
import torch
from train_helpers import read_weights, train_config, training_stage, transformer_config, write_latents

from model.config import MergeConfig, TransformerConfig
from model.weights.export import load_transformer
from tasks.merging.merge_stage import merge_stage
from tasks.recipe import load_recipe

pytestmark = pytest.mark.slow
OVERLAYS = ("coupled_routing", "token_choice", "dense_ffn", "adamw_alone")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def sections(name):
    """The overlay's own choices in the small configuration."""
    recipe = load_recipe(f"ablations/{name}")
    model = TransformerConfig(**{**transformer_config().model_dump(), "routing": recipe.model.routing.model_dump()})
    stages = tuple(
        {"name": f"stage{factor}", "image_size_px": 64, "steps": 4, "batch_size": 8, "capacity_factors": float(factor)}
        for factor in (3, 2)
    )
    train = train_config(
        stages=stages,
        optim={"muon_lr": 0.01, "adamw_lr": 0.01, "warmup_steps": 2, "matrices": recipe.train.optim.matrices},
        losses={"router_z_loss": 1e-4, "router_orthogonality": 1e-4, "load_balance": recipe.train.losses.load_balance},
        checkpoint_every_steps=4,
    )
    return model, train


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_trains_two_stages_and_is_merged(name, latents, tmp_path):
    from model.train.run import train_stage

    model, train = sections(name)
    start = None
    for index in range(2):
        out = tmp_path / f"out{index}"
        out.mkdir()
        work_dir = tmp_path / f"work{index}"
        report = train_stage(latents, training_stage(train, model, index), start, work_dir, out)
        assert report["steps"] == 4 and math.isfinite(report["loss"])
        start = out
    weights = read_weights(start)[4]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    row = json.loads((start / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("lr/Muon" in row) == (name != "adamw_alone")
    if name == "dense_ffn":
        assert not any("expert" in key for key in row) and report["parameters"] == report["active_parameters"]
    elif name == "token_choice":
        assert row["expert/dropped"] == 0 and row["expert/experts_max"] == 2
    final = model.with_capacity_factors(2.0)
    (tmp_path / "merged").mkdir()
    merge_stage(start, final, MergeConfig(last_n=1), tmp_path / "merged")
    loaded = load_transformer(tmp_path / "merged" / "transformer")
    assert loaded.config == final
    assert all(torch.equal(tensor, weights[key]) for key, tensor in loaded.state_dict().items())
    class_name = json.loads((tmp_path / "merged" / "transformer" / "config.json").read_text())["_class_name"]
    assert (class_name == "NucleusMoEImageTransformer2DModel") == (not final.is_ablation)


def test_adamw_for_all_matrices_leaves_muon_empty_and_keeps_moments_for_every_parameter():
    from model.optim import parameter_groups
    from model.transformer import NucleusTransformer

    model = NucleusTransformer(transformer_config())
    groups = parameter_groups(model, "adamw")
    assert not groups["muon"]
    assert [name for name, _ in groups["adamw"]] == [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_switch_of_stage_changes_capacity_and_resolution_in_the_trainers_configuration(latents, tmp_path):
    from model.train.config import trainer_config

    stage = {"steps": 4, "batch_size": 8}
    train = train_config(
        stages=(
            {"name": "one", "image_size_px": 32, "capacity_factors": 3.0, **stage},
            {"name": "two", "image_size_px": 64, "capacity_factors": (2.0, 2.0, 1.0), **stage},
        )
    )
    first, second = (
        trainer_config(training_stage(train, index=i), latents_dir=latents, work_dir=tmp_path, init_from=None, ranks=1)
        for i in range(2)
    )
    assert different(first, second) == {
        "stage.stage.name", "stage.stage.image_size_px", "stage.stage.capacity_factors", "stage.model.capacity_factors",
        "model_spec.flavor", "model_spec.model.transformer.capacity_factors", "training.seq_len",
        "stage.seed", "dataloader.seed", "debug.seed", "metrics.label", "metrics.settings",  # every stage has its own random numbers
        # The last stage is merged, and hands no optimiser state on.
        "stage.train.keep_checkpoints", "checkpoint.keep_weights",
        "stage.hand_on_optimizer", "checkpoint.hand_on_optimizer",
    }  # fmt: skip


def different(one, other, above=()):
    """Dotted fields in which two nested configurations differ."""
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
    elif hasattr(type(one), "model_fields"):
        names = list(type(one).model_fields)
    else:
        return set() if one == other else {".".join(above)}
    return set().union(*(different(getattr(one, n), getattr(other, n), (*above, n)) for n in names))
