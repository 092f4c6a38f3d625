"""Times one block of the 17B shape on a GPU, forward and backward, and diffusers' block with the same weights.

    python benchmarks/gpu_blocks.py [--cases 4x4096x2 32x256x8] [--rounds 10]
    python benchmarks/gpu_blocks.py --device cpu --width 64 --heads 4 --kv-heads 2 --experts 4 --hidden 48 --text 8 \\
        --text-dim 32 --cases 1x16x2 --rounds 2 --no-compile      # its own logic, on a machine without a GPU

A case is samples x image tokens x capacity factor. The default cases are micro-batches of the last and of the first stage
of recipes/nucleus_17b.yaml, with 512 and 1024 rows per expert: reading an expert's weights then takes less time than
multiplying with them. As in training there is a key mask (which keeps all keys) and the router is in fp32; diffusers'
block gets no mask and a router in the block's dtype.

For every case, in turns within one process: ours with Triton kernels, ours in plain PyTorch, both under torch.compile
(which leaves routing to the kernels), diffusers with grouped_mm, and the same under torch.compile; medians and quartiles.
Compiled code is specialised to the shapes of the case, while training compiles for any number of tokens. Without
diffusers only ours is measured. A variant that fails is named, and the others are measured. Then, of our block with
Triton kernels (plain PyTorch where there are none):

    products   every matrix product alone, against the card's matrix rate, measured in this run on a large product, and
               with its own floor: the slower of arithmetic at that rate and memory traffic at the measured bandwidth
               (with few rows per expert, reading its weights takes longer than multiplying)
    attention  the kernel that the block runs, against its arithmetic at that rate
    the rest   each operation between products alone, plain and as a kernel, against the memory time of reading its
               inputs and writing its outputs once

Exit code 0 after a measurement, 2 without a CUDA device unless --device names another.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from block_inputs import Case, Inputs, make_inputs  # noqa: E402
from block_steps import steps_between  # noqa: E402
from measure import (  # noqa: E402
    Product,
    ProductTime,
    RecordProducts,
    in_turns,
    print_run,
    spin_up,
    time_alone,
)

from model import kernels  # noqa: E402
from model.layers.attention import attend  # noqa: E402
from model.transformer import Block  # noqa: E402

NO_DEVICE = 2
AGREEMENT = 0.1  # relative; routers of two implementations may choose differently between equal rounded scores
# Variants, kinds of blocks and capacity factors: more than PyTorch's limit of 8, beyond which it silently runs uncompiled.
COMPILED_VARIANTS = 64
REFERENCE = "diffusers, eager"


@dataclass(frozen=True)
class BlockConfig:
    """What `Block` reads of a TransformerConfig, which needs pydantic."""

    width: int
    num_attention_heads: int
    kv_heads: int
    joint_attention_dim: int
    num_experts: int
    moe_intermediate_dim: int
    factor: float
    use_sigmoid: bool = False
    route_scale: float = 2.5
    routing: None = None

    @property
    def attention_head_dim(self) -> int:
        return self.width // self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        return True

    def capacity_factor(self, layer: int) -> float:
        return self.factor


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="+",
        default=[Case(4, 4096, 2.0), Case(32, 256, 8.0)],
        help="samples x image tokens x capacity factor",
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1344)
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--text-dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10, help="of ten calls each on a GPU")
    parser.add_argument("--matrix", type=int, help="side of the large product; 8192 on a GPU, else 512")
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    args.matrix = args.matrix or (8192 if on_gpu else 512)
    return args


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def build(args: argparse.Namespace, case: Case) -> tuple[Block, torch.nn.Module | None]:
    """Our block, made on the device, and diffusers' with the same weights, if it is installed."""
    config = BlockConfig(
        args.width, args.heads, args.kv_heads, args.text_dim, args.experts, args.hidden, factor=case.capacity
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        ours = Block(config, 0).to(args.dtype)
    ours.to_empty(device=args.device)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.ones_(parameter)
    return ours, _diffusers_block(args, case, ours) if has_diffusers() else None


def _diffusers_block(args: argparse.Namespace, case: Case, ours: Block) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformerBlock

    with torch.device("meta"):
        theirs = NucleusMoEImageTransformerBlock(
            dim=args.width,
            num_attention_heads=args.heads,
            attention_head_dim=args.width // args.heads,
            num_key_value_heads=args.kv_heads,
            joint_attention_dim=args.text_dim,
            moe_enabled=True,
            num_experts=args.experts,
            moe_intermediate_dim=args.hidden,
            capacity_factor=case.capacity,
            use_grouped_mm=True,
        )
    theirs.load_state_dict(ours.state_dict(), assign=True)  # one copy of the weights for both
    return theirs.requires_grad_()


def variants(
    args: argparse.Namespace, ours: Block, theirs: torch.nn.Module | None, inputs: Inputs
) -> dict[str, Callable[[], torch.Tensor]]:
    """Forward passes by name. A graph break is an error."""
    compile_ = functools.partial(torch.compile, mode=args.compile_mode, fullgraph=True)

    def run_ours(block: Any, choice: str) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            kernels.use_kernels(choice)
            text = (inputs.text, inputs.text_weight)
            return block(inputs.x, inputs.time, F.silu(inputs.time), text, None, inputs.tables, inputs.mask)[0]

        return forward

    def run_theirs(block: Any) -> Callable[[], torch.Tensor]:
        return lambda: block(inputs.x, inputs.text, inputs.time, inputs.rotations)

    runs = {}
    if has_kernels(args):
        runs["ours, triton"] = run_ours(ours, "triton")
    runs["ours, torch"] = run_ours(ours, "torch")
    if theirs is not None:
        runs[REFERENCE] = run_theirs(theirs)
    if not args.no_compile:
        compiled = compile_(ours)  # once for each choice
        if has_kernels(args):
            runs["ours, compiled, triton"] = run_ours(compiled, "triton")
        runs["ours, compiled, torch"] = run_ours(compiled, "torch")
        if theirs is not None:
            theirs.img_mlp.experts.register_forward_pre_hook(_sum_in_int32(args))
            # diffusers does not promise one graph.
            runs["diffusers, compiled"] = run_theirs(torch.compile(theirs, mode=args.compile_mode))
    return runs


def _sum_in_int32(args: argparse.Namespace) -> Callable[[torch.nn.Module, tuple], tuple]:
    """PyTorch 2.13's compiler turns the int32 cumulative sum of a constant, such as diffusers' rows of each expert, into
    int64 (`pointless_cumsum_replacement`), which grouped_mm refuses. Adding a zero unknown to the compiler makes it no
    constant."""
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


def agree(runs: dict[str, Callable[[], torch.Tensor]], name: str | None = None) -> dict[str, str]:
    """Prints the distance of each output from that of variant `name`; None: diffusers' eager one, or without it the first.

    Returns:
        the variants that fail or compute something else, with the reason.
    """
    bad: dict[str, str] = {}
    name = name or (REFERENCE if REFERENCE in runs else next(iter(runs)))
    with torch.no_grad():
        reference = runs[name]().float()
        for variant, forward in runs.items():
            try:
                distance = ((forward().float() - reference).norm() / reference.norm()).item()
            except Exception as error:
                bad[variant] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                print(f"  '{variant}' fails: {bad[variant]}")
                continue
            print(f"  output of '{variant}': {distance:.1e} from that of '{name}'")
            if not distance < AGREEMENT:
                bad[variant] = f"computes something else: {distance:.2g} from the output of '{name}'"
    return bad


def rates(args: argparse.Namespace) -> tuple[float, float]:
    """The device's matrix rate (FLOP/s, one large product) and memory bandwidth (bytes/s, one large copy)."""
    device = torch.device(args.device)
    source = torch.empty(args.matrix**2 * 8, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    spin_up(device)
    (large,) = time_alone({Product(1, args.matrix, args.matrix, args.matrix): 1}, args.rounds, args.dtype, device)
    copy = in_turns({"": lambda: target.copy_(source)}, args.rounds, device)[""]
    bandwidth = 2 * source.numel() * source.element_size() / copy.median * 1000
    print(f"matrix rate: {large.rate / 1e12:.3f} TFLOP/s ({large.product}, {large.spread} ms)")
    print(f"bandwidth: {bandwidth / 1e9:.1f} GB/s (copy of {source.numel() * 2 / 2**20:.0f} MiB, {copy} ms)")
    return large.rate, bandwidth


def print_block_products(
    args: argparse.Namespace, times: list[ProductTime], rate: float, bandwidth: float
) -> dict[str, float]:
    """Prints each product against its floor. Returns their total time alone and total floor, in ms, and the experts'
    share of the matrix rate."""
    itemsize = torch.empty((), dtype=args.dtype).element_size()
    total = floors = 0.0
    experts = {"ms": 0.0, "flops": 0.0, "floor": 0.0}
    for t in times:
        arithmetic = 1000 * t.product.flops / rate
        traffic = 1000 * t.product.bytes(itemsize) / bandwidth
        floor = max(arithmetic, traffic)
        total, floors = total + t.total_ms, floors + t.count * floor
        if t.product.batch == args.experts:
            experts["ms"] += t.total_ms
            experts["flops"] += t.count * t.product.flops
            experts["floor"] += t.count * floor
        bound = "arithmetic" if arithmetic > traffic else "memory"
        print(
            f"  {t.count} x {t.product!s:48} {t.spread.median:8.4f} ms  "
            f"{100 * t.rate / rate:5.1f}% of the matrix rate  "
            f"{100 * floor / t.spread.median:5.1f}% of its floor ({bound})"
        )
    result = {"ms": total, "floor_ms": floors}
    if not experts["ms"]:
        return result
    share = experts["flops"] / rate / experts["ms"] * 1000
    print(
        f"  expert products together: {experts['ms']:.4f} ms, {100 * share:.1f}% of the matrix rate, "
        f"{100 * experts['floor'] / experts['ms']:.1f}% of their floor"
    )
    return result | {"experts_ms": experts["ms"], "experts_share_of_matrix_rate": share}


def time_attention(args: argparse.Namespace, case: Case, inputs: Inputs, rate: float) -> dict[str, dict[str, float]]:
    """The attention kernel that the block runs, alone. Arithmetic: 2 products forward, 4 gradients backward."""
    B, S, N, K, H = case.batch, case.tokens, args.heads, args.kv_heads, args.width // args.heads
    L = S + args.text

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(args.dtype).requires_grad_()

    tensors = leaf(B, S, N, H), leaf(B, L, K, H), leaf(B, L, K, H)
    out = attend(*tensors, inputs.mask)
    grad = torch.randn_like(out)
    runs = {
        "attention forward": without_gradients(lambda: attend(*tensors, inputs.mask)),
        "attention backward": lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True),
    }
    flops = {"attention forward": 4 * B * S * L * N * H, "attention backward": 8 * B * S * L * N * H}
    result = {}
    for name, spread in in_turns(runs, args.rounds, torch.device(args.device)).items():
        share = flops[name] / rate / spread.median * 1000
        result[name] = {"ms": spread.median, "share_of_matrix_rate": share}
        print(f"  {name:45} {spread.median:8.4f} ms  {100 * share:5.1f}% of the matrix rate")
    return result


def print_steps(args: argparse.Namespace, ours: Block, inputs: Inputs, bandwidth: float) -> dict[str, dict[str, float]]:
    itemsize = torch.empty((), dtype=args.dtype).element_size()
    result = {}
    for choice in (["triton"] if has_kernels(args) else []) + ["torch"]:
        kernels.use_kernels(choice)
        with torch.no_grad():
            routing = ours.img_mlp.route(inputs.x, inputs.time)
        route = functools.partial(ours.img_mlp.route, inputs.x, inputs.time)
        runs = {"router: product, scores, choice, gates": without_gradients(route)}
        numbers = {}
        for step in steps_between(args, inputs.x, inputs.tables, routing):
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
            result[f"{name}, {choice}"] = {"ms": spread.median, "floor_ms": floor}
            print(f"  {choice:6} {name:38} {spread.median:8.4f} ms  {against}")
    return result


def measure(
    args: argparse.Namespace, case: Case, rate: float, bandwidth: float, keep: Callable[..., None] = lambda **_: None
) -> dict[str, Any]:
    """Measures one case; prints and returns numbers (times in ms). `keep` is called several times with the numbers so
    far: compiling comes last, since it may fail or take minutes."""
    # A new case has other shapes: earlier compilations must not count against the limit.
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS, fail_on_recompile_limit_hit=True):
        return _measure(args, case, rate, bandwidth, keep)


def _measure(
    args: argparse.Namespace, case: Case, rate: float, bandwidth: float, keep: Callable[..., None]
) -> dict[str, Any]:
    print(f"\n{case}")
    ours, theirs = build(args, case)
    inputs = make_inputs(args, case)
    runs = variants(args, ours, theirs, inputs)
    eager = {name: forward for name, forward in runs.items() if "compiled" not in name}
    failures = agree(eager)
    gate = ours.img_mlp.gate  # from here on as in training; before as in diffusers, to compare outputs
    gate.weight = torch.nn.Parameter(gate.weight.detach().float())
    parameters = [*ours.parameters(), *(theirs.parameters() if theirs is not None else ())]
    actual: dict[str, Any] = {"case": str(case), "failures": failures, "ms": {}, "speed": {}, "products": {}}

    def in_both_kinds(measured: dict[str, Callable[[], torch.Tensor]]) -> dict[str, Callable[[], object]]:
        """The forward + backward passes that did not fail."""
        measured = {name: forward for name, forward in measured.items() if name not in failures}
        calls = {name: without_gradients(forward) for name, forward in measured.items()}
        _compare(args, "forward", calls, actual)
        calls = {name: forward_backward(forward, parameters, inputs) for name, forward in measured.items()}
        _compare(args, "forward + backward", calls, actual)
        keep(**actual)
        return calls

    left = in_both_kinds(eager)
    first = next((name for name in left if name.startswith("ours")), None)
    if first is not None:
        for kind, call in (("forward", without_gradients(eager[first])), ("forward + backward", left[first])):
            print(f"  products of '{first}', {kind}, each alone:")
            step = actual["ms"][kind][first]["median"]
            actual["products"][kind] = _products(args, call, step, rate, bandwidth) | {"block_ms": step}
    print("  attention alone:")
    actual["attention"] = time_attention(args, case, inputs, rate)
    keep(**actual)
    print("  the rest, step by step:")
    actual["steps"] = print_steps(args, ours, inputs, bandwidth)
    keep(**actual)
    if len(runs) > len(eager):
        for side, reference in (("ours", first), ("diffusers", REFERENCE)):
            compiled = {name: run for name, run in runs.items() if name not in eager and name.startswith(side)}
            if compiled and reference in left:
                failures |= agree({reference: eager[reference]} | compiled, reference)
        in_both_kinds(runs)  # all in turns
    return actual


def _compare(
    args: argparse.Namespace, kind: str, calls: dict[str, Callable[[], object]], result: dict[str, Any]
) -> None:
    """Times `calls` in turns, leaves out those that fail, and adds to `found`."""
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:
            result["failures"][f"{name}, {kind}"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            print(f"  '{name}', {kind}, fails: {result['failures'][f'{name}, {kind}']}")
            del calls[name]
    spin_up(torch.device(args.device))
    measured = in_turns(calls, args.rounds, torch.device(args.device))
    result["ms"][kind] = {name: spread._asdict() for name, spread in measured.items()}
    for name, spread in measured.items():
        print(f"  {kind:18}  {name:22} {spread} ms")
    ours_best = min((name for name in calls if name.startswith("ours")), key=lambda n: measured[n].median, default=None)
    for other in (name for name in calls if name.startswith("diffusers") and ours_best):
        ratio = measured[other].median / measured[ours_best].median
        result["speed"][f"{kind}: '{ours_best}' against '{other}'"] = ratio
        print(f"  {kind:18}  '{ours_best}' is {ratio:.2f}x as fast as '{other}'")


def _products(
    args: argparse.Namespace, call: Callable[[], object], step: float, rate: float, bandwidth: float
) -> dict[str, float]:
    """The products of `call`, each timed alone, compared with its own milliseconds."""
    with RecordProducts() as record:
        call()
    products = {product: count for product, count in record.products.items() if not product.attention}
    times = time_alone(products, args.rounds, args.dtype, torch.device(args.device))
    alone = print_block_products(args, times, rate, bandwidth)
    print(
        f"  products {alone['ms']:.4f} ms alone ({100 * alone['ms'] / step:.1f}% of the block's {step:.4f} ms), "
        f"their floor {alone['floor_ms']:.4f} ms; the rest takes {step - alone['ms']:.4f} ms"
    )
    return alone


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (--device cpu runs the same at a toy size)")
        return NO_DEVICE
    print_run(args.device)
    rate, bandwidth = rates(args)
    for case in args.cases:
        measure(args, case, rate, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
