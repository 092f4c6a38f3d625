"""What runs between start and end of an exchange of rows with the experts' ranks. On gloo;
tests/integration/training/test_parallel.py trains with several ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers.moe import MoE
from model.train.compiled import inductor_settings
from model.train.parallel.expert_parallel import shard_experts

pytestmark = pytest.mark.slow

START, END = "_c10d_functional.all_to_all_single.default", "_c10d_functional.wait_tensor.default"
PRODUCT, OF_EXPERTS = "aten.mm.default", "aten.bmm.default"


@pytest.fixture
def layers():
    """A layer with expert parallelism over a group of one rank, and the same layer without."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        alone, shared = MoE(16, 24, 4, 1.5), MoE(16, 24, 4, 1.5)
        for parameter in alone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        shared.load_state_dict(alone.state_dict())
        shard_experts(shared, init_device_mesh("cpu", (1,)))
        yield alone, shared
    finally:
        dist.destroy_process_group()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in (START, END, PRODUCT, OF_EXPERTS):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def inputs(rank: int = 0):
    generator = torch.Generator().manual_seed(1 + rank)
    shapes = (2, 8, 16), (2, 8, 16), (2, 16)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def under_way(names: list[str]) -> list[list[str]]:
    """The operations that run during each exchange."""
    spans, current = [], None
    for name in names:
        if name == START:
            assert current is None, "two exchanges at once"
            current = []
        elif name == END:
            spans.append(current)
            current = None
        elif current is not None:
            current.append(name)
    assert current is None
    return spans


def test_the_shared_expert_is_computed_while_rows_are_on_their_way(layers):
    _, shared = layers
    with Operations() as forward:
        out, _ = shared(*inputs())
    assert under_way(forward.names) == [[PRODUCT], [PRODUCT]]  # up, down


def test_the_shared_experts_gradients_are_computed_while_gradients_are_on_their_way(layers):
    _, shared = layers
    out, _ = shared(*inputs())
    with Operations() as backward:
        out.square().sum().backward()
    assert under_way(backward.names) == [[PRODUCT, PRODUCT], [PRODUCT, PRODUCT]]  # down's, then up's


def test_exchanged_rows_give_the_bits_of_the_layer_on_one_rank(layers):
    results = []
    for layer in layers:
        given = inputs()
        out, _ = layer(*given)
        out.square().sum().backward()
        gradients = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters()]
        results.append([out, *(tensor.grad for tensor in given), *gradients])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


RANK = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from test_expert_parallel import MoE, Operations, PRODUCT, inputs, shard_experts, under_way
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
torch.manual_seed(0)
alone, shared = MoE(16, 24, 4, 1.5), MoE(16, 24, 4, 1.5)
for parameter in alone.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
shared.load_state_dict(alone.state_dict())
shard_experts(shared, init_device_mesh("cpu", (2,)))
wanted, given = inputs(rank), inputs(rank)
expected = alone(*wanted)[0]
expected.square().sum().backward()
out = shared(*given)[0]
with Operations() as backward:
    out.square().sum().backward()
assert under_way(backward.names) == [[PRODUCT, PRODUCT], [PRODUCT, PRODUCT]], backward.names
torch.testing.assert_close(out, expected)
for mine, theirs in zip(given, wanted):
    torch.testing.assert_close(mine.grad, theirs.grad)
for name, parameter in alone.experts.named_parameters():  # of the rows of both ranks
    dist.all_reduce(parameter.grad)
    own = shared.experts.get_parameter(name).grad.to_local()
    torch.testing.assert_close(own, parameter.grad.chunk(2)[rank])
for name, parameter in alone.shared_expert.named_parameters():
    torch.testing.assert_close(shared.shared_expert.get_parameter(name).grad, parameter.grad)
dist.destroy_process_group()
"""


def test_two_ranks_with_separate_exchanges_compute_what_one_rank_does(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[4])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]


def test_a_compiler_takes_the_layer_whole_and_keeps_the_shared_expert_between(layers):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    alone, shared = layers
    orders = []

    def compiler(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        orders.append([name for name in names if name in (START, END, PRODUCT, OF_EXPERTS)])
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(shared, backend=backend, fullgraph=True)
    out, _ = compiled(*inputs())
    out.sum().backward()
    assert torch.allclose(out, alone(*inputs())[0], atol=1e-5)
    forward, backward = orders
    assert under_way(forward) == [[PRODUCT], [PRODUCT]], forward
    assert under_way(backward) == [[PRODUCT, PRODUCT], [PRODUCT, PRODUCT]], backward


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductors_code_keeps_the_shared_expert_between(layers):
    """Inductor reorders operations after the graph is made."""
    from torch._inductor.utils import run_and_get_code

    _, shared = layers
    kinds = {"all_to_all_single.default(": START, "wait_tensor.default(": END, "extern_kernels.mm(": PRODUCT}
    torch.compiler.reset()
    settings = inductor_settings(deterministic=True, expert_parallel=True)
    with torch._inductor.config.patch(settings | {"force_disable_caches": True}):
        compiled = torch.compile(shared, fullgraph=True)
        _, codes = run_and_get_code(lambda: compiled(*inputs())[0].sum().backward())
    orders = [[kind for line in code.splitlines() for text, kind in kinds.items() if text in line] for code in codes]
    assert [under_way(order) for order in orders] == [
        [[PRODUCT], [PRODUCT]], [[PRODUCT, PRODUCT], [PRODUCT, PRODUCT]]
    ], orders  # fmt: skip


def test_layers_of_several_capacity_factors_and_numbers_of_tokens_compile_whole(layers):
    _, shared = layers
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: shared(*given)[0], backend="aot_eager", fullgraph=True, dynamic=True)
    for factor, tokens in ((1.5, 8), (2.0, 8), (1.0, 12)):
        shared.capacity_factor = factor
        given = [torch.randn(2, tokens, 16, requires_grad=True), torch.randn(2, tokens, 16), torch.randn(2, 16)]
        out = compiled(*given)
        out.sum().backward()
        assert torch.allclose(out, shared(*given)[0], atol=1e-5)


def test_all_groups_that_fsdp_communicates_in_get_the_stages_patience():
    """With replicas and expert parallelism, each of FSDP's two meshes has its own groups of replicas."""
    from types import SimpleNamespace

    from small_model import SMALL
    from torch.distributed.fsdp import FSDPModule

    from model.config import TransformerConfig
    from model.train.parallel.parallelize import parallelize
    from model.train.trainer import NucleusTrainer
    from model.transformer import NucleusTransformer

    from torchtitan.distributed import ParallelDims

    dist.init_process_group("fake", rank=0, world_size=8)
    try:
        degrees = dict(dp_replicate=2, dp_shard=4, cp=1, tp=1, pp=1, ep=2, world_size=8)
        dims = ParallelDims(**degrees, spmd_backend="partial_dtensor")
        with torch.device("meta"):
            model = NucleusTransformer(TransformerConfig(**SMALL | {"num_experts": 4, "dense_moe_strategy": "all_moe"}))
        parallelize(
            model,
            parallel_dims=dims,
            training=SimpleNamespace(mixed_precision_param="bfloat16"),
            parallelism=None,
            compile_config=SimpleNamespace(enable=False),
            ac_config=None,
            dump_folder="",
        )
        used = set()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    used |= {group.mesh_info.shard_process_group, group.mesh_info.replicate_process_group}
        patient = NucleusTrainer._groups(SimpleNamespace(parallel_dims=dims))
        assert len(used) >= 4 and used <= patient
    finally:
        dist.destroy_process_group()
