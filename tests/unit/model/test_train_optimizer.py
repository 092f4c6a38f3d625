"""The trainer's optimisers: what a step does to the parameters that hold two matrices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from model.config import OptimConfig, TransformerConfig
from model.optim import is_muon_parameter, split_matrices, update_scale
from model.transformer import NucleusTransformer


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gate_and_up_are_orthogonalised_apart(alone):
    from model.train.optimizer import NucleusOptimizers

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, attention_head_dim=8, num_attention_heads=6, num_key_value_heads=3, joint_attention_dim=16,
        in_channels=16, out_channels=4, axes_dims_rope=(2, 2, 4), num_experts=2, moe_intermediate_dim=16,
        dense_moe_strategy="leave_first_block_dense", capacity_factors=1.0,
    )  # fmt: skip
    model = NucleusTransformer(config)
    optimizers = NucleusOptimizers.Config(optim=OptimConfig(muon_lr=1.0, adamw_lr=1.0, muon_ns_steps=8)).build(model_parts=[model])
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
            scale = update_scale(*((columns, rows) if stacked else (rows, columns)), "spectral")
            values = torch.linalg.svdvals(part) / scale
            assert 0.5 < values.min() and values.max() < 1.4, name
        if packed == 2:
            packed_seen.add(name.split("img_mlp.")[1])
    assert packed_seen == {"net.0.proj.weight", "shared_expert.net.0.proj.weight", "experts.gate_up_proj"}
