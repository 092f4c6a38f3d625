"""The merge takes the last checkpoints of a stage, by step, with the weights of WSM, at the stage's capacity factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from model.config import MergeConfig, TransformerConfig
from model.merge import wsm_weights
from model.transformer import NucleusTransformer
from tasks.merging.merge_stage import merge_stage

CONFIG = TransformerConfig(
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=12,
    num_key_value_heads=4,
    out_channels=16,
    joint_attention_dim=16,
    axes_dims_rope=(4, 6, 6),
    dense_moe_strategy="leave_first_block_dense",
    num_experts=2,
    moe_intermediate_dim=8,
    capacity_factors=(1.0, 2.0),
)
STEPS = (9, 10, 100, 1000)  # sorted as text, 1000 would come before 9


@pytest.fixture(scope="module")
def states() -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in NucleusTransformer(CONFIG).state_dict().items()}
    return {step: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for step in STEPS}


@pytest.fixture(scope="module")
def checkpoints(states, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step, state in states.items():
        dcp.save(dict(state), checkpoint_id=folder / f"step-{step:08d}", no_dist=True)
    (folder / "step-00002000").mkdir()  # a save that was cut off: no .metadata
    (folder / "samples").mkdir()
    return folder


def merged(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "transformer/diffusion_pytorch_model.safetensors")


def test_the_last_n_by_step_are_summed_with_wsms_weights(checkpoints, states, tmp_path):
    report = merge_stage(checkpoints, CONFIG, MergeConfig(last_n=3), tmp_path)
    assert report["steps"] == [10, 100, 1000] and report["weights"] == wsm_weights(3)
    for name, tensor in merged(tmp_path).items():
        want = sum(w * states[step][name].double() for w, step in zip(wsm_weights(3), (10, 100, 1000)))
        torch.testing.assert_close(tensor, want.float(), rtol=0, atol=1e-7)


def test_merging_one_checkpoint_gives_the_last_bit_for_bit(checkpoints, states, tmp_path):
    merge_stage(checkpoints, CONFIG, MergeConfig(last_n=1), tmp_path)
    result = merged(tmp_path)
    assert result.keys() == states[1000].keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in states[1000].items())


def test_fewer_checkpoints_than_wanted_are_all_merged_with_a_message(checkpoints, tmp_path, capsys):
    report = merge_stage(checkpoints, CONFIG, MergeConfig(last_n=16), tmp_path)
    assert (report["merged"], report["wanted"], report["steps"]) == (4, 16, list(STEPS))
    assert "merge.last_n=16, but only 4 checkpoints exist" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_config_has_the_stages_capacity_factors_and_diffusers_loads_the_result(checkpoints, states, tmp_path):
    from diffusers import NucleusMoEImageTransformer2DModel

    merge_stage(checkpoints, CONFIG, MergeConfig(last_n=1), tmp_path)
    assert json.loads((tmp_path / "transformer/config.json").read_text())["capacity_factors"] == [1.0, 2.0]
    model = NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert model.transformer_blocks[1].img_mlp.capacity_factor == 2.0
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in states[1000].items())


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_no_finished_checkpoint_is_one_clear_error(tmp_path, name):
    (tmp_path / "empty/step-00000010").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name} has no finished checkpoint"):
        merge_stage(tmp_path / name, CONFIG, MergeConfig(last_n=2), tmp_path)
    assert not (tmp_path / "transformer").exists()


def test_checkpoints_of_another_model_are_refused(checkpoints, tmp_path):
    other = CONFIG.model_copy(update={"joint_attention_dim": 32})
    with pytest.raises(ValueError, match="do not fit the configuration"):
        merge_stage(checkpoints, other, MergeConfig(last_n=2), tmp_path)
