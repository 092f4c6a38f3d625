"""Ablations of routing: each against its definition, and that they do not change the default."""

import inspect
import math

import pytest
import torch
from pydantic import ValidationError
from small_model import SMALL

from model import losses
from model.config import RoutingConfig, TransformerConfig
from model.layers.moe import MoE, token_choice
from model.train.spec import count_parameters
from model.transformer import NucleusTransformer, RouterTrace

B, S, D, E, F = 2, 10, 12, 4, 8
SHAPE = SMALL | {"num_layers": 4}


def make(capacity_factor=2.0, **routing):
    torch.manual_seed(0)
    moe = MoE(D, F, E, capacity_factor, routing=RoutingConfig(**routing))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe, torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(B, D)


def expert(moe, e, token):
    gate, up = (token @ moe.experts.gate_up_proj[e]).chunk(2)
    return (gate * gate.sigmoid() * up) @ moe.experts.down_proj[e]


def token_choice_by_definition(moe, x, unmodulated, timestep):
    """One token at a time; a full expert keeps the tokens that it has the highest scores for."""
    k, limit = int(moe.capacity_factor), moe.expert_limit
    room = S if limit is None else max(1, math.ceil(limit * k * S / E))
    outputs = []
    for b in range(B):
        scores = torch.stack([moe.gate.weight @ torch.cat((timestep[b], unmodulated[b, s])) for s in range(S)])
        scores = scores.softmax(-1)
        wanted = {s: sorted(range(E), key=lambda e: -scores[s, e].item())[:k] for s in range(S)}
        kept = set()
        for e in range(E):
            asking = [s for s in range(S) if e in wanted[s]]
            kept |= {(s, e) for s in sorted(asking, key=lambda s: -scores[s, e].item())[:room]}
        for s in range(S):
            mine = [e for e in wanted[s] if (s, e) in kept]
            up, gate = moe.shared_expert.net[0].proj(x[b, s]).chunk(2)
            out = moe.shared_expert.net[2](up * gate * gate.sigmoid())
            for e in mine:
                weight = scores[s, e] / sum(scores[s, other] for other in mine)
                out = out + moe.route_scale * weight * expert(moe, e, x[b, s])
            outputs.append(out)
    return torch.stack(outputs).view(B, S, D)


@pytest.mark.parametrize(("k", "limit"), [(1, None), (2, None), (4, None), (2, 1.0), (2, 0.5)])
def test_token_choice_equals_a_loop_over_tokens_in_value_and_gradients(k, limit):
    moe, x, unmodulated, timestep = make(float(k), kind="token_choice", expert_limit=limit)
    actual, routing = moe(x, unmodulated, timestep)
    wanted = token_choice_by_definition(moe, x, unmodulated, timestep)
    assert torch.allclose(actual, wanted, atol=1e-5)
    loads = routing.taken_BSE().sum(dim=1)
    assert (routing.taken_BSE().sum(dim=2) == k).all() == (limit is None)  # dropless, or some are dropped
    assert limit is None or loads.max() <= math.ceil(limit * k * S / E)
    pull = torch.randn(B, S, D)
    parameters = list(moe.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((actual * pull).sum(), parameters), torch.autograd.grad((wanted * pull).sum(), parameters)
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_token_choice_does_not_depend_on_the_other_samples_of_the_batch():
    for limit in (None, 0.5):
        moe, x, unmodulated, timestep = make(kind="token_choice", expert_limit=limit)
        together, _ = moe(x, unmodulated, timestep)
        alone = torch.cat([moe(x[b : b + 1], unmodulated[b : b + 1], timestep[b : b + 1])[0] for b in range(B)])
        assert torch.allclose(alone, together, atol=1e-6)


def test_what_fills_an_expert_up_is_not_taken_and_weighs_nothing():
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]])  # two tokens want expert 0, one wants expert 1
    chosen, indices, taken = token_choice(scores, 1)
    assert taken.tolist() == [[[True, True], [True, False]]]
    assert indices[0, 0].tolist() == [0, 1] and indices[0, 1, 0].item() == 2
    assert chosen[0].tolist() == [pytest.approx([0.9, 0.8]), pytest.approx([0.7, 0.0])]


def test_weights_and_taken_say_what_the_indices_say():
    for routing_config in ({}, {"kind": "token_choice"}):
        moe, x, unmodulated, timestep = make(1.0, **routing_config)
        _, routing = moe(x, unmodulated, timestep)
        weights, taken = routing.weights_BSE(), routing.taken_BSE()
        assert torch.equal(weights > 0, taken) and taken.any() and not taken.all()
        real = torch.ones_like(routing.gates_BEC, dtype=torch.bool) if routing.taken_BEC is None else routing.taken_BEC
        for b, e, c in real.nonzero().tolist():
            assert weights[b, routing.indices_BEC[b, e, c], e] == routing.gates_BEC[b, e, c]
        assert taken.sum() == real.sum()


def test_a_coupled_router_sees_what_the_experts_see():
    moe, x, unmodulated, timestep = make(coupled=True)
    decoupled, *_ = make()
    actual, routing = moe(x, unmodulated, timestep)
    wanted, _ = decoupled(x, x, timestep)
    assert torch.equal(actual, wanted)
    _, other = moe(x, unmodulated * -3 + 1, timestep)
    assert torch.equal(routing.indices_BEC, other.indices_BEC)
    assert not torch.equal(routing.scores_BSE, decoupled(x, unmodulated, timestep)[1].scores_BSE)


def test_load_balance_equals_its_definition_and_is_least_where_experts_share_the_tokens():
    moe, x, unmodulated, timestep = make(kind="token_choice")
    _, routing = moe(x, unmodulated, timestep)
    wanted = 0.0
    for b in range(B):
        for e in range(E):
            share = sum(e in routing.scores_BSE[b, s].topk(2).indices.tolist() for s in range(S)) / (2 * S)
            wanted += E * share * routing.scores_BSE[b, :, e].mean().item() / B
    trace = RouterTrace()
    trace.add(0, routing)
    trace.add(3, routing)
    assert losses.load_balance_loss(trace.routings()).item() == pytest.approx(2 * wanted, rel=1e-5)
    assert losses.load_balance_loss([]).item() == 0.0
    # With equal scores, a token's k best are the first experts; so the scores are set.
    even = torch.full((1, 4, 4), 0.25) + 0.1 * torch.eye(4)
    crowded = torch.full((1, 4, 4), 0.25) + 0.1 * torch.eye(4)[:1]

    def loss_of(scores):
        layer = make(1.0, kind="token_choice")[0]
        weight = torch.zeros_like(layer.gate.weight)
        weight[:, D : D + E] = torch.eye(E)
        layer.gate.weight.data = weight
        seen = torch.zeros(1, 4, D)
        seen[..., :E] = scores.log()
        return losses.load_balance_loss([layer.route(seen, torch.zeros(1, D))]).item()

    assert loss_of(even) == pytest.approx(1.0, abs=1e-5) and loss_of(crowded) > 1.05


def test_load_balance_is_the_same_however_the_batch_is_cut():
    moe, x, unmodulated, timestep = make(kind="token_choice")
    whole = losses.load_balance_loss([moe(x, unmodulated, timestep)[1]])
    parts = [
        losses.load_balance_loss([moe(x[b : b + 1], unmodulated[b : b + 1], timestep[b : b + 1])[1]]) for b in range(B)
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / B, rel=1e-6)


@pytest.mark.parametrize("factors", [2.0, (1.0, 3.0, 1.5, 2.0)])
def test_dense_has_the_weights_that_are_active_in_the_moe(factors):
    """Counted on the real modules, without the router, which a dense layer lacks."""
    sparse = TransformerConfig(**{**SHAPE, "capacity_factors": factors})
    dense = TransformerConfig(**{**SHAPE, "capacity_factors": factors, "routing": {"kind": "dense"}})
    with torch.device("meta"):
        sparse_model, dense_model = NucleusTransformer(sparse), NucleusTransformer(dense)
    routers = sum(p.numel() for name, p in sparse_model.named_parameters() if ".gate." in name)
    assert routers == 3 * 2 * 128 * 4
    _, active = count_parameters(sparse_model, sparse)
    total, dense_active = count_parameters(dense_model, dense)
    assert total == dense_active == active - routers
    assert not any("expert" in name or "gate" in name for name, _ in dense_model.named_parameters())


def test_no_stage_changes_the_width_of_a_dense_model():
    dense = TransformerConfig(**SHAPE, routing={"kind": "dense"})
    assert dense.with_capacity_factors(4.0) == dense
    sparse = TransformerConfig(**SHAPE)
    assert sparse.with_capacity_factors(4.0).capacity_factors == 4.0


def test_the_default_writes_only_diffusers_keys_and_ablations_are_read_back():
    from diffusers import NucleusMoEImageTransformer2DModel

    config = TransformerConfig(**SHAPE)
    assert "routing" not in config.model_dump() and "routing" not in config.model_dump_json()
    assert ["self", *config.model_dump()] == list(
        inspect.signature(NucleusMoEImageTransformer2DModel.__init__).parameters
    )
    assert TransformerConfig(**SHAPE, routing={"kind": "expert_choice"}).model_dump() == config.model_dump()
    for routing in ({"kind": "token_choice", "expert_limit": 1.5}, {"coupled": True}, {"kind": "dense"}):
        ablation = TransformerConfig(**SHAPE, routing=routing)
        assert ablation.is_ablation
        assert TransformerConfig(**ablation.model_dump(mode="json")) == ablation
        assert TransformerConfig.model_validate_json(ablation.model_dump_json()) == ablation


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"routing": {"kind": "token_choice"}, "capacity_factors": 1.5}, "1.5 must be a whole number"),
        ({"routing": {"expert_limit": 1.0}}, "expert_limit=1.0 is of kind 'token_choice'"),
        ({"routing": {"kind": "dense", "coupled": True}}, "needs a router"),
        ({"routing": {"knd": "dense"}}, "knd"),
    ],
)
def test_impossible_ablations_are_refused(changes, expected):
    with pytest.raises(ValidationError, match=expected):
        TransformerConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize("routing", [{"kind": "token_choice"}, {"coupled": True}, {"kind": "dense"}])
def test_an_ablation_computes_finite_outputs_and_gradients_for_all_that_it_has(routing):
    torch.manual_seed(0)
    model = NucleusTransformer(TransformerConfig(**SHAPE, routing=routing))
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    trace = RouterTrace()
    out = model(
        hidden_states=torch.randn(2, 16, 16),
        img_shapes=(1, 4, 4),
        encoder_hidden_states=torch.randn(2, 3, 24),
        timestep=torch.rand(2),
        collect=trace,
    )
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    statistics = trace.statistics()
    assert not statistics if routing == {"kind": "dense"} else 0 <= statistics["dropped"] < 1
    if routing == {"kind": "token_choice"}:
        assert statistics["dropped"] == 0 and statistics["experts_max"] == 2


def test_the_planner_plans_a_dense_model_at_its_own_width_in_every_stage():
    from model.plan.planner import forward_flops
    from tasks.recipe import load_recipe

    sparse, dense = load_recipe("tiny").model, load_recipe("ablations/dense_ffn").model
    of_sparse, of_dense = (forward_flops(model, 16, 16) for model in (sparse, dense))
    assert of_dense["experts"] == of_dense["shared_expert"] == of_dense["router"] == 0
    first_blocks = of_sparse["dense_ffn"]
    assert of_dense["dense_ffn"] == first_blocks + of_sparse["experts"] + of_sparse["shared_expert"]
