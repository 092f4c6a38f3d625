import copy
import math

import pytest
import torch
from small_model import SMALL
from torch import nn

from model import optim
from model.config import DecayConfig, TransformerConfig
from model.optim import Muon, learning_rate_factor, newton_schulz, parameter_groups, update_scale
from model.transformer import NucleusTransformer

TINY = TransformerConfig(**SMALL | {"num_layers": 2, "num_key_value_heads": 4})


def polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def test_groups_hold_every_trainable_parameter_once_and_matrices_go_to_muon():
    model = NucleusTransformer(TINY)
    groups = {key: dict(value) for key, value in parameter_groups(model).items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert groups["muon"].keys() | groups["adamw"].keys() == trainable
    assert not groups["muon"].keys() & groups["adamw"].keys()
    muon = {name.split(".", 2)[2] for name in groups["muon"]}
    assert muon == {
        "attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "attn.to_out.0.weight",
        "attn.add_k_proj.weight", "attn.add_v_proj.weight",
        "img_mlp.net.0.proj.weight", "img_mlp.net.2.weight",
        "img_mlp.experts.gate_up_proj", "img_mlp.experts.down_proj",
        "img_mlp.shared_expert.net.0.proj.weight", "img_mlp.shared_expert.net.2.weight",
    }  # fmt: skip
    adamw = groups["adamw"].keys()
    for name in ("transformer_blocks.1.img_mlp.gate.weight", "transformer_blocks.0.img_mod.1.weight",
                 "transformer_blocks.0.encoder_proj.weight", "proj_out.weight", "img_in.weight", "txt_norm.weight",
                 "transformer_blocks.0.attn.norm_q.weight"):  # fmt: skip
        assert name in adamw
    assert not any("norm_added_q" in name for name in trainable)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (3, 24, 24)])
def test_newton_schulz_gives_each_matrix_its_own_near_orthogonal_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(*shape)
    result = newton_schulz(matrices, steps=8)
    for matrix, update in zip(matrices.view(-1, *shape[-2:]), result.view(-1, *shape[-2:])):
        values = torch.linalg.svdvals(update)
        assert 0.5 < values.min() and values.max() < 1.3
        want = polar(matrix)
        assert (update * want).sum() / (update.norm() * want.norm()) > 0.95
    if len(shape) == 3:
        scaled = newton_schulz(matrices * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1), steps=8)
        assert torch.allclose(scaled, result, atol=1e-3)  # no expert is swamped by another


def muon_by_hand(parameter, gradients, packed_dim, transposed, lr, momentum, nesterov, ns_steps, weight_decay, scale):
    """The definition, one matrix at a time, without batching."""
    buffer = torch.zeros_like(parameter)
    parameter = parameter.clone()
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
        parameter *= 1 - lr * weight_decay
        matrices = parameter if parameter.dim() == 3 else parameter[None]
        updates = update if update.dim() == 3 else update[None]
        for matrix, change in zip(matrices, updates):
            parts = (
                zip(matrix.chunk(2, packed_dim), change.chunk(2, packed_dim))
                if packed_dim is not None
                else [(matrix, change)]
            )
            for goal, part in parts:
                rows, columns = part.shape
                out_features, in_features = (columns, rows) if transposed else (rows, columns)
                factors = {
                    "spectral": max(1.0, out_features / in_features) ** 0.5,
                    "rms": 0.2 * max(out_features, in_features) ** 0.5,
                }
                goal -= lr * factors[scale] * newton_schulz(part, ns_steps)
    return parameter


@pytest.mark.parametrize(
    ("ns_steps", "weight_decay", "scale", "momentum", "nesterov"),
    [
        (5, 0.0, "spectral", 0.95, True),
        (3, 0.4, "rms", 0.8, False),
    ],
)
def test_muon_step_equals_the_definition_matrix_by_matrix(ns_steps, weight_decay, scale, momentum, nesterov):
    torch.manual_seed(0)
    options = dict(
        lr=0.1, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, weight_decay=weight_decay, scale=scale
    )
    shapes = {
        "transformer_blocks.0.attn.to_q.weight": ((16, 16), None, False),
        "transformer_blocks.0.attn.to_k.weight": ((8, 16), None, False),
        "transformer_blocks.0.img_mlp.shared_expert.net.0.proj.weight": ((48, 16), 0, False),
        "transformer_blocks.0.img_mlp.shared_expert.net.2.weight": ((16, 24), None, False),
        "transformer_blocks.0.img_mlp.experts.gate_up_proj": ((3, 16, 48), 1, True),
        "transformer_blocks.0.img_mlp.experts.down_proj": ((3, 24, 16), None, True),
    }
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, (shape, _, _) in shapes.items()}
    gradients = {name: [torch.randn(shape) for _ in range(3)] for name, (shape, _, _) in shapes.items()}
    expected = {
        name: muon_by_hand(parameters[name].detach(), gradients[name], dim, transposed, **options)
        for name, (_, dim, transposed) in shapes.items()
    }
    optimizer = Muon(list(parameters.items()), **options)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    for name, parameter in parameters.items():
        assert torch.allclose(parameter, expected[name], atol=1e-4), name


def test_state_round_trip_continues_bitwise():
    def run(steps, model, optimizer, start=0):
        for step in range(start, start + steps):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False))  # noqa: E731
    first, second = make(), make()
    whole = Muon(first.named_parameters(), lr=0.05, weight_decay=0.1)
    run(2, first, whole)
    second.load_state_dict(first.state_dict())
    resumed = Muon(second.named_parameters(), lr=0.05, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))  # torch would share the buffers
    assert all(isinstance(value, torch.Tensor) for state in resumed.state.values() for value in state.values())
    run(2, first, whole, start=2)
    run(2, second, resumed, start=2)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_muon_refuses_vectors_and_unknown_scales():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="adam"):
        Muon([nn.Parameter(torch.zeros(3, 3))], scale="adam")


def test_update_scales():
    assert update_scale(64, 16, "spectral") == 2.0 and update_scale(16, 64, "spectral") == 1.0
    # An orthogonal m x n update has RMS 1 / sqrt(max(m, n)); the rms scale brings it to AdamW's usual 0.2.
    assert update_scale(64, 16, "rms") / math.sqrt(64) == pytest.approx(0.2)


def test_parameters_without_gradient_stay():
    parameter = nn.Parameter(torch.ones(3, 3))
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(parameter, torch.ones(3, 3))


def test_muon_learns_a_linear_map():
    torch.manual_seed(0)
    target = torch.randn(8, 8)
    model = nn.Linear(8, 8, bias=False)
    optimizer = Muon(model.named_parameters(), lr=0.02)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(300):
        loss = (model(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_schedule_warms_up_linearly_and_without_a_decay_stays():
    assert [learning_rate_factor(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(10**7, 1000) == 1.0 and learning_rate_factor(0, 0) == 1.0


def test_a_decay_falls_linearly_to_its_goal_at_the_last_step():
    decay = DecayConfig(steps=4, to=0.2)
    factors = [learning_rate_factor(step, 2, left=9 - step, decay=decay) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("most", [1, 3, 5, 100])
def test_matrices_go_through_newton_schulz_in_batches_of_bounded_size_with_the_same_result(most, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, *shape, generator=generator) for n, shape in ((4, (6, 8)), (1, (8, 6)), (3, (6, 8)))]
    goals = [torch.zeros_like(stack) for stack in matrices]
    sizes = []
    iterate = optim.newton_schulz
    monkeypatch.setattr(optim, "MAX_BATCH_BYTES", most * 6 * 8 * 4)
    monkeypatch.setattr(optim, "newton_schulz", lambda x, steps: sizes.append(len(x)) or iterate(x, steps))
    optim.add_orthogonal([optim.Matrices(goal, stack, -0.5) for goal, stack in zip(goals, matrices)], 5)
    assert max(sizes) == min(most, 8) and sum(sizes) == 8
    for goal, stack in zip(goals, matrices):
        assert torch.allclose(goal, -0.5 * torch.stack([iterate(matrix, 5) for matrix in stack]), atol=1e-5)
