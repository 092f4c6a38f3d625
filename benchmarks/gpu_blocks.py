"""One block of the 17B shape on a GPU, forward and backward, beside diffusers' with the same weights.

    python benchmarks/gpu_blocks.py [--tokens 1024 4096] [--capacities 2 4] [--batch 1] [--rounds 20]
    python benchmarks/gpu_blocks.py --device cpu --width 64 --heads 4 --kv-heads 2 --experts 4 --hidden 48 --text 8 \\
        --text-dim 32 --tokens 16 --rounds 2 --no-compile      # its own logic, on a machine without a GPU

For every number of tokens and capacity factor, in turns within one process: ours with Triton kernels, ours in plain
PyTorch, both under torch.compile (which leaves only routing to the kernels), diffusers with grouped_mm, and the same
under torch.compile; medians and quartiles.
Then, of our block with Triton kernels (plain PyTorch where there are none):

    products   every matrix product alone, beside the card's matrix rate, measured in this run on a large product,
               and beside its own floor: the later of arithmetic at that rate and memory traffic at the measured
               bandwidth (few rows an expert, and reading its weights takes longer than multiplying them)
    the rest   each step between products alone, plain and as a kernel, against the time in which memory delivers
               what it must read and write once

Exit code 0 after a measurement, 2 where there is no CUDA device and none other was asked for.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measure import Product, ProductTime, RecordProducts, Spread, in_turns, print_run, time_alone  # noqa: E402

from model import kernels  # noqa: E402
from model.attention import EPS  # noqa: E402
from model.config import TransformerConfig  # noqa: E402
from model.kernels.elementwise import norm_modulate, norm_rope, swiglu  # noqa: E402
from model.moe import Routing, combine, gather  # noqa: E402
from model.rope import rope_angles, rope_tables  # noqa: E402
from model.transformer import Block  # noqa: E402

NO_DEVICE = 2
AGREEMENT = 0.1  # relative; routers of two implementations may choose otherwise between equal rounded scores


class Case(NamedTuple):
    tokens: int
    capacity: float


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="image tokens of a sample")
    parser.add_argument("--capacities", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1344)
    parser.add_argument("--text", type=int, default=256, help="text tokens, none masked")
    parser.add_argument("--text-dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--matrix", type=int, help="side of the large product; 8192 on a GPU, else 512")
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    args.matrix = args.matrix or (8192 if on_gpu else 512)
    return args


def build(args: argparse.Namespace, case: Case) -> tuple[Block, torch.nn.Module]:
    """Our block and diffusers', with the same weights."""
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformerBlock

    head_dim = args.width // args.heads
    config = TransformerConfig(
        num_layers=1,
        attention_head_dim=head_dim,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        joint_attention_dim=args.text_dim,
        axes_dims_rope=axes_of(args),
        dense_moe_strategy="all_moe",
        num_experts=args.experts,
        moe_intermediate_dim=args.hidden,
        capacity_factors=case.capacity,
    )
    torch.manual_seed(0)
    theirs = NucleusMoEImageTransformerBlock(
        dim=args.width,
        num_attention_heads=args.heads,
        attention_head_dim=head_dim,
        num_key_value_heads=args.kv_heads,
        joint_attention_dim=args.text_dim,
        moe_enabled=True,
        num_experts=args.experts,
        moe_intermediate_dim=args.hidden,
        capacity_factor=case.capacity,
        use_grouped_mm=True,
    )
    with torch.device("meta"):
        ours = Block(config, 0)
    for name, parameter in theirs.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    theirs.to(args.device, args.dtype)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # one copy of the weights for both
    return ours, theirs


def axes_of(args: argparse.Namespace) -> tuple[int, int, int]:
    """The released (16, 56, 56) of 128, in proportion."""
    head_dim = args.width // args.heads
    axis = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * axis, axis, axis


class Inputs(NamedTuple):
    x: torch.Tensor
    time: torch.Tensor
    text: torch.Tensor
    text_weight: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    rotations: tuple[torch.Tensor, torch.Tensor]  # the same as complex numbers, as diffusers takes them
    grad: torch.Tensor


def make_inputs(args: argparse.Namespace, case: Case) -> Inputs:
    axes = axes_of(args)
    rows = max(d for d in range(1, math.isqrt(case.tokens) + 1) if case.tokens % d == 0)
    shape = (1, rows, case.tokens // rows)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(args.dtype)

    angles = rope_angles(axes, shape, args.text, args.device)
    return Inputs(
        randn(args.batch, case.tokens, args.width).requires_grad_(),
        randn(args.batch, args.width).requires_grad_(),
        randn(args.batch, args.text, args.text_dim),
        torch.ones(args.text_dim, device=args.device, dtype=args.dtype),
        rope_tables(axes, shape, args.text, torch.device(args.device)),
        tuple(torch.polar(torch.ones_like(a), a) for a in angles),
        randn(args.batch, case.tokens, args.width),
    )


def variants(
    args: argparse.Namespace, ours: Block, theirs: torch.nn.Module, inputs: Inputs
) -> dict[str, Callable[[], torch.Tensor]]:
    """Forward passes by name."""

    def run_ours(block: Any, choice: str) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            kernels.use_kernels(choice)
            text = (inputs.text, inputs.text_weight)
            return block(inputs.x, inputs.time, F.silu(inputs.time), text, None, inputs.tables, None)[0]

        return forward

    def run_theirs(block: Any) -> Callable[[], torch.Tensor]:
        return lambda: block(inputs.x, inputs.text, inputs.time, inputs.rotations)

    runs = {}
    if has_kernels(args):
        runs["ours, triton"] = run_ours(ours, "triton")
    runs["ours, torch"] = run_ours(ours, "torch")
    runs["diffusers, eager"] = run_theirs(theirs)
    if not args.no_compile:
        compiled = torch.compile(ours, mode=args.compile_mode)  # once for each choice
        if has_kernels(args):
            runs["ours, compiled, triton"] = run_ours(compiled, "triton")
        runs["ours, compiled, torch"] = run_ours(compiled, "torch")
        theirs.img_mlp.experts.register_forward_pre_hook(_sum_in_int32(args))
        runs["diffusers, compiled"] = run_theirs(torch.compile(theirs, mode=args.compile_mode))
    return runs


def _sum_in_int32(args: argparse.Namespace) -> Callable[[torch.nn.Module, tuple], tuple]:
    """PyTorch 2.13's compiler turns the int32 cumulative sum of a constant, such as diffusers' rows of each expert, into
    int64 (`pointless_cumsum_replacement`), which grouped_mm refuses. Plus a zero that it does not know, it is none."""
    zero = torch.zeros((), dtype=torch.int32, device=args.device)

    def hook(experts: torch.nn.Module, inputs: tuple) -> tuple:
        x, rows = inputs
        return (x, rows + zero) if torch.compiler.is_compiling() else inputs

    return hook


def has_kernels(args: argparse.Namespace) -> bool:
    return kernels.triton_installed() and (args.device.startswith("cuda") or kernels.interpreted())


def forward_backward(forward: Callable[[], torch.Tensor], parameters: list, inputs: Inputs) -> Callable[[], object]:
    def run() -> None:
        for tensor in (*parameters, inputs.x, inputs.time):
            tensor.grad = None
        forward().backward(inputs.grad)

    return run


def without_gradients(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            forward()

    return run


def agree(runs: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Prints how far each output lies from diffusers' eager one.

    Raises:
        RuntimeError: further than AGREEMENT: then there is nothing to compare.
    """
    with torch.no_grad():
        reference = runs["diffusers, eager"]().float()
        for name, forward in runs.items():
            distance = ((forward().float() - reference).norm() / reference.norm()).item()
            print(f"  output of '{name}': {distance:.1e} from diffusers'")
            if not distance < AGREEMENT:
                raise RuntimeError(f"'{name}' computes something else: {distance:.2g} from diffusers' output")


def rates(args: argparse.Namespace) -> tuple[float, float]:
    """The device's matrix rate (FLOP/s, one large product) and memory bandwidth (bytes/s, one large copy)."""
    device = torch.device(args.device)
    (large,) = time_alone({Product(1, args.matrix, args.matrix, args.matrix): 1}, args.rounds, args.dtype, device)
    source = torch.empty(args.matrix**2 * 8, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    copy = in_turns({"": lambda: target.copy_(source)}, args.rounds, device)[""]
    bandwidth = 2 * source.numel() * source.element_size() / copy.median * 1000
    print(f"matrix rate: {large.rate / 1e12:.3f} TFLOP/s ({large.product}, {large.spread} ms)")
    print(f"bandwidth: {bandwidth / 1e9:.1f} GB/s (copy of {source.numel() * 2 / 2**20:.0f} MiB, {copy} ms)")
    return large.rate, bandwidth


def print_block_products(
    args: argparse.Namespace, times: list[ProductTime], rate: float, bandwidth: float
) -> tuple[float, float]:
    """Prints each product against its floor; (ms that they take alone, their floor in ms)."""
    itemsize = torch.empty((), dtype=args.dtype).element_size()
    total = floors = 0.0
    experts = {"ms": 0.0, "flops": 0.0, "floor": 0.0}
    for t in times:
        arithmetic = 1000 * t.product.flops / rate
        # Attention's scores stay on the chip: it moves what a fused kernel reads and writes, which is little.
        traffic = 0.0 if t.product.attention else 1000 * t.product.bytes(itemsize) / bandwidth
        floor = max(arithmetic, traffic)
        total, floors = total + t.total_ms, floors + t.count * floor
        if t.product.batch == args.experts and not t.product.attention:
            experts["ms"] += t.total_ms
            experts["flops"] += t.count * t.product.flops
            experts["floor"] += t.count * floor
        bound = "arithmetic" if arithmetic > traffic else "memory"
        print(
            f"  {t.count} x {t.product!s:48} {t.spread.median:8.4f} ms  "
            f"{100 * t.rate / rate:5.1f}% of the matrix rate  "
            f"{100 * floor / t.spread.median:5.1f}% of its floor ({bound})"
        )
    if not experts["ms"]:
        return total, floors
    share = experts["flops"] / rate / experts["ms"] * 1000
    print(
        f"  expert products together: {experts['ms']:.4f} ms, {100 * share:.1f}% of the matrix rate, "
        f"{100 * experts['floor'] / experts['ms']:.1f}% of their floor"
    )
    return total, floors


class Step(NamedTuple):
    """Something between products: what it computes, and the numbers that it must read and write once."""

    name: str
    run: Callable[..., Any]  # of `inputs`; what it returns takes a gradient
    inputs: tuple[torch.Tensor, ...]
    forward_numbers: int
    backward_numbers: int


def steps_between(args: argparse.Namespace, ours: Block, inputs: Inputs, routing: Routing) -> list[Step]:
    """Forward counts inputs read and outputs written; backward the saved inputs and the output's gradient read, and
    the inputs' gradients written. Rows of experts are R = E B C."""
    B, S, D, E, H = args.batch, inputs.x.shape[1], args.width, args.experts, args.width // args.heads
    rows_R, hidden, N = routing.rows_R(), args.hidden, args.heads + args.kv_heads
    R, tokens = len(rows_R), B * S

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(args.dtype).requires_grad_()

    x, scale, qk, weight = leaf(B, S, D), leaf(B, 1, D), leaf(B, S, N, H), leaf(N, H)
    packed, shared, routed = leaf(E, R // E, 2 * hidden), leaf(B, S, D), leaf(E, R // E, D)
    gates = routing.gates_BEC.transpose(0, 1).detach().contiguous().requires_grad_()
    takers = routing.takers
    return [
        Step(
            "norm, modulation", lambda x, s: norm_modulate(x, s, EPS, True), (x, scale),
            3 * tokens * D, 4 * tokens * D,
        ),
        Step(
            "QK norm, RoPE", lambda x, w: norm_rope(x, w, inputs.tables[0], EPS), (qk, weight),
            2 * tokens * N * H, 3 * tokens * N * H,
        ),
        Step("gather", lambda x: gather(x, rows_R, E, takers), (x,), tokens * D + R * D, R * D + tokens * D),
        Step("SwiGLU", lambda p: swiglu(p, True), (packed,), 3 * R * hidden, 5 * R * hidden),
        Step(
            "combine", lambda s, r, g: combine(s, r, rows_R, g, takers), (shared, routed, gates),
            2 * tokens * D + R * D, 2 * tokens * D + 2 * R * D,
        ),
    ]  # fmt: skip


def print_steps(args: argparse.Namespace, ours: Block, inputs: Inputs, bandwidth: float) -> None:
    itemsize = torch.empty((), dtype=args.dtype).element_size()
    for choice in (["triton"] if has_kernels(args) else []) + ["torch"]:
        kernels.use_kernels(choice)
        with torch.no_grad():
            routing = ours.img_mlp.route(inputs.x, inputs.time)
        route = functools.partial(ours.img_mlp.route, inputs.x, inputs.time)
        runs = {"router: product, scores, choice, gates": without_gradients(route)}
        numbers = {}
        for step in steps_between(args, ours, inputs, routing):
            outs = step.run(*step.inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            grads = [torch.randn_like(out) for out in outs]
            runs[f"{step.name} forward"] = without_gradients(functools.partial(step.run, *step.inputs))
            runs[f"{step.name} backward"] = functools.partial(
                torch.autograd.grad, outs, step.inputs, grads, retain_graph=True
            )
            numbers |= {f"{step.name} forward": step.forward_numbers, f"{step.name} backward": step.backward_numbers}
        for name, spread in in_turns(runs, args.rounds, torch.device(args.device)).items():
            floor = 1000 * itemsize * numbers.get(name, 0) / bandwidth
            against = f"{100 * floor / spread.median:5.1f}% of its memory floor {floor:.4f} ms" if floor else ""
            print(f"  {choice:6} {name:38} {spread.median:8.4f} ms  {against}")


def measure(args: argparse.Namespace, case: Case, rate: float, bandwidth: float) -> dict[str, dict[str, Spread]]:
    device = torch.device(args.device)
    print(f"\n{case.tokens} tokens, batch {args.batch}, capacity factor {case.capacity}")
    ours, theirs = build(args, case)
    inputs = make_inputs(args, case)
    runs = variants(args, ours, theirs, inputs)
    agree(runs)
    parameters = [*ours.parameters(), *theirs.parameters()]
    kinds = {
        "forward": {name: without_gradients(forward) for name, forward in runs.items()},
        "forward + backward": {name: forward_backward(f, parameters, inputs) for name, f in runs.items()},
    }
    measured = {}
    for kind, calls in kinds.items():
        measured[kind] = in_turns(calls, args.rounds, device)
        for name, spread in measured[kind].items():
            print(f"  {kind:18}  {name:22} {spread} ms")
        ours_best = min((n for n in runs if n.startswith("ours")), key=lambda n: measured[kind][n].median)
        for other in (name for name in runs if name.startswith("diffusers")):
            ratio = measured[kind][other].median / measured[kind][ours_best].median
            print(f"  {kind:18}  '{ours_best}' is {ratio:.2f}x as fast as '{other}'")
    first = next(iter(runs))
    for kind, calls in kinds.items():
        with RecordProducts() as record:
            calls[first]()
        print(f"  products of '{first}', {kind}, each alone:")
        times = time_alone(record.products, args.rounds, args.dtype, device)
        total, floor = print_block_products(args, times, rate, bandwidth)
        step = measured[kind][first].median
        print(
            f"  {kind}: products {total:.4f} ms alone ({100 * total / step:.1f}% of the block's {step:.4f} ms), "
            f"their floor {floor:.4f} ms; the rest takes {step - total:.4f} ms"
        )
    print("  the rest, step by step:")
    print_steps(args, ours, inputs, bandwidth)
    return measured


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (--device cpu runs the same at a toy size)")
        return NO_DEVICE
    print_run(args.device)
    rate, bandwidth = rates(args)
    for tokens in args.tokens:
        for capacity in args.capacities:
            measure(args, Case(tokens, capacity), rate, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
