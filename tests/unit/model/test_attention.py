"""Which attention runs where, and that all implementations compute the same."""

import importlib.util
from types import SimpleNamespace

import flash_standin
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers import attention
from model.layers.attention import Machine, attend, choose_backend, pack_keys, prepare_mask, use_attention

VARLEN = {flash_standin.VARLEN}
BOTH = frozenset({"flash_attn", "flash_attn_interface"})
HOPPER, AMPERE, BLACKWELL, VOLTA = ((9, 0), (8, 0), (10, 0), (7, 0))
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "capability, modules, dtype, head_dim, expected",
    [
        (HOPPER, BOTH, BF16, 128, "flash3"),
        (HOPPER, {"flash_attn"}, BF16, 128, "flash2"),
        (HOPPER, set(), BF16, 128, "sdpa"),
        (HOPPER, VARLEN, BF16, 128, "varlen"),
        (HOPPER, VARLEN | BOTH, BF16, 128, "flash3"),
        (AMPERE, VARLEN | {"flash_attn"}, BF16, 128, "flash2"),
        (BLACKWELL, VARLEN, torch.float16, 64, "varlen"),
        (VOLTA, VARLEN, BF16, 128, "sdpa"),
        (None, VARLEN, BF16, 128, "sdpa"),
        (HOPPER, VARLEN, FP32, 128, "sdpa"),
        (HOPPER, VARLEN, BF16, 100, "sdpa"),
        (AMPERE, BOTH, torch.float16, 64, "flash2"),
        (BLACKWELL, BOTH, BF16, 128, "flash2"),
        (AMPERE, {"flash_attn_interface"}, BF16, 128, "sdpa"),
        (VOLTA, BOTH, BF16, 128, "sdpa"),
        (None, BOTH, BF16, 128, "sdpa"),
        (HOPPER, BOTH, FP32, 128, "sdpa"),
        (HOPPER, BOTH, BF16, 100, "sdpa"),
        (HOPPER, BOTH, BF16, 512, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_fits(capability, modules, dtype, head_dim, expected):
    backend, reason = choose_backend("auto", Machine(capability, frozenset(modules)), dtype, head_dim)
    assert backend == expected
    assert bool(reason) == (expected != "flash3")


@pytest.mark.parametrize(
    "wanted, capability, modules, dtype, head_dim, missing",
    [
        ("flash3", HOPPER, {"flash_attn"}, BF16, 128, "flash_attn_interface"),
        ("flash3", AMPERE, BOTH, BF16, 128, "9.0 .Hopper., not 8.0"),
        ("flash2", VOLTA, BOTH, BF16, 128, "8.0 or higher, not 7.0"),
        ("flash2", None, BOTH, BF16, 128, "a CUDA device"),
        ("flash2", HOPPER, BOTH, FP32, 128, "bfloat16 or float16 tensors, not float32"),
        ("flash2", HOPPER, BOTH, BF16, 100, "a multiple of 8 up to 256, not 100"),
        ("varlen", HOPPER, BOTH, BF16, 128, "torch.nn.attention.varlen .PyTorch 2.10 or newer"),
        ("varlen", VOLTA, VARLEN, BF16, 128, "8.0 or higher, not 7.0"),
        ("varlen", None, VARLEN, BF16, 128, "a CUDA device"),
        ("varlen", HOPPER, VARLEN, FP32, 128, "bfloat16 or float16 tensors, not float32"),
    ],
)
def test_a_named_backend_that_cannot_run_is_refused_with_what_is_missing(
    wanted, capability, modules, dtype, head_dim, missing
):
    with pytest.raises(ValueError, match=missing):
        choose_backend(wanted, Machine(capability, frozenset(modules)), dtype, head_dim)


def test_sdpa_is_allowed_on_every_machine():
    assert choose_backend("sdpa", Machine(HOPPER, BOTH), BF16, 128)[0] == "sdpa"


def test_this_machine_refuses_what_it_lacks(monkeypatch):
    monkeypatch.setattr(attention, "_machine", lambda *_: Machine(None, frozenset()))
    with pytest.raises(ValueError, match="flash-attn 3.* and a CUDA device"):
        use_attention("flash3")
    with pytest.raises(ValueError, match="one of auto, sdpa, varlen, flash2, flash3"):
        use_attention("flash4")
    assert attention._choice == "auto"


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="training needs torchtitan")
def test_a_training_is_refused_at_its_start_if_the_machine_lacks_its_backend(monkeypatch):
    from model.train.trainer import NucleusTrainer

    monkeypatch.setattr(attention, "_machine", lambda *_: Machine(None, frozenset()))
    asked = SimpleNamespace(stage=SimpleNamespace(train=SimpleNamespace(attention_backend="flash2", kernels="auto")))
    with pytest.raises(ValueError, match="attention_backend='flash2' needs"):
        NucleusTrainer(asked)
    asked.stage.train = SimpleNamespace(attention_backend="auto", kernels="cuda")
    with pytest.raises(ValueError, match="kernels='cuda'"):
        NucleusTrainer(asked)


def test_this_machine_refuses_pytorchs_own_kernel_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(attention, "_machine", lambda *_: Machine(None, frozenset(VARLEN)))
    with pytest.raises(ValueError, match="attention_backend='varlen' needs a CUDA device of compute capability 8.0"):
        use_attention("varlen")


def test_slow_attention_on_a_gpu_is_a_warning_and_fast_attention_is_none(monkeypatch, caplog):
    for modules, warned in ((frozenset(), True), (frozenset(VARLEN), False)):
        monkeypatch.setattr(attention, "_machine", lambda *_, modules=modules: Machine(HOPPER, modules))
        caplog.clear()
        attention._decide.__wrapped__("auto", "cuda", 0, BF16, 128)
        assert ("slow here" in caplog.text) == warned


@pytest.fixture(params=["flash2", "flash3", "early flash3", "varlen"])
def flash(request, monkeypatch):
    """FlashAttention, chosen for tensors of any type, also fp32."""
    *early, backend = request.param.split()
    flash_standin.install(monkeypatch, backend, early=bool(early))
    attention._import(backend)
    monkeypatch.setattr(attention, "_backend", lambda x, head_dim: backend)
    return flash_standin


def tensors(B=3, S=6, T=5, N=4, K=2, H=8):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, S, N, H), torch.randn(B, S + T, K, H), torch.randn(B, S + T, K, H)
    text = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return [x.requires_grad_() for x in (q, k, v)], F.pad(text, (S, 0), value=True)


@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_equals_sdpa_and_repeats_no_heads(flash, masked):
    (q, k, v), mask = tensors()
    mask = mask if masked else None
    weight = torch.randn(q.shape)
    expected = attention._sdpa(q, k, v, mask)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    actual = attend(q, k, v, mask)
    gradients = torch.autograd.grad((actual * weight).sum(), (q, k, v))
    assert torch.allclose(actual, expected, atol=1e-6)
    for ours, theirs in zip(gradients, wanted):
        assert torch.allclose(ours, theirs, atol=1e-5)
    rows = ("varlen", (18, 4, 8), (33, 2, 8), (33, 2, 8)) if masked else ("dense", q.shape, k.shape, v.shape)
    dense_by_sdpa = not masked and attention._backend(q, 8) == "varlen"
    assert flash.calls == ([] if dense_by_sdpa else [rows])


@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_adds_up_in_one_order_where_pytorch_is_asked_to(flash, masked):
    (q, k, v), mask = tensors()
    attend(q, k, v, mask if masked else None).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attend(q, k, v, mask if masked else None).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    dense_by_sdpa = not masked and attention._backend(q, 8) == "varlen"  # PyTorch asks itself
    assert flash.deterministic == ([] if dense_by_sdpa else [False, True])


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_packing_keys_needs_no_sums_in_the_backward_pass(flash):
    """Each key is listed once. With deterministic algorithms, PyTorch's sums on CUDA would need a sort in every
    block."""
    (q, k, v), mask = tensors()
    out = attend(q, k, v, mask).sum()
    with Operations() as ran:
        out.backward()
    assert "aten::index_select" in ran.names
    assert not [name for name in ran.names if name.startswith(("aten::index_add", "aten::index_put", "aten::scatter"))]


def test_reordered_rows_have_the_gradient_of_index_select():
    _, mask = tensors()
    packed = pack_keys(mask, 6)
    x, weight = torch.randn(mask.numel(), 2, 8, requires_grad=True), torch.randn(mask.numel(), 2, 8)
    actual, expected = attention._Reordered.apply(x, packed.order, packed.places), x.index_select(0, packed.order)
    assert torch.equal(actual, expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (actual, expected))
    assert torch.equal(ours, theirs)


def test_packed_keys_are_each_samples_own_in_order():
    (_, k, _), mask = tensors()
    packed = pack_keys(mask, 6)
    assert packed.query_offsets.tolist() == [0, 6, 12, 18]
    assert packed.key_offsets.tolist() == [0, 8, 17, 23]
    assert packed.kept.sum() == 23
    assert packed.order[packed.places].tolist() == list(range(33))
    assert packed.order[:23].tolist() == mask.flatten().nonzero().flatten().tolist()


def test_whole_model_on_flash_attention_packs_its_mask_once(flash, monkeypatch):
    pytest.importorskip("pydantic", reason="a model's configuration needs pydantic")
    from model.transformer import NucleusTransformer

    torch.manual_seed(0)
    model = NucleusTransformer.from_config(
        dict(
            in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            num_key_value_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 2, 2], num_experts=3,
            dense_moe_strategy="all_moe", moe_intermediate_dim=20, capacity_factors=1.5,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kwargs = dict(
        hidden_states=torch.randn(2, 6, 16), img_shapes=(1, 2, 3), encoder_hidden_states=torch.randn(2, 5, 12),
        timestep=torch.rand(2),
        encoder_hidden_states_mask=torch.tensor([[True] * 5, [True, False, False, True, False]]),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_backend", lambda x, head_dim: "sdpa")
        expected = model(**kwargs)
    packings = []
    monkeypatch.setattr(attention, "PLAIN_SCORES", 0)
    monkeypatch.setattr(attention, "pack_keys", lambda *args: packings.append(args) or pack_keys(*args))
    actual = model(**kwargs)
    assert torch.allclose(actual, expected, atol=1e-4 * expected.detach().abs().max().item())
    assert len(packings) == 1 and len(flash.calls) == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_sdpa_of_grouped_heads_equals_its_definition(device, masked, monkeypatch):
    """Each device's implementation, computed here, with its gradients."""
    (q, k, v), mask = tensors()
    mask = mask if masked else None
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    scores = torch.einsum("bsnh,blnh->bnsl", q, repeated[0]) / 8**0.5
    if masked:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    expected = torch.einsum("bnsl,blnh->bsnh", scores.softmax(-1), repeated[1])
    weight = torch.randn(q.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda self: SimpleNamespace(type=device)))
        actual = attention._sdpa(q, k, v, mask)
    assert actual.shape == expected.shape
    for mine, theirs in zip((actual, *torch.autograd.grad((actual * weight).sum(), (q, k, v))), (expected, *wanted)):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype, grouped", [(FP32, False), (BF16, True)])
def test_sdpa_on_a_gpu_takes_grouped_heads_only_where_a_fused_kernel_does(dtype, grouped, monkeypatch):
    """In fp32 none does: PyTorch would use plain products with repeated heads."""
    (q, k, v), _ = tensors()
    seen = []
    real = F.scaled_dot_product_attention

    def noting(q, k, v, **options):
        seen.append((options.get("enable_gqa", False), q.shape[1] == k.shape[1]))
        return real(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noting)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda self: SimpleNamespace(type="cuda")))
        attention._sdpa(*(x.to(dtype) for x in (q, k, v)), None)
    assert seen == [(grouped, not grouped)]


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_repeats_no_heads_on_a_cpu(masked):
    (q, k, v), mask = tensors()
    with torch.profiler.profile(record_shapes=True) as profiled:
        attention._sdpa(q, k, v, mask if masked else None)
    (kernel,) = [event for event in profiled.events() if "flash_attention_for_cpu" in event.name]
    assert kernel.input_shapes[:3] == [
        [3, 2, 2 * 6, 8],
        [3, 2, 11, 8],
        [3, 2, 11, 8],
    ]  # 4 heads of 6 queries, 2 of keys


def test_mask_stays_as_it_is_without_flash_attention():
    _, mask = tensors()
    assert prepare_mask(mask, torch.zeros(3, 6, 8), 8) is mask


@pytest.mark.parametrize("backend", ["sdpa", "flash2", "flash3", "varlen"])
def test_the_choice_breaks_no_compiled_graph(backend, monkeypatch):
    """Also if it is first made while compiling. test_activation.py compiles blocks."""
    monkeypatch.setattr(attention, "PLAIN_SCORES", 0)
    flash_standin.calls.clear()
    if backend != "sdpa":
        flash_standin.install(monkeypatch, backend)
    torch._dynamo.reset()
    layer = attention.Attention(16, 2, 1, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    arguments = (torch.randn(2, 4, 16), torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8), torch.randn(4, 1, 4, 2), mask)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", BF16):
        assert torch.allclose(compiled(*arguments), layer(*arguments), atol=1e-2)
    assert len(flash_standin.calls) == (0 if backend == "sdpa" else 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_every_backend_of_this_card_equals_fp32(masked):
    (q, k, v), mask = ([x.detach() for x in part] if isinstance(part, list) else part for part in tensors(H=64))
    expected = attention._sdpa(q, k, v, mask if masked else None)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
    try:
        for backend in ("auto", "sdpa", *attention.PACKAGES):
            if not attention.missing_requirements(backend, attention._machine("cuda", None)):
                use_attention(backend)
                actual = attend(q, k, v, mask.cuda() if masked else None)
                assert (actual.float().cpu() - expected).norm() < 0.02 * expected.norm()
    finally:
        use_attention("auto")
