"""Layouts that are refused before any process starts, and the optimiser of each parameter of the released model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import TrainConfig, TransformerConfig
from model.optim import describe_groups, parameter_groups
from model.ranks import Degrees, local_batch_size, rank_degrees
from model.recipe_yaml import read_recipe
from model.transformer import NucleusTransformer

RECIPE = read_recipe(Path(__file__).parents[4] / "recipes" / "nucleus_17b.yaml")
MODEL = TransformerConfig(**RECIPE["model"])
TRAIN = TrainConfig(**RECIPE["train"])


def changed(**values) -> TrainConfig:
    return TrainConfig(**{**RECIPE["train"], **values})


@pytest.mark.parametrize(
    ("values", "ranks", "expected", "expert_shard"),
    [
        ({}, 64, Degrees(1, 64, 8), 8),  # the recipe's: the ranks of a node exchange rows
        ({"expert_parallel": 64}, 64, Degrees(1, 64, 64), 1),  # the paper's: one expert of each layer on each GPU
        ({"expert_parallel": 8, "data_parallel_replicate": 8}, 64, Degrees(8, 8, 8), 1),
        ({"expert_parallel": 1, "data_parallel_replicate": 2, "data_parallel_shard": 32}, 64, Degrees(2, 32, 1), 32),
        ({"expert_parallel": 1}, 1, Degrees(1, 1, 1), 1),  # one process: whole weights
    ],
)
def test_the_degrees_are_the_configured_ones(values, ranks, expected, expert_shard):
    actual = rank_degrees(MODEL, changed(**values), ranks)
    assert actual == expected and actual.expert_shard == expert_shard


@pytest.mark.parametrize(
    ("values", "model", "ranks", "message"),
    [
        ({"data_parallel_replicate": 3}, {}, 64,
         "train.data_parallel_replicate=3 must divide the 64 ranks: 64 = 21 x 3 + 1"),
        ({"data_parallel_replicate": 2, "data_parallel_shard": 16}, {}, 64,
         "train.data_parallel_replicate=2 x train.data_parallel_shard=16 = 32, which is not the 64 ranks"),
        ({"expert_parallel": 64}, {}, 16, "train.expert_parallel=64 must divide the 16 ranks that share the weights: 16 = 0 x 64 + 16"),
        ({"expert_parallel": 8, "data_parallel_replicate": 16}, {}, 64,
         "train.expert_parallel=8 must divide the 4 ranks that share the weights: 4 = 0 x 8 + 4"),
        ({"muon_implementation": "torchtitan", "expert_parallel": 1, "data_parallel_replicate": 8}, {}, 8,
         "train.muon_implementation='torchtitan' takes matrices that FSDP shards, and 1 rank holds all weights (8 ranks / "
         "train.data_parallel_replicate=8): give it more ranks, or take 'nucleus'"),
        ({"expert_parallel": 24}, {}, 48,
         "train.expert_parallel=24 must divide model.num_experts=64: 64 = 2 x 24 + 16"),
        ({}, {"routing": {"kind": "dense"}, "capacity_factors": 2.0}, 64,
         "train.expert_parallel=8 shares out experts, and model.routing.kind='dense' has none"),
        ({"expert_parallel": 1}, {}, 128,
         "128 ranks share 64 experts: neither these (64 = 0 x 128 + 64) nor moe_intermediate_dim 1344 "
         "(1344 = 10 x 128 + 64) can be cut into equal parts"),
    ],
)  # fmt: skip
def test_degrees_that_do_not_fit_are_refused_with_the_arithmetic(values, model, ranks, message):
    with pytest.raises(ValueError) as caught:
        rank_degrees(TransformerConfig(**{**RECIPE["model"], **model}), changed(**values), ranks)
    assert message in str(caught.value)


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_arithmetic():
    stage = TRAIN.stages[2]
    assert local_batch_size(stage, TRAIN, 64) == 4 and local_batch_size(stage, changed(local_batch_size=1), 64) == 1
    assert [local_batch_size(stage, changed(local_batch_size=16), 64) for stage in TRAIN.stages] == [16, 16, 4]
    with pytest.raises(
        ValueError, match=r"stage_1024: batch_size=256 must be a multiple of 240 .*: 256 = 1 x 240 \+ 16"
    ):
        local_batch_size(stage, TRAIN, 48)
    with pytest.raises(ValueError, match=r"\(local_batch_size=3 x 64 ranks\): 256 = 1 x 192 \+ 64"):
        local_batch_size(stage, changed(local_batch_size=3), 64)
    with pytest.raises(ValueError, match=r"\(local_batch_size=1 x 512 ranks\): 256 = 0 x 512 \+ 256"):
        local_batch_size(stage, TRAIN, 512)


def test_heads_that_do_not_divide_and_no_ranks_at_all_are_refused():
    with pytest.raises(ValueError, match=r"num_attention_heads=16: 16 = 3 x 5 \+ 1"):
        TransformerConfig(**{**RECIPE["model"], "num_key_value_heads": 5})
    with pytest.raises(ValueError, match="data_parallel_shard=0"):
        changed(data_parallel_shard=0)


BLOCK = {
    "img_mod.1.weight": "adamw",
    "img_mod.1.bias": "adamw",
    "encoder_proj.weight": "adamw",
    "encoder_proj.bias": "adamw",
    "attn.to_q.weight": "muon",
    "attn.to_k.weight": "muon",
    "attn.to_v.weight": "muon",
    "attn.to_out.0.weight": "muon",
    "attn.add_k_proj.weight": "muon",
    "attn.add_v_proj.weight": "muon",
    "attn.norm_q.weight": "adamw",
    "attn.norm_k.weight": "adamw",
    "attn.norm_added_k.weight": "adamw",
    "attn.norm_added_q.weight": "frozen",  # diffusers makes it and uses it nowhere
}
DENSE = {"img_mlp.net.0.proj.weight": "muon", "img_mlp.net.2.weight": "muon"}
MOE = {
    "img_mlp.gate.weight": "adamw",
    "img_mlp.experts.gate_up_proj": "muon",
    "img_mlp.experts.down_proj": "muon",
    "img_mlp.shared_expert.net.0.proj.weight": "muon",
    "img_mlp.shared_expert.net.2.weight": "muon",
}
OUTSIDE = (
    "time_text_embed.timestep_embedder.linear_1.weight",
    "time_text_embed.timestep_embedder.linear_1.bias",
    "time_text_embed.timestep_embedder.linear_2.weight",
    "time_text_embed.timestep_embedder.linear_2.bias",
    "time_text_embed.norm.weight",
    "txt_norm.weight",
    "img_in.weight",
    "img_in.bias",
    "norm_out.linear.weight",
    "norm_out.linear.bias",
    "proj_out.weight",
)


def test_every_parameter_of_the_released_model_is_in_the_group_that_the_recipe_names():
    expected = dict.fromkeys(OUTSIDE, "adamw")
    for layer in range(32):
        for name, group in (BLOCK | (DENSE if layer < 3 else MOE)).items():
            expected[f"transformer_blocks.{layer}.{name}"] = group
    with torch.device("meta"):
        model = NucleusTransformer(MODEL)
    groups = parameter_groups(model)
    actual = {name: "frozen" for name, parameter in model.named_parameters() if not parameter.requires_grad}
    actual |= {name: group for group, named in groups.items() for name, _ in named}
    assert len(expected) == 610 and actual == expected

    table = describe_groups(groups).splitlines()
    muon, adamw = (sum(p.numel() for _, p in named) for named in groups.values())
    assert muon + adamw == 16_922_679_296 - 32 * 128
    assert table[0] == f"muon: {sum(g == 'muon' for g in expected.values())} tensors, {muon:,} parameters"
    assert "    29 x transformer_blocks.*.img_mlp.experts.gate_up_proj [64, 2048, 2688]" in table
