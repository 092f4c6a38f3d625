"""The benchmarks' own logic, at a toy size: their counts, and that each command runs."""

import sys
from pathlib import Path

import diffusers
import pytest
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "benchmarks"))

import block_inputs  # noqa: E402
import gpu_blocks  # noqa: E402
import measure  # noqa: E402
import sampling  # noqa: E402
import train_step  # noqa: E402

from model import kernels  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.use_kernels("auto")


def test_products_of_forward_and_backward_are_counted_with_their_layouts():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    experts = torch.randn(2, 3, 5, requires_grad=True)
    with measure.RecordProducts() as record:
        hidden = torch.nn.functional.linear(x, weight)
        torch.bmm(hidden.view(2, 3, 3), experts).sum().backward()
    # Forward, gradient of the input, gradient of the weight: all of one size for each of the two layers.
    assert sum(record.products.values()) == 6
    assert {product.flops for product in record.products} == {2 * 6 * 4 * 3, 2 * 2 * 3 * 3 * 5}
    assert record.products[measure.Product(1, 6, 4, 3, False, True)] == 1
    assert record.products[measure.Product(1, 6, 3, 4)] == 1
    assert record.products[measure.Product(2, 3, 3, 5)] == 1
    for product in record.products:
        assert product.alone(torch.float32, torch.device("cpu"))().shape[-2:] == (product.m, product.n)


def test_attention_counts_as_its_six_products():
    q, k, v = (torch.randn(2, heads, rows, 8, requires_grad=True) for heads, rows in ((4, 6), (2, 9), (2, 9)))
    with measure.RecordProducts() as record:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    counted = {product: count for product, count in record.products.items() if product.attention}
    assert sum(counted.values()) == 6
    assert sum(product.flops * count for product, count in counted.items()) == 6 * 2 * (2 * 4) * 6 * 9 * 8


def test_spread_has_medians_and_quartiles():
    spread = measure.Spread.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (spread.median, spread.least, spread.count) == (3.0, 1.0, 5)
    assert spread.low < spread.median < spread.high
    assert measure.Spread.of([2.0]).median == 2.0


TOY_BLOCK = (
    "--device cpu --width 64 --heads 4 --kv-heads 2 --experts 4 --hidden 48 --text 8 --text-dim 32 --cases 1x16x2"
)


def test_blocks_without_a_device_say_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_blocks.main([]) == gpu_blocks.NO_DEVICE == 2
    out = capsys.readouterr().out
    assert out.startswith("no CUDA device here") and out.count("\n") == 1


def test_blocks_are_measured_at_a_toy_size(capsys, monkeypatch):
    monkeypatch.setattr(gpu_blocks, "has_kernels", lambda args: False)  # the interpreter takes seconds
    assert gpu_blocks.main([*TOY_BLOCK.split(), *"--rounds 2 --no-compile".split()]) == 0
    out = capsys.readouterr().out
    for text in ("command: ", "machine: ", "matrix rate: ", "bandwidth: ", "'ours, torch' is ", "% of its floor",
                 "expert products together: ", "the rest takes", "attention backward", "combine backward",
                 "its memory floor"):  # fmt: skip
        assert text in out, text


def failing():
    raise RuntimeError("not taken whole\nbecause")


def test_blocks_that_fail_or_compute_something_else_are_named_and_not_measured(monkeypatch):
    """The others are."""
    runs = {
        "diffusers, eager": lambda: torch.ones(3),
        "ours, torch": lambda: -torch.ones(3),
        "ours, triton": failing,
        "ours, compiled, torch": lambda: torch.ones(3) * 1.01,
    }
    bad = gpu_blocks.agree(runs)
    assert bad == {
        "ours, torch": "computes something else: 2 from the output of 'diffusers, eager'",
        "ours, triton": "RuntimeError: not taken whole",
    }
    assert gpu_blocks.agree({"ours, torch": runs["ours, torch"], "other": runs["ours, torch"]}) == {}
    real = gpu_blocks.variants
    monkeypatch.setattr(gpu_blocks, "has_kernels", lambda args: False)
    monkeypatch.setattr(gpu_blocks, "variants", lambda *a: real(*a) | {"ours, broken": failing})
    args = gpu_blocks.parse([*TOY_BLOCK.split(), *"--rounds 2 --no-compile".split()])
    result = gpu_blocks.measure(args, args.cases[0], 1e10, 1e9)
    assert result["failures"] == {"ours, broken": "RuntimeError: not taken whole"}
    assert set(result["ms"]["forward + backward"]) == {"ours, torch", "diffusers, eager"}


def test_every_case_is_compiled_again_and_a_fallback_is_an_error(monkeypatch):
    """PyTorch runs code beyond its limit uncompiled, and only logs it."""
    seen = []

    def measured(*_):
        config = torch._dynamo.config
        seen.append((config.recompile_limit, config.fail_on_recompile_limit_hit, torch._dynamo.utils.counters["stats"]))
        torch._dynamo.utils.counters["stats"]["unique_graphs"] = 9

    monkeypatch.setattr(gpu_blocks, "_measure", measured)
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    for _ in range(2):
        gpu_blocks.measure(None, None, 1.0, 1.0)
    assert len(resets) == 2 and all(limit > 8 and fails for limit, fails, _ in seen)


def test_without_diffusers_only_our_block_is_measured(monkeypatch):
    monkeypatch.setattr(gpu_blocks, "has_diffusers", lambda: False)
    monkeypatch.setattr(gpu_blocks, "has_kernels", lambda args: False)
    args = gpu_blocks.parse([*TOY_BLOCK.split(), *"--rounds 2 --no-compile".split()])
    result = gpu_blocks.measure(args, args.cases[0], 1e10, 1e9)
    assert set(result["ms"]["forward"]) == {"ours, torch"} and not result["failures"] and not result["speed"]


def test_the_block_of_the_benchmark_has_the_released_axes():
    assert block_inputs.axes_of(gpu_blocks.parse([])) == (16, 56, 56)


def toy_step(monkeypatch, *more):
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: True)  # it would affect later tests
    train_step.main(
        "--threads 1 --rounds 2 --layers 2 --heads 2 --kv-heads 1 --head-dim 32 --hidden 32 --batch 2 --rows 4 "
        "--text 8 --text-dim 32 --experts 4".split()
        + list(more)
    )


def test_training_steps_are_measured_at_a_toy_size(capsys, monkeypatch):
    toy_step(monkeypatch, "--no-compile")
    out = capsys.readouterr().out
    for text in ("ours: times as fast as 'diffusers, ", "ours: share of the products' rate: ", "our products alone",
                 "time goes to  ours: ", "GFLOP/s"):  # fmt: skip
        assert text in out, text
    assert "compiled" not in out


def refusing(message):
    def hook(*args):
        raise RuntimeError(message)

    return hook


def test_compiled_training_steps_are_compared_with_diffusers(capsys, monkeypatch):
    """Its grouped products cannot be compiled in fp32: this is reported, and the rest is measured."""

    def compile_repeated_blocks(model):
        block = model.transformer_blocks[1]
        if block.img_mlp.experts.use_grouped_mm:
            block.register_forward_pre_hook(refusing("no such product\nin this type"))

    transformer = diffusers.NucleusMoEImageTransformer2DModel
    monkeypatch.setattr(transformer, "compile_repeated_blocks", compile_repeated_blocks)
    monkeypatch.setattr(train_step, "compile_blocks", lambda model: None)
    toy_step(monkeypatch)
    out = capsys.readouterr().out
    assert "diffusers, grouped, compiled: cannot be compiled: no such product\n" in out
    for text in ("ours, compiled: times as fast as 'diffusers, loop, compiled'",
                 "ours, compiled: share of the products' rate: ", "first step, which compiles"):  # fmt: skip
        assert text in out, text


def test_our_own_model_must_compile(monkeypatch):
    monkeypatch.setattr(
        train_step, "compile_blocks", lambda model: model.register_forward_pre_hook(refusing("not taken whole"))
    )
    with pytest.raises(RuntimeError, match="not taken whole"):
        toy_step(monkeypatch)


def test_each_product_is_timed_as_often_as_it_was_counted():
    product = measure.Product(1, 8, 4, 2)
    alone = measure.ProductsAlone({product: 3}, torch.float32, torch.device("cpu"))
    ran = []
    alone.runs[product] = lambda: ran.append(1)
    total = alone.measure()
    assert len(ran) == 4  # one to warm up
    (result,) = alone.slowest_first()
    assert result.count == 3 and result.total_ms == pytest.approx(total)


def test_sampling_is_measured_at_a_toy_size(capsys):
    sampling.main("--models tiny --steps 2 --batch 2 --rounds 2 --size 32".split())
    out = capsys.readouterr().out
    for text in ("tiny: 32 px, 4 image tokens, random weights", "images/s", "ours, with cache: ", "ours, without"):
        assert text in out, text
