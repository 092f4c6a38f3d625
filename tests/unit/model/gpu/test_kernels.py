"""Each Triton kernel equals its plain PyTorch function, forward and backward.

On a CPU in Triton's interpreter; the same tests, marked gpu, on a CUDA device.
"""

import collections
import importlib.util
import math
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from parameters import slow_except
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from model import kernels
from model.kernels.elementwise import plain_norm_modulate, plain_norm_rope, plain_swiglu
from model.layers.moe import MoE

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, of the whole tensor


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and not kernels.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1, under which nothing runs on the CUDA device")
    if request.param == "cuda" and kernels.interpreted():
        pytest.skip("TRITON_INTERPRET=1 is set")
    kernels.use_kernels("triton")
    yield torch.device(request.param)
    kernels.use_kernels("auto")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def relative(actual, expected):
    expected = expected.float()
    return ((actual.float() - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_equal(kernel, plain, inputs, dtype):
    """Outputs and gradients of `kernel` against `plain` in the same type, and gradients against fp32 too."""
    ours, theirs, exact = leaves(*inputs), leaves(*inputs), leaves(*(tensor.float() for tensor in inputs))
    actual, expected, truth = kernel(*ours), plain(*theirs), plain(*exact)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert relative(actual, expected) <= TOLERANCE[dtype]
    weight = torch.randn(actual.shape, device=actual.device).to(actual.dtype)
    actual.backward(weight)
    truth.backward(weight.float())
    for ours_, exact_ in zip(ours, exact):
        assert ours_.grad.dtype == ours_.dtype
        assert relative(ours_.grad, exact_.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 700), (5, 1024)])
@pytest.mark.parametrize("gate_first", [True, False])
def test_swiglu(shape, gate_first, dtype, device):
    from model.kernels.swiglu import SwiGLU

    torch.manual_seed(0)
    packed = torch.randn(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
    assert_equal(lambda p: SwiGLU.apply(p, gate_first), lambda p: plain_swiglu(p, gate_first), [packed], dtype)


@pytest.mark.parametrize("shape", slow_except([(2, 5, 3, 12)], [(2, 5, 3, 12), (1, 7, 4, 32), (2, 9, 1, 8)]))
@pytest.mark.parametrize("per_head", [True, False])
def test_norm_rope(shape, per_head, dtype, device, monkeypatch):
    from model.kernels import norm_rope
    from model.kernels.norm_rope import NormRope

    monkeypatch.setattr(norm_rope, "PROGRAMS", 4)  # so that a program of the backward pass takes several tokens

    torch.manual_seed(0)
    B, S, N, H = shape
    wide = torch.randn(B, S, N + 2, H, device=device, dtype=dtype)
    weight = 1 + 0.3 * torch.randn(*((N, H) if per_head else (H,)), device=device).to(dtype)
    angles = torch.randn(S, 1, H // 2, device=device)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    # A slice of the heads, as queries and keys are of their projection: rows are not contiguous.
    assert_equal(
        lambda x, w: NormRope.apply(x[:, :, 1:-1], w, table, 1e-6),
        lambda x, w: plain_norm_rope(x[:, :, 1:-1], w, table, 1e-6),
        [wide, weight],
        dtype,
    )


def test_norm_rope_with_fp32_weights_of_bf16_queries(device):
    from model.kernels.norm_rope import NormRope

    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 2, 8, device=device).bfloat16(), torch.randn(8, device=device)
    table = torch.stack((torch.ones(3, 1, 4), torch.zeros(3, 1, 4)), dim=-1).to(device)
    actual, expected = (f(x, weight, table, 1e-6) for f in (NormRope.apply, plain_norm_rope))
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert relative(actual, expected) < 1e-2


@pytest.mark.parametrize("shape", slow_except([(2, 5, 12)], [(2, 5, 12), (1, 33, 8), (3, 1, 70)]))
@pytest.mark.parametrize("want_normed", [True, False])
def test_norm_modulate(shape, want_normed, dtype, device):
    from model.kernels.norm_modulate import NormModulate

    torch.manual_seed(0)
    B, S, D = shape
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    modulation = torch.randn(B, 1, 3 * D, device=device).to(dtype)
    mix = 0.5 if want_normed else 0.0

    def both(normed, modulated):
        return modulated if normed is None else modulated + mix * normed

    # A slice of the modulation, as in a block: rows are not contiguous.
    assert_equal(
        lambda x, m: both(*NormModulate.apply(x, m[..., D : 2 * D], 1e-6, want_normed)),
        lambda x, m: both(*plain_norm_modulate(x, m[..., D : 2 * D], 1e-6)),
        [x, modulation],
        dtype,
    )
    assert (NormModulate.apply(x, modulation[..., :D], 1e-6, want_normed)[0] is None) == (not want_normed)


TINY = dict(experts=2, tokens=3, capacity_factor=1.0)  # the interpreter is slow


def moe_layer(device, dtype, experts=3, width=12, hidden=20, capacity_factor=1.7, tokens=7, **changes):
    torch.manual_seed(0)
    moe = MoE(width, hidden, experts, capacity_factor, **changes)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.to(device, dtype)
    return moe, moe_inputs(device, dtype, tokens, width)


def moe_inputs(device, dtype, tokens, width=12):
    shapes = ((2, tokens, width), (2, tokens, width), (2, width))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def choice(routing):
    return routing.indices_BEC.sort(dim=-1)


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("capacity_factor", [0.1, 1.7, 3.0])
def test_routing(use_sigmoid, capacity_factor, device):
    """The same tokens, scores, gates and gradient of the logits; through scores as well."""
    changes = dict(capacity_factor=capacity_factor, use_sigmoid=use_sigmoid)
    moe, (_, seen, timestep) = moe_layer(device, torch.float32, **changes)
    weights = None
    results = {}
    for which in ("torch", "triton"):
        kernels.use_kernels(which)
        moe.zero_grad()
        routing = moe.route(seen, timestep)
        assert (routing.takers is None) == (which == "torch")
        gates = routing.weights_BSE()
        weights = torch.randn_like(gates) if weights is None else weights
        (gates * weights + routing.scores_BSE * weights.flip(0)).sum().backward()
        results[which] = (routing, gates, moe.gate.weight.grad.clone())
    (plain, plain_gates, plain_grad), (ours, gates, grad) = results["torch"], results["triton"]
    assert torch.equal(choice(ours).values, choice(plain).values)
    assert torch.equal(ours.indices_BEC, choice(ours).values)  # in the tokens' order
    assert relative(gates, plain_gates) < 2e-6
    assert relative(ours.scores_BSE, plain.scores_BSE) < 2e-6
    assert relative(grad, plain_grad) < 5e-6
    assert torch.equal(ours.rows_R(), ours._replace(takers=None).rows_R())
    # Views that leave an FSDP unit make it warn; and in the rows' order, so that combine copies nothing.
    assert not ours.gates_BEC._is_view() and ours.gates_BEC.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("value", [0.0, 3.0, -200.0, float("nan"), -float("nan")])
def test_equal_scores_are_taken_in_the_tokens_order_and_never_too_many(value, device):
    from model.kernels.route import route

    _, indices_BEC, gates_BEC, _ = route(torch.full((2, 9, 4), value, device=device), 3, True, 2.5)
    assert torch.equal(indices_BEC.cpu(), torch.arange(3).expand(2, 4, 3))
    assert gates_BEC.isfinite().all() == math.isfinite(value)


def test_takers_list_each_tokens_rows_once(device):
    moe, (_, seen, timestep) = moe_layer(device, torch.float32)
    routing = moe.route(seen, timestep)
    rows_R = routing.rows_R().tolist()
    rows_TE, counts_T = (tensor.tolist() for tensor in routing.takers[:2])
    for token, (rows, count) in enumerate(zip(rows_TE, counts_T)):
        assert rows[:count] == [row for row, taken in enumerate(rows_R) if taken == token]
        assert set(rows[count:]) <= {-1}


def run_layer(device, dtype, which, capacity_factor):
    kernels.use_kernels(which)
    moe, inputs = moe_layer(device, torch.bfloat16, capacity_factor=capacity_factor)
    return step(moe.to(dtype), [tensor.to(dtype) for tensor in inputs])


def step(moe, inputs):
    """The routing; and the output, the gradients of the inputs, and of the parameters."""
    moe.zero_grad()
    own = leaves(*inputs)
    out, routing = moe(*own)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, device=out.device).to(out.dtype))
    return routing, [out, *(tensor.grad for tensor in own), *(p.grad.clone() for p in moe.parameters())]


def assert_close(actual, expected):
    # Relative to all gradients: one expert alone has a constant gate, and the router's gradient is rounding noise.
    total = torch.stack([tensor.norm() for tensor in expected]).norm()
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm() + 1e-7 * total


@pytest.mark.parametrize("capacity_factor", slow_except([1.7], [0.1, 1.7, 3.0]))
def test_layer_with_kernels_equals_the_plain_layer(capacity_factor, device):
    """Gather, SwiGLU and combine too: the output, and gradients of inputs and weights."""
    ours, actual = run_layer(device, torch.float32, "triton", capacity_factor)
    plain, expected = run_layer(device, torch.float32, "torch", capacity_factor)
    assert ours.takers is not None and plain.takers is None
    assert torch.equal(choice(ours).values, choice(plain).values)
    assert_close(actual, expected)


@pytest.mark.slow
def test_layer_with_kernels_in_bf16_is_as_exact_as_the_plain_one(device):
    """Every expert takes every token, so that rounded scores do not change the choice."""
    _, actual = run_layer(device, torch.bfloat16, "triton", 3.0)
    _, plain = run_layer(device, torch.bfloat16, "torch", 3.0)
    _, exact = run_layer(device, torch.float32, "torch", 3.0)
    slack = 1.2 if device.type == "cuda" else 4.0  # the interpreter cuts bits off instead of rounding
    for mine, theirs, truth in zip(actual, plain, exact):
        assert mine.dtype == torch.bfloat16
        assert relative(mine, truth) < slack * relative(theirs, truth) + 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_have_the_same_bits_each_time(compiled, device):
    """On a CUDA device plain PyTorch has not, compiled or not: it adds atomically."""
    if compiled and device.type == "cpu":
        pytest.skip("needs a CUDA device: a CPU adds in one order anyway")
    large = dict(experts=16, width=256, hidden=64, capacity_factor=8.0, tokens=512)
    moe, inputs = moe_layer(device, torch.bfloat16, **(TINY if device.type == "cpu" else large))
    if compiled:
        torch.compiler.reset()
        moe = torch.compile(moe, fullgraph=True)
    routing, first = step(moe, inputs)
    assert routing.takers is not None
    for _ in range(1 if device.type == "cpu" else 5):
        assert_same_bits(step(moe, inputs)[1], first)


def assert_same_bits(actual, expected):
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))


def test_shapes_that_no_kernel_covers_take_the_plain_way(monkeypatch, device):
    from model.kernels import route

    monkeypatch.setattr(route, "MAX_TOKENS", 6)
    moe, inputs = moe_layer(device, torch.float32)
    assert moe(*inputs)[1].takers is None


class Graphs:
    """A backend of torch.compile that runs graphs unchanged, and counts the operations."""

    def __init__(self):
        torch.compiler.reset()
        self.forward, self.backward = collections.Counter(), collections.Counter()
        self.backend = aot_autograd(
            fw_compiler=self._counting(self.forward),
            bw_compiler=self._counting(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def _counting(self, counts):
        def compiler(graph, inputs):
            counts.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        return compiler


FORWARD_OPS = {f"nucleus.{name}.default" for name in ("route", "gather_rows", "combine_rows")}
BACKWARD_OPS = {f"nucleus.{name}_backward.default" for name in ("route", "gather_rows", "combine_rows")}


def nucleus_ops(counts):
    return {name: count for name, count in counts.items() if name.startswith("nucleus.")}


@pytest.mark.slow
def test_compiled_layer_routes_with_kernels_and_equals_the_plain_eager_one(device):
    """In one graph, with each operation once, and without additions of undefined order on a CUDA device."""
    moe, inputs = moe_layer(device, torch.float32, **TINY)
    graphs = Graphs()
    routing, actual = step(torch.compile(moe, backend=graphs.backend, fullgraph=True), inputs)
    assert nucleus_ops(graphs.forward) == dict.fromkeys(FORWARD_OPS, 1)
    assert nucleus_ops(graphs.backward) == dict.fromkeys(BACKWARD_OPS, 1)
    plain_ops = ("topk", "index_add", "scatter_add", "index_put", "index_select")
    assert not [name for name in graphs.forward + graphs.backward if any(op in name for op in plain_ops)]
    kernels.use_kernels("torch")
    plain, expected = step(moe, inputs)
    assert torch.equal(choice(routing).values, choice(plain).values)
    assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.slow
def test_compiled_layer_follows_the_switch(device):
    """Also after it was compiled for another choice; "auto" on a CPU is plain PyTorch."""
    moe, inputs = moe_layer(device, torch.float32, **TINY)
    graphs = Graphs()
    compiled = torch.compile(moe, backend=graphs.backend, fullgraph=True)
    for which, taken in (("torch", False), ("auto", device.type == "cuda"), ("triton", True), ("torch", False)):
        kernels.use_kernels(which)
        graphs.forward.clear()
        assert (compiled(*inputs)[1].takers is not None) == taken, which
        assert not nucleus_ops(graphs.forward) or taken


def test_only_plain_tensors_and_parameters_go_to_kernels_compiled_or_not(device):
    """While it traces, a compiler's fake tensors are taken too; other subclasses (sharded tensors) are not."""

    def answer(x):
        return x.new_ones(()) if kernels.supports_routing(x) else x.new_zeros(())

    compiled = torch.compile(answer, backend="eager", fullgraph=True)
    plain = torch.zeros(2, device=device)
    double = TwoTensor(plain, plain)
    for tensor, taken in ((plain, True), (torch.nn.Parameter(plain), True), (double, False), (plain.double(), False)):
        assert kernels.supports_routing(tensor) == bool(compiled(tensor).sum()) == taken
    with FakeTensorMode():  # as the memory planner runs the model
        assert not kernels.supports_routing(torch.zeros(2, device=device))


@pytest.mark.slow
def test_compiled_layer_is_right_for_one_image_shape_after_another(device):
    moe, _ = moe_layer(device, torch.float32, **TINY)
    graphs = Graphs()
    compiled = torch.compile(moe, backend=graphs.backend, fullgraph=True)
    for tokens in (3, 5, 3):
        inputs = moe_inputs(device, torch.float32, tokens)
        kernels.use_kernels("triton")
        routing, actual = step(compiled, inputs)
        kernels.use_kernels("torch")
        plain, expected = step(moe, inputs)
        assert routing.takers is not None and torch.equal(choice(routing).values, choice(plain).values)
        assert_close(actual, expected)
    assert graphs.forward["nucleus.route.default"] >= 2


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.slow
def test_layer_compiled_by_inductor_equals_the_eager_one(device):
    torch.compiler.reset()
    moe, inputs = moe_layer(device, torch.float32, **TINY)
    routing, result = step(torch.compile(moe, fullgraph=True), inputs)
    assert routing.takers is not None
    kernels.use_kernels("torch")
    assert_close(result, step(moe, inputs)[1])


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_layer_chooses_experts_once_and_has_the_same_gradients(compiled, device, monkeypatch):
    """Eager and full, it chooses again, from the same bits."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("checkpointing needs torchtitan")
    from model.kernels import route
    from model.train.activation import activation_config

    chosen = []
    launch = route.launch
    monkeypatch.setattr(route, "launch", lambda kernel, *a, **k: (chosen.append(kernel), launch(kernel, *a, **k)))
    moe, inputs = moe_layer(device, torch.float32, **TINY)
    expected = None
    for policy in ("none", "selective", "full"):
        holder = torch.nn.Module()
        holder.transformer_blocks = torch.nn.ModuleList([moe])
        if policy != "none":
            activation_config(policy).build().apply(holder)
        layer, graphs = holder.transformer_blocks[0], Graphs()
        if compiled:
            layer = torch.compile(layer, backend=graphs.backend, fullgraph=True)
        chosen.clear()
        _, actual = step(layer, inputs)
        expected = expected or actual
        assert_same_bits(actual, expected)
        assert chosen.count(route._select) == (2 if policy == "full" and not compiled else 1), policy
        if compiled:
            again = {} if policy == "none" else {"nucleus.gather_rows.default": 1}
            assert nucleus_ops(graphs.forward) == dict.fromkeys(FORWARD_OPS, 1)
            assert nucleus_ops(graphs.backward) == dict.fromkeys(BACKWARD_OPS, 1) | again, policy


@pytest.mark.slow
def test_operations_keep_what_pytorch_asks_of_them(device):
    """Schema, autograd registration, and shapes, strides and gradients under tracing."""
    from model.kernels import combine, route  # noqa: F401  (combine defines its operations)

    torch.manual_seed(0)
    logits, capacity = torch.randn(2, 5, 3, device=device, requires_grad=True), 2
    scores, _, gates, tokens, rows, counts, slots = route.choose(logits.detach(), capacity, False, 2.5)
    x, routed = (torch.randn(rows_, 4, device=device, requires_grad=True) for rows_ in (10, len(tokens)))
    grad, gates_R = torch.randn_like(x), gates.transpose(0, 1).reshape(-1).requires_grad_()
    ops = torch.ops.nucleus
    calls = [
        (ops.route, (logits, capacity, False, 2.5)),
        (ops.route_backward, (logits.detach(), slots, scores, None, False, 2.5)),
        (ops.route_backward, (logits.detach(), slots, None, gates, True, 2.5)),
        (ops.gather_rows, (x, tokens, rows, counts)),
        (ops.gather_rows_backward, (routed.detach(), rows, counts)),
        (ops.combine_rows, (x, routed, gates_R, tokens, rows, counts)),
        (ops.combine_rows_backward, (grad, routed.detach(), gates_R.detach(), tokens)),
    ]
    defined = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "nucleus::" in name
    }
    assert defined == {call.__name__ for call, _ in calls}
    for call, arguments in calls:
        torch.library.opcheck(call.default, arguments)


def test_rows_that_are_still_on_their_way_are_waited_for(device):
    """Expert parallelism passes the result of an all-to-all: a tensor subclass that has no memory until it is awaited."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    from model.kernels.combine import combine_rows

    moe, (x, seen, timestep) = moe_layer(device, torch.float32, **TINY)
    with torch.no_grad():
        routing = moe.route(seen, timestep)
    gates_R, takers = routing.gates_BEC.transpose(0, 1).reshape(-1), routing.takers
    base, routed = x.flatten(0, 1), torch.randn(len(takers.tokens_R), x.shape[-1], device=device)
    result = combine_rows(base, AsyncCollectiveTensor(routed), gates_R, takers)
    assert torch.equal(result, combine_rows(base, routed, gates_R, takers))


@pytest.mark.slow
def test_whole_model_with_kernels_equals_the_plain_one(device):
    pytest.importorskip("pydantic", reason="a model's configuration needs pydantic")
    from model.transformer import NucleusTransformer

    torch.manual_seed(0)
    model = NucleusTransformer.from_config(
        dict(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            num_key_value_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 2, 2], num_experts=3,
            dense_moe_strategy="all_moe", moe_intermediate_dim=20, capacity_factors=1.5,
        )
    ).to(device)  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kwargs = dict(
        hidden_states=torch.randn(2, 4, 16),
        encoder_hidden_states=torch.randn(2, 3, 12),
        timestep=torch.rand(2),
        encoder_hidden_states_mask=torch.tensor([[True] * 3, [True, True, False]]),
    )
    kwargs = {name: value.to(device) for name, value in kwargs.items()} | {"img_shapes": (1, 2, 2)}
    results = {}
    for which in ("torch", "triton"):
        kernels.use_kernels(which)
        model.zero_grad()
        out = model(**kwargs)
        out.square().sum().backward()
        results[which] = [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert all(relative(a, b) < 1e-4 for a, b in zip(results["triton"], results["torch"]))


def test_choice_of_kernels_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, torch, triton"):
        kernels.use_kernels("cuda")
    monkeypatch.setattr(kernels, "triton_installed", lambda: False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton and a CUDA device"):
        kernels.use_kernels("triton")
    kernels.use_kernels("auto")
    assert not kernels.supports(torch.zeros(1))
