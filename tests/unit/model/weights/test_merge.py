import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel
from safetensors.torch import save_file

from model.config import TransformerConfig
from model.merge import merge, wsm_weights
from model.transformer import NucleusTransformer
from model.weights.checkpoints import _MetadataUnpickler
from model.weights.export import export_transformer, load_transformer

CONFIG = TransformerConfig(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=12,
    axes_dims_rope=(4, 2, 2),
    dense_moe_strategy="all_moe",
    num_experts=4,
    moe_intermediate_dim=8,
    capacity_factors=2.0,
)


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    model = NucleusTransformer(CONFIG)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def trajectory():
    """Five checkpoints that drift from the first, as training does."""
    states = [state(0)]
    for seed in range(1, 5):
        step = state(seed)
        states.append({name: tensor + 0.1 * step[name] for name, tensor in states[-1].items()})
    return states


def test_weights_stand_for_an_inverse_square_root_decay():
    for n in (1, 2, 16):
        weights = wsm_weights(n)
        assert len(weights) == n and sum(weights) == pytest.approx(1.0) and min(weights) > 0
        for j in range(1, n + 1):
            assert sum(weights[j - 1 :]) == pytest.approx(j**-0.5)
    with pytest.raises(ValueError, match="n=0"):
        wsm_weights(0)


def test_merge_equals_the_trajectory_with_decayed_updates(trajectory, tmp_path):
    report = merge(trajectory, wsm_weights(5), tmp_path, CONFIG)
    decayed = {name: tensor.double() for name, tensor in trajectory[0].items()}
    for j in range(2, 6):
        for name in decayed:
            update = trajectory[j - 1][name].double() - trajectory[j - 2][name].double()
            decayed[name] = decayed[name] + j**-0.5 * update
    result = load_transformer(tmp_path).state_dict()
    assert result.keys() == decayed.keys()
    for name, tensor in decayed.items():
        assert torch.allclose(result[name].double(), tensor, atol=1e-6), name
    assert report["checkpoints"] == 5 and report["tensors"] == len(decayed)
    assert report["parameters"] == sum(tensor.numel() for tensor in decayed.values())


def test_a_merge_of_one_checkpoint_equals_it_bitwise(trajectory, tmp_path):
    odd = {name: tensor.bfloat16() for name, tensor in trajectory[1].items()}
    odd["img_in.bias"][0] = -0.0
    merge([odd], wsm_weights(1), tmp_path, CONFIG)
    for name, tensor in load_transformer(tmp_path).state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), odd[name].view(torch.int16)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_every_kind_of_checkpoint_merges_alike(trajectory, tmp_path):
    states = trajectory[:3]
    merge(states, wsm_weights(3), tmp_path / "memory", CONFIG)
    kinds = {"files": [], "directories": [], "dcp_prefixed": [], "dcp_plain": []}
    for i, tensors in enumerate(states):
        file = tmp_path / f"{i}.safetensors"
        save_file(tensors, file)
        kinds["files"].append(file)
        export_transformer(tensors, tmp_path / f"dir{i}", CONFIG)
        kinds["directories"].append(tmp_path / f"dir{i}")
        prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"optimizer.x": torch.ones(3)}
        dcp.save(prefixed, checkpoint_id=tmp_path / f"prefixed{i}", no_dist=True)
        kinds["dcp_prefixed"].append(tmp_path / f"prefixed{i}")
        dcp.save(dict(tensors), checkpoint_id=tmp_path / f"plain{i}", no_dist=True)
        kinds["dcp_plain"].append(tmp_path / f"plain{i}")
    expected = load_transformer(tmp_path / "memory").state_dict()
    for kind, checkpoints in kinds.items():
        merge(checkpoints, wsm_weights(3), tmp_path / kind, None if kind == "directories" else CONFIG)
        actual = load_transformer(tmp_path / kind).state_dict()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), kind


def test_diffusers_loads_the_merge(trajectory, tmp_path):
    merge(trajectory[:2], wsm_weights(2), tmp_path, CONFIG)
    _, report = NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_what_does_not_fit_is_refused(trajectory, tmp_path):
    other = dict(trajectory[1])
    other["img_in.bias"] = torch.zeros(7)
    for checkpoints, weights, message in [
        ([], [], "0 and 0"),
        (trajectory[:2], [1.0], "2 and 1"),
        (trajectory[:2], [0.5, 0.6], "sum to 1, got 1.1"),
        ([trajectory[0], other], [0.5, 0.5], r"checkpoint 2 of 2 .* img_in.bias"),
        ([{"img_in.bias": torch.zeros(32)}], [1.0], "missing"),
        ([tmp_path], [1.0], "not a checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge(checkpoints, weights, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match="config"):
        merge(trajectory[:1], [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_metadata_of_each_checkpoint_is_parsed_once_however_many_tensors_it_has(trajectory, tmp_path, monkeypatch):
    for i, checkpoint in enumerate(trajectory[:3]):
        dcp.save(dict(checkpoint), checkpoint_id=tmp_path / f"step-{i}", no_dist=True)
    parsed = []
    unpickle = _MetadataUnpickler.load
    monkeypatch.setattr(_MetadataUnpickler, "load", lambda self: parsed.append(1) or unpickle(self))
    report = merge([tmp_path / f"step-{i}" for i in range(3)], wsm_weights(3), tmp_path / "merged", CONFIG)
    assert report["tensors"] > 20 and len(parsed) == 3
    merge(trajectory[:3], wsm_weights(3), tmp_path / "expected", CONFIG)
    expected, actual = (load_transformer(tmp_path / name).state_dict() for name in ("expected", "merged"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
