import json

import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel
from small_model import SMALL

from model.config import TransformerConfig
from model.transformer import NucleusTransformer
from model.weights.export import export_transformer, load_transformer

CONFIG = TransformerConfig(**SMALL | {"num_key_value_heads": 2, "capacity_factors": (1.0, 2.0, 3.0)})


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = NucleusTransformer(CONFIG).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(2, 12, 16, generator=generator),
        img_shapes=[(1, 3, 4)] * 2,
        encoder_hidden_states=torch.randn(2, 5, 24, generator=generator),
        timestep=torch.tensor([0.2, 0.9]),
    )


def test_diffusers_loads_what_is_exported(tmp_path, transformer, inputs):
    export_transformer(transformer, tmp_path)
    loaded, report = NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.capacity_factors == [1.0, 2.0, 3.0]
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).sample, transformer(**inputs), atol=1e-5)


def test_we_load_what_diffusers_saves_and_our_own_bitwise(tmp_path, transformer, inputs):
    export_transformer(transformer, tmp_path / "ours")
    NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        loaded = load_transformer(tmp_path / name)
        assert loaded.config == CONFIG
        for key, tensor in transformer.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), (name, key)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), transformer(**inputs))


def test_export_can_round_to_another_type(tmp_path, transformer):
    export_transformer(transformer, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_transformer(tmp_path).state_dict().values()} == {torch.bfloat16}


def test_weights_that_do_not_fit_are_named(tmp_path, transformer):
    state = transformer.state_dict()
    state["img_in.weight"] = torch.zeros(3, 3)
    state["extra"] = state.pop("proj_out.weight")
    with pytest.raises(ValueError, match=r"missing proj_out.weight; unknown extra; img_in.weight has shape \(3, 3\)"):
        export_transformer(state, tmp_path / "bad", CONFIG)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match="config"):
        export_transformer(state, tmp_path)


def test_bad_directories_are_refused(tmp_path, transformer):
    with pytest.raises(ValueError, match="no config.json"):
        load_transformer(tmp_path)
    export_transformer(transformer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match="depth"):
        load_transformer(tmp_path)
