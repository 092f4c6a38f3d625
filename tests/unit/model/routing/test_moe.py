"""Expert-choice routing against a loop written from its definition, one expert and one token at a time."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from model.kernels.elementwise import _NormRope, _SwiGLU
from model.layers.moe import MoE

B, S, D, E, F = 3, 10, 12, 4, 8


def make(capacity_factor=1.5, **changes):
    torch.manual_seed(0)
    moe = MoE(D, F, E, capacity_factor, **changes)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe, torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(B, D)


def by_definition(moe, x, unmodulated, timestep):
    out = torch.zeros(B, S, D)
    capacity = max(1, math.ceil(moe.capacity_factor * S / E))
    for b in range(B):
        scores = torch.stack([moe.gate.weight @ torch.cat((timestep[b], unmodulated[b, s])) for s in range(S)])
        scores = scores.sigmoid() if moe.use_sigmoid else scores.softmax(-1)
        taken = {e: sorted(range(S), key=lambda s: -scores[s, e].item())[:capacity] for e in range(E)}
        for s in range(S):
            total = sum(scores[s, e] for e in range(E) if s in taken[e])
            for e in range(E):
                if s in taken[e]:
                    gate, up = (x[b, s] @ moe.experts.gate_up_proj[e]).chunk(2)
                    expert = (gate * gate.sigmoid() * up) @ moe.experts.down_proj[e]
                    out[b, s] += moe.route_scale * scores[s, e] / total * expert
            up, gate = moe.shared_expert.net[0].proj(x[b, s]).chunk(2)
            out[b, s] += moe.shared_expert.net[2](up * gate * gate.sigmoid())
    return out


@pytest.mark.parametrize("changes", [{}, {"use_sigmoid": True}, {"route_scale": 1.0}])
@pytest.mark.parametrize("capacity_factor", [0.1, 1.5, 4.0])
def test_layer_equals_its_definition(capacity_factor, changes):
    moe, x, unmodulated, timestep = make(capacity_factor, **changes)
    actual, _ = moe(x, unmodulated, timestep)
    assert torch.allclose(actual, by_definition(moe, x, unmodulated, timestep), atol=1e-4)


def test_every_expert_takes_the_same_number_of_each_samples_tokens():
    moe, x, unmodulated, timestep = make()
    _, routing = moe(x, unmodulated, timestep)
    assert routing.indices_BEC.shape == (B, E, math.ceil(1.5 * S / E))
    for sample in routing.indices_BEC:
        for tokens in sample:
            assert len(set(tokens.tolist())) == len(tokens)


def test_gates_of_a_taken_token_sum_to_the_route_scale():
    moe, x, unmodulated, timestep = make(1.0)
    _, routing = moe(x, unmodulated, timestep)
    sums = torch.zeros(B, S).scatter_add_(1, routing.indices_BEC.flatten(1), routing.gates_BEC.flatten(1))
    taken = sums > 0
    assert torch.allclose(sums[taken], torch.full_like(sums[taken], 2.5), atol=1e-4)
    assert taken.any() and not taken.all()


def test_samples_do_not_compete_for_experts():
    moe, x, unmodulated, timestep = make()
    together, _ = moe(x, unmodulated, timestep)
    for b in range(B):
        alone, _ = moe(x[b : b + 1], unmodulated[b : b + 1], timestep[b : b + 1])
        assert torch.allclose(alone[0], together[b], atol=1e-5)


def test_routing_is_decoupled_from_modulation_and_depends_on_the_timestep():
    moe, x, unmodulated, timestep = make()
    _, first = moe(x, unmodulated, timestep)
    _, modulated = moe(x * 3 + 1, unmodulated, timestep)
    assert torch.equal(first.indices_BEC, modulated.indices_BEC)
    _, later = moe(x, unmodulated, timestep * -2)
    assert not torch.equal(first.scores_BSE, later.scores_BSE)


def test_fast_backward_passes_equal_numeric_ones():
    torch.manual_seed(0)
    packed = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for gate_first in (True, False):
        assert torch.autograd.gradcheck(lambda p: _SwiGLU.apply(p, gate_first), packed)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 1, 2, dtype=torch.float64)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    assert torch.autograd.gradcheck(lambda *a: _NormRope.apply(*a, table, 1e-6), (x, weight))
    shared = weight[0].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: _NormRope.apply(*a, table, 1e-6), (x, shared))


def step(moe, inputs):
    """The output, and the gradients of the inputs and of the parameters."""
    moe.zero_grad()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out, _ = moe(*leaves)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in moe.parameters())]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_layer_compiled_for_a_cpu_equals_the_eager_one_and_adds_nothing_atomically():
    """Atomic additions would be slow, and add up in no fixed order."""
    torch.compiler.reset()
    moe, *inputs = make(capacity_factor=2.0)
    expected = step(moe, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # for one thread the compiler generates other code
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            actual, code = run_and_get_code(lambda: step(torch.compile(moe, fullgraph=True), inputs))
    finally:
        torch.set_num_threads(threads)
    assert len(code) == 2  # forward and backward
    assert not any("atomic_add" in source for source in code)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.slow
def test_keep_freed_memory_spares_page_faults():
    """In a process of its own: the setting stays for good."""
    code = """
import resource, torch
from model.kernels.elementwise import keep_freed_memory
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MiB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
assert keep_freed_memory()
faults()  # the first few still find the place where they will lie
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10, (plain, kept)
