"""The trainer's optimisers: a step of the parameters that hold two matrices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from small_model import SMALL

from model.config import OptimConfig, TransformerConfig
from model.optim import describe_groups, is_muon_parameter, parameter_groups, split_matrices, update_scale
from model.transformer import NucleusTransformer


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("scale_kind", ["spectral", "rms"])
def test_gate_and_up_are_orthogonalised_separately_at_the_configured_scale(alone, scale_kind):
    from model.train.optimizer import NucleusOptimizers

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, attention_head_dim=8, num_attention_heads=6, num_key_value_heads=3, joint_attention_dim=16,
        in_channels=16, out_channels=4, axes_dims_rope=(2, 2, 4), num_experts=2, moe_intermediate_dim=16,
        dense_moe_strategy="leave_first_block_dense", capacity_factors=1.0,
    )  # fmt: skip
    model = NucleusTransformer(config)
    optim = OptimConfig(muon_lr=1.0, adamw_lr=1.0, muon_ns_steps=8, muon_scale=scale_kind)
    optimizers = NucleusOptimizers.Config(optim=optim).build(model_parts=[model])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for name, parameter in model.named_parameters():
        packed, stacked = split_matrices(name, parameter)
        if packed == 2:  # up has small gradients: taken as one matrix with gate, it would hardly be updated
            _, up = parameter.grad.chunk(2, dim=2 if stacked else 0)
            up.mul_(0.01)
    optimizers.step()
    packed_seen = set()
    for name, parameter in model.named_parameters():
        if not is_muon_parameter(name):
            continue
        packed, stacked = split_matrices(name, parameter)
        change = before[name] - parameter.detach()
        for part in change.chunk(packed, dim=2 if stacked else 0):
            rows, columns = part.shape[-2:]
            scale = update_scale(*((columns, rows) if stacked else (rows, columns)), scale_kind)
            values = torch.linalg.svdvals(part) / scale
            assert 0.5 < values.min() and values.max() < 1.4, name
        if packed == 2:
            packed_seen.add(name.split("img_mlp.")[1])
    assert packed_seen == {"net.0.proj.weight", "shared_expert.net.0.proj.weight", "experts.gate_up_proj"}


def test_at_the_published_rates_both_groups_take_updates_of_one_size(alone):
    """One rate is published for both. At Muon's own scale a 2048 x 2048 matrix would move 0.2 x 2048^0.5 = 9 times less."""
    from model.train.optimizer import NucleusOptimizers
    from tasks.recipe import load_recipe

    optim = load_recipe("nucleus_17b").train.optim
    assert optim.muon_lr == optim.adamw_lr
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([torch.nn.Module()])
    model.transformer_blocks[0].attn = torch.nn.Module()
    model.transformer_blocks[0].attn.to_q = torch.nn.Linear(512, 512, bias=False)
    model.proj_out = torch.nn.Linear(512, 64, bias=False)
    optimizers = NucleusOptimizers.Config(optim=optim).build(model_parts=[model])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    muon, adamw = (
        (model.get_parameter(name) - before[name]).square().mean().sqrt().item() / optim.adamw_lr
        for name in ("transformer_blocks.0.attn.to_q.weight", "proj_out.weight")
    )
    assert 0.15 < muon < 0.25  # AdamW's, once its averages have settled, is 0.2 to 0.4 (arXiv 2502.16982)
    assert adamw == pytest.approx(1.0, rel=1e-3)  # its first step is the sign


def test_every_number_of_the_recipe_reaches_its_optimiser(alone):
    from model.train.optimizer import NucleusOptimizers

    asked = dict(
        muon_lr=0.1, muon_momentum=0.2, muon_ns_steps=3, muon_weight_decay=0.4, muon_scale="rms",
        adamw_lr=0.5, adamw_betas=(0.6, 0.7), adamw_eps=0.8, adamw_weight_decay=0.9,
    )  # fmt: skip
    model = NucleusTransformer(TransformerConfig(**SMALL))
    optimizers = NucleusOptimizers.Config(optim=OptimConfig(**asked)).build(model_parts=[model])
    for optimizer, prefix in zip(optimizers, ("muon_", "adamw_"), strict=True):
        (group,) = optimizer.param_groups
        result = {prefix + key: value for key, value in group.items()}
        assert {key: result[key] for key in asked if key.startswith(prefix)} == {
            key: value for key, value in asked.items() if key.startswith(prefix)
        }


def test_the_first_rank_prints_which_parameters_are_in_which_group(alone, capsys, monkeypatch):
    from model.train.optimizer import NucleusOptimizers

    model = NucleusTransformer(TransformerConfig(**SMALL))
    config = NucleusOptimizers.Config(optim=OptimConfig(muon_lr=0.1, adamw_lr=0.1))
    config.build(model_parts=[model])
    assert capsys.readouterr().out == describe_groups(parameter_groups(model)) + "\n"
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    config.build(model_parts=[model])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel, scale, left", [
    (64, "rms", {"experts.gate_up_proj"}),
    (8, "rms", {"experts.gate_up_proj"}),
    (8, "spectral", {"experts.gate_up_proj", "experts.down_proj"}),  # 1344 to 2048: its factor is from out / in
])  # fmt: skip
def test_dist_muon_takes_all_of_the_17b_models_matrices_but_these(expert_parallel, scale, left):
    from model.train.parallel.dist_muon import split
    from model.train.parallel.fake_ranks import first_rank_of
    from tasks.recipe import load_recipe

    with first_rank_of(64, expert_parallel, load_recipe("nucleus_17b").model) as model:
        named = parameter_groups(model)["muon"]
        taken, others = split(named, scale)
    assert len(taken) + len(others) == len(named) == 314
    assert {name.split("img_mlp.")[-1] for name, _ in others} == left
    assert len(others) == 29 * len(left)
