"""The released 17B configuration, on the meta device: the recipe's model is diffusers' to the last key."""

from pathlib import Path

import pytest
import torch

from model.plan.memory import Shapes
from model.plan.planner import active_parameters, load_sections
from model.transformer import NucleusTransformer
from model.weights.export import diffusers_config

RECIPE = Path(__file__).parents[4] / "recipes" / "nucleus_17b.yaml"


@pytest.fixture(scope="module")
def config():
    return load_sections(RECIPE)[0]


def test_names_and_shapes_are_those_of_diffusers(config):
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    keys = {key: value for key, value in diffusers_config(config).items() if not key.startswith("_")}
    with torch.device("meta"):
        theirs = NucleusMoEImageTransformer2DModel(**keys).state_dict()
        ours = NucleusTransformer(config).state_dict()
    assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    assert len(ours) == 610
    assert sum(tensor.numel() * 2 for tensor in ours.values()) == 33_845_358_592  # the released checkpoint, bf16


def test_17b_in_all_and_about_2b_active_are_computed(config):
    shapes = Shapes(config)
    assert shapes.total == 16_922_679_296
    active = active_parameters(shapes, config, 4096)
    # By hand: all but routed experts, and of those 4 in 2 layers and 2 in 27, of 3 x 2048 x 1344 weights each.
    assert active == shapes.total - 29 * 64 * 3 * 2048 * 1344 + (2 * 4 + 27 * 2) * 3 * 2048 * 1344
    assert 1.8e9 < active < 2.2e9
