"""Activation checkpointing and torch.compile change what is kept and when it is computed, not the results."""

import shutil
import weakref
from types import SimpleNamespace

import flash_standin
import pytest
import torch
from small_model import SMALL

from model.config import TransformerConfig
from model.layers import attention, moe
from model.optim import parameter_groups
from model.train import activation
from model.train.activation import activation_config
from model.train.parallel.parallelize import parallelize
from model.transformer import NucleusTransformer, RouterTrace

CONFIG = TransformerConfig(**SMALL | {"num_key_value_heads": 2, "moe_intermediate_dim": 40})
ONE = TransformerConfig(
    **{**CONFIG.model_dump(), "num_layers": 1, "dense_moe_strategy": "all_moe"}
)  # compiling takes long
TOKENS, TEXT, BATCH = 144, 9, 2  # enough tokens for the fused attention kernel
POLICIES = ("none", "selective", "full")


def build(policy="none", compiler=None, config=CONFIG):
    """Builds a model as the trainer does, in one process."""
    torch.manual_seed(0)
    model = NucleusTransformer(config)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    if compiler:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()  # of earlier tests
    return parallelize(
        model,
        parallel_dims=SimpleNamespace(ep_enabled=False, dp_shard_enabled=False),
        training=None,
        parallelism=None,
        compile_config=SimpleNamespace(enable=compiler is not None, backend=compiler),
        ac_config=activation_config(policy),
        dump_folder="",
    )


def inputs(masked=True):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, 5:] = False
    return dict(
        hidden_states=torch.randn(BATCH, TOKENS, 16, generator=generator),
        img_shapes=(1, 12, 12),
        encoder_hidden_states=torch.randn(BATCH, TEXT, 24, generator=generator),
        encoder_hidden_states_mask=mask if masked else None,
        timestep=torch.tensor([0.2, 0.9]),
    )


def run(model, dtype=None, masked=True):
    trace = RouterTrace()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(**inputs(masked), collect=trace)
    loss = out.float().square().mean() + 1e-3 * sum(x.float().logsumexp(-1).square().mean() for x in trace.logits())
    loss.backward()
    gradients = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    return loss.detach(), gradients, trace


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_loss_and_gradients_are_those_without_checkpointing(policy, dtype):
    loss, gradients, _ = run(build(), dtype)
    again, recomputed, _ = run(build(policy), dtype)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (recomputed[name] is None), name
        assert gradient is None or torch.equal(gradient, recomputed[name]), name


def test_full_keeps_least_and_none_most():
    kept = {policy: _kept_bytes(build(policy)) for policy in POLICIES}
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * kept["none"], kept


def _kept_bytes(model):
    """Bytes of the tensors that a forward keeps for the backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    live = {}

    class Tracker(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and not any(tensor is p for p in model.parameters()):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in live:
                        live[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, live.pop, storage._cdata, None)
            return out

    with Tracker():
        out = model(**inputs())
        assert out.grad_fn is not None
        return sum(live.values())


def test_selective_multiplies_no_matrices_again():
    counts = {policy: _products(build(policy)) for policy in POLICIES}
    assert counts["selective"] == counts["none"] < counts["full"]


def _products(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**inputs()).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("policy", POLICIES)
def test_names_and_optimiser_groups_stay(policy):
    model, plain = build(policy), NucleusTransformer(CONFIG)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for group, members in parameter_groups(plain).items():
        assert [name for name, _ in parameter_groups(model)[group]] == [name for name, _ in members]


def test_each_policy_is_the_class_of_its_name():
    assert activation_config("none") is None
    names = {policy: type(activation_config(policy))._owner.__name__ for policy in ("selective", "full")}
    assert names == {"selective": "SelectiveCheckpointing", "full": "FullCheckpointing"}


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_blocks_equal_eager_ones_and_keep_their_names():
    """With selective checkpointing, as in the 17B recipe."""
    model = build("selective", "inductor", config=ONE)
    loss, gradients, _ = run(build(config=ONE))
    compiled_loss, compiled, _ = run(model)
    assert_close(compiled_loss, compiled, loss, gradients)
    assert model.state_dict().keys() == NucleusTransformer(ONE).state_dict().keys()
    assert graphs_and_breaks() == (1, {})


def assert_close(loss, gradients, expected_loss, expected, rounding=1e-4):
    assert torch.allclose(loss, expected_loss, rtol=rounding / 10)
    for name, gradient in expected.items():
        if gradient is not None:
            assert (gradient - gradients[name]).norm() <= rounding * gradient.norm(), name


def graphs_and_breaks():
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_token_choice_compiles_whole(policy):
    """Although the number of tokens of the fullest expert is known only at run time."""
    config = TransformerConfig(**{**ONE.model_dump(), "routing": {"kind": "token_choice"}})
    assert_close(*run(build(policy, "aot_eager", config))[:2], *run(build(config=config))[:2])
    assert graphs_and_breaks() == (1, {})


@pytest.mark.slow
def test_what_cannot_be_compiled_is_an_error_and_runs_nowhere_uncompiled(monkeypatch):
    monkeypatch.setattr(moe, "combine", torch.compiler.disable(moe.combine))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        build(compiler="aot_eager", config=ONE)(**inputs())


@pytest.fixture
def flash(request, monkeypatch):
    flash_standin.install(monkeypatch, *request.param)
    return flash_standin


RELEASES = pytest.mark.parametrize("flash", [("flash2",), ("flash3",)], indirect=True, ids=str)
EARLY = pytest.mark.parametrize("flash", [("flash3", True)], indirect=True, ids=str)


CALLS = [(("flash2",), False), (("flash2",), True), (("flash3",), False), (("flash3",), True), (("varlen",), True)]


@pytest.mark.parametrize("flash, masked", CALLS, indirect=["flash"], ids=str)
def test_flash_attention_is_computed_once_unless_all_is_again(flash, masked):
    """Its package is imported when blocks are wrapped, so that its operations exist."""
    build("selective", config=ONE)
    assert attention._packages
    for policy in ("selective", "none", "full"):
        run(build(policy, config=ONE), torch.bfloat16, masked)
        _check_calls(flash, masked, policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flash, masked, policy",
    [
        *((*call, "selective") for call in CALLS),
        *((("varlen",), True, policy) for policy in ("none", "full")),
        (("flash2",), False, "full"),
    ],
    indirect=["flash"],
    ids=str,
)
def test_flash_attention_compiles_whole_and_is_computed_once_unless_all_is_again(flash, masked, policy):
    """Selective checkpointing names the operations of each release; the other policies take any as it is."""
    expected = run(build("selective", config=ONE), torch.bfloat16, masked)[:2]
    flash.calls.clear()
    actual = run(build(policy, "aot_eager", ONE), torch.bfloat16, masked)[:2]
    _check_calls(flash, masked, policy)
    assert graphs_and_breaks() == (1, {})
    assert_close(*actual, *expected, rounding=0.05)


def _check_calls(flash, masked, policy):
    kinds = ["varlen" if masked else "dense"] * (2 if policy == "full" else 1)
    assert [kind for kind, *_ in flash.calls] == kinds, policy
    flash.calls.clear()


@EARLY
def test_an_early_flash_attention_3_is_computed_once_and_not_compiled(flash, monkeypatch):
    monkeypatch.setitem(activation.FLASH_OPS, "flash3", ("flash_attn_3.missing.default",))  # registered by other tests
    run(build("selective", config=ONE), torch.bfloat16)
    assert len(flash.calls) == 1
    with pytest.raises(ValueError, match="^train.compile needs .*flash_attn_interface has "):
        build(compiler="aot_eager", config=ONE)


@RELEASES
def test_a_flash_attention_that_selective_checkpointing_cannot_name_is_refused(flash, monkeypatch):
    monkeypatch.setattr(activation, "FLASH_OPS", dict.fromkeys(activation.FLASH_OPS, ("flash_attn.missing.default",)))
    monkeypatch.setattr(activation, "EARLY_FLASH_OPS", {})
    with pytest.raises(
        ValueError, match="^train.activation_checkpointing='selective' needs .*attention_backend='sdpa'"
    ):
        build("selective")
