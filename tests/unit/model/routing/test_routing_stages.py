"""Progressive sparsification: a new stage changes capacity factors and resolution, and nothing else."""

import pytest
import torch
from small_model import SMALL

from model.config import TransformerConfig
from model.stages import training_stages
from model.transformer import NucleusTransformer, RouterTrace
from tasks.recipe import load_recipe

CONFIG = SMALL | {"num_layers": 4, "moe_intermediate_dim": 8}


def drawn(config):
    torch.manual_seed(0)
    model = NucleusTransformer(config)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


@torch.no_grad()
def forward(model, rows=4, columns=4):
    generator = torch.Generator().manual_seed(1)
    trace = RouterTrace()
    out = model(
        hidden_states=torch.randn(2, rows * columns, 16, generator=generator),
        img_shapes=(1, rows, columns),
        encoder_hidden_states=torch.randn(2, 3, 24, generator=generator),
        timestep=torch.tensor([0.2, 0.7]),
        collect=trace,
    )
    return out, trace


@pytest.mark.parametrize("name", ["tiny", pytest.param("nucleus_17b", marks=pytest.mark.slow)])
def test_the_stages_of_a_recipe_have_the_same_parameters(name):
    recipe = load_recipe(name)
    models = [stage.model for stage in training_stages(recipe.model, recipe.train)]
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in NucleusTransformer(model).state_dict().items()} for model in models]
    assert list(shapes[0].items()) == list(shapes[1].items()) == list(shapes[2].items())
    dumps = [model.model_dump(exclude={"capacity_factors"}) for model in models]
    assert dumps[0] == dumps[1] == dumps[2]
    assert [model.capacity_factors for model in models] == [stage.capacity_factors for stage in recipe.train.stages]


def test_weights_of_one_stage_are_another_model_at_its_capacity_and_the_same_at_the_old_one():
    first = drawn(TransformerConfig(**CONFIG | {"capacity_factors": 4.0}))
    third = NucleusTransformer(TransformerConfig(**CONFIG | {"capacity_factors": 1.0}))
    third.load_state_dict(first.state_dict(), strict=True)
    before, _ = forward(first)
    switched, _ = forward(third)
    assert not torch.allclose(before, switched, atol=1e-4)
    third.set_capacity_factors(4.0)
    assert torch.equal(forward(third)[0], before)
    first.set_capacity_factors(1.0)
    assert torch.equal(forward(first)[0], switched)
    assert first.config == TransformerConfig(**CONFIG | {"capacity_factors": 1.0})


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 6), (6, 6)])
def test_each_layer_has_its_own_capacity_at_every_resolution(rows, columns):
    factors = (4.0, 4.0, 1.5, 0.5)  # the first block is dense: its factor is not read
    model = drawn(TransformerConfig(**CONFIG | {"capacity_factors": factors}))
    _, trace = forward(model, rows, columns)
    S = rows * columns
    taken = {layer: routing.indices_BEC.shape[-1] for layer, routing in trace.layers.items()}
    assert taken == {1: S, 2: -(-3 * S // 8), 3: -(-S // 8)}
    model.set_capacity_factors((1.0, 1.0, 1.0, 2.0))
    _, trace = forward(model, rows, columns)
    taken = {layer: routing.indices_BEC.shape[-1] for layer, routing in trace.layers.items()}
    assert taken == {1: -(-S // 4), 2: -(-S // 4), 3: -(-S // 2)}


def test_only_moe_layers_need_a_capacity_factor():
    """A dense layer's is never read, and diffusers loads a configuration with 0.0 there."""
    values = SMALL | {"dense_moe_strategy": "leave_first_block_dense", "capacity_factors": (0.0, 2.0, 2.0)}
    model = NucleusTransformer(TransformerConfig(**values))
    assert [block.moe_enabled for block in model.transformer_blocks] == [False, True, True]
    TransformerConfig(**values | {"dense_moe_strategy": "all_dense", "capacity_factors": 0.0})
    for factors in ((2.0, 0.0, 2.0), 0.0):
        with pytest.raises(ValueError, match="capacity factor 0.0 must be in"):
            TransformerConfig(**values | {"capacity_factors": factors})
