"""The transformer equals diffusers' NucleusMoEImageTransformer2DModel: weights, output and gradients."""

import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel
from small_model import SMALL

import model.layers.attention
from model.config import TransformerConfig
from model.transformer import NucleusTransformer, RouterTrace

VARIANTS = {
    "base": {},
    "gqa": dict(num_key_value_heads=2),
    "sigmoid": dict(use_sigmoid=True, num_key_value_heads=4),
    "capacity_list": dict(capacity_factors=[4.0, 1.5, 0.5]),
    "all_tokens": dict(capacity_factors=4.0, dense_moe_strategy="all_moe"),
    "released_strategy": dict(num_layers=5, dense_moe_strategy="leave_first_three_blocks_dense"),
    "last_dense": dict(num_layers=6, dense_moe_strategy="leave_first_three_and_last_block_dense"),
    "all_dense": dict(dense_moe_strategy="all_dense"),
    "moe_off": dict(moe_enabled=False, out_channels=None),
    "wide_text": dict(joint_attention_dim=200, route_scale=1.0),
    "grouped": dict(use_grouped_mm=True, num_experts=8, capacity_factors=3.0),
}
SHAPES = [(4, 4), (3, 5), (7, 2)]


def pair(seed=0, **changes):
    """Diffusers' model with random weights everywhere, and ours with the same."""
    torch.manual_seed(seed)
    config = {**SMALL, **changes}
    reference = NucleusMoEImageTransformer2DModel(**config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(std=0.3 if parameter.dim() == 1 else 1.2 * parameter.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(1.0)
    ours = NucleusTransformer.from_config(dict(reference.config))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def inputs(config, shape=(4, 4), batch=3, text=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return dict(
        hidden_states=torch.randn(batch, rows * columns, config.in_channels, generator=generator),
        img_shapes=[(1, rows, columns)] * batch,
        encoder_hidden_states=torch.randn(batch, text, config.joint_attention_dim, generator=generator),
        timestep=torch.rand(batch, generator=generator),
    )


def text_mask(batch=3, text=5):
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, 0] = False
    mask[2] = False  # no text at all
    return mask


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def assert_equal_with_gradients(reference, ours, kwargs):
    expected = reference(**kwargs, return_dict=False)[0]
    actual = ours(**kwargs)
    assert actual.shape == expected.shape
    assert relative(actual, expected) < 1e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    want = dict(reference.named_parameters())
    total = torch.stack([p.grad.norm() for p in want.values() if p.grad is not None]).norm()
    for name, parameter in ours.named_parameters():
        gradient = want[name].grad
        if gradient is None:
            assert parameter.grad is None, name
            continue
        # Relative to the parameter, with a floor for gradients that are rounding noise in both models.
        scale = torch.maximum(gradient.norm(), 1e-4 * total)
        assert (parameter.grad - gradient).norm() < 1e-5 * scale, (name, relative(parameter.grad, gradient))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_equal_diffusers(variant, masked):
    for shape in SHAPES:
        reference, ours = pair(**VARIANTS[variant])
        kwargs = inputs(ours.config, shape)
        kwargs["encoder_hidden_states_mask"] = text_mask() if masked else None
        assert_equal_with_gradients(reference, ours, kwargs)


def test_blocked_attention_equals_diffusers_like_the_plain_one(monkeypatch):
    monkeypatch.setattr(model.layers.attention, "PLAIN_SCORES", 0)
    reference, ours = pair(num_key_value_heads=2)
    assert_equal_with_gradients(reference, ours, inputs(ours.config) | {"encoder_hidden_states_mask": text_mask()})


def test_plain_formulas_equal_the_fast_ones(monkeypatch):
    import model.kernels.elementwise

    monkeypatch.setattr(model.kernels.elementwise, "_eager_cpu", lambda x: False)
    reference, ours = pair(num_key_value_heads=4)
    assert_equal_with_gradients(reference, ours, inputs(ours.config, (3, 5)))


def test_state_dict_names_and_shapes_equal_diffusers():
    reference, ours = pair()
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    reference.load_state_dict(ours.state_dict())
    assert not list(ours.buffers())


def test_released_configuration_has_the_released_size():
    with torch.device("meta"):
        ours = NucleusTransformer(
            TransformerConfig(
                in_channels=64,
                out_channels=16,
                num_layers=32,
                num_key_value_heads=4,
                joint_attention_dim=4096,
                dense_moe_strategy="leave_first_three_blocks_dense",
                num_experts=64,
                capacity_factors=(8.0,) * 3 + (4.0,) * 2 + (2.0,) * 27,
            )
        )
    assert len(ours.state_dict()) == 610
    assert sum(p.numel() for p in ours.state_dict().values()) == 16_922_679_296


def test_text_kv_gives_the_same_output():
    _, ours = pair(num_key_value_heads=2)
    kwargs = inputs(ours.config, (3, 5)) | {"encoder_hidden_states_mask": text_mask()}
    expected = ours(**kwargs)
    cache = ours.text_kv(kwargs.pop("encoder_hidden_states"), kwargs["img_shapes"])
    assert torch.equal(ours(**kwargs, text_kv=cache), expected)


def test_capacity_factors_change_without_touching_weights():
    reference, ours = pair(capacity_factors=1.0)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    kwargs = inputs(ours.config)
    narrow = ours(**kwargs)
    ours.set_capacity_factors([2.0, 3.0, 4.0])
    assert ours.config.capacity_factors == (2.0, 3.0, 4.0)
    wide, _ = pair(capacity_factors=[2.0, 3.0, 4.0])
    assert relative(ours(**kwargs), wide(**kwargs).sample) < 1e-5
    assert relative(ours(**kwargs), narrow) > 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())
    with pytest.raises(ValueError, match="capacity"):
        ours.set_capacity_factors(5.0)
    with pytest.raises(ValueError, match="capacity_factors has 2 values"):
        ours.set_capacity_factors([1.0, 1.0])


def test_router_trace_collects_every_moe_layer_with_its_graph():
    _, ours = pair()
    trace = RouterTrace()
    ours(**inputs(ours.config), collect=trace)
    assert sorted(trace.layers) == [1, 2]
    assert all(logits.requires_grad and logits.shape == (3, 16, 4) for logits in trace.logits())
    statistics = trace.statistics()
    assert 0 <= statistics["dropped"] < 1 and 0 < statistics["entropy"] <= 1
    assert statistics["layer01/experts_max"] <= 4


def test_unknown_keys_are_named_and_notes_are_ignored():
    config = {**SMALL, "_class_name": "NucleusMoEImageTransformer2DModel", "_diffusers_version": "0.42.1"}
    assert NucleusTransformer.from_config(config).config.num_layers == 3
    with pytest.raises(ValueError, match="num_expert, theta"):
        NucleusTransformer.from_config({**config, "theta": 1, "num_expert": 3})


def test_meta_init_then_init_weights_equals_a_direct_init():
    config = TransformerConfig(**SMALL)
    with torch.device("meta"):
        late = NucleusTransformer(config)
    late.to_empty(device="cpu")
    late.init_weights(torch.Generator().manual_seed(3))
    direct = NucleusTransformer(config)
    direct.init_weights(torch.Generator().manual_seed(3))
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name
    out = late(**inputs(config))
    assert torch.count_nonzero(out) == 0  # the first prediction is 0
    assert torch.isfinite(out).all()


def test_first_step_reaches_every_block_once_the_output_projection_moved():
    ours = NucleusTransformer(TransformerConfig(**SMALL))
    torch.nn.init.normal_(ours.proj_out.weight, std=0.02)
    ours(**inputs(ours.config)).square().mean().backward()
    missing = [n for n, p in ours.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


def test_bad_calls_name_the_value():
    _, ours = pair()
    kwargs = inputs(ours.config)
    with pytest.raises(ValueError, match="one shape"):
        ours(**kwargs | {"img_shapes": [(1, 4, 4), (1, 2, 8), (1, 4, 4)]})
    with pytest.raises(ValueError, match="16 tokens"):
        ours(**kwargs | {"img_shapes": (1, 4, 5)})
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        ours(**kwargs, encoder_hidden_states_mask=torch.ones(3, 4))
