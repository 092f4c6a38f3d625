"""Time of one training step's forward and backward pass on a CPU, against diffusers' model with the same weights.

    python benchmarks/train_step.py [--threads 2] [--rounds 15] [--layers 12] [--capacity 2] [--rows 16] ...

The defaults are 12 layers of width 512 with 16 experts, at 256 image tokens and batch 8, in the proportions of the
released model: a quarter as many key-value heads as heads, expert width 0.656 of the width, text twice as wide as it.
Ours runs uncompiled and with compiled blocks (train.compile); diffusers' with each of its two expert paths (loop,
grouped products), uncompiled and with blocks compiled by its own method, if the compiler supports them. All run in
turns within one process, as do the step's matrix products, each alone, so that a busy machine disturbs all equally.
Prints the command, the machine, and for each side the median and quartiles over the rounds of wall time and CPU time
(of all threads); ratios of medians and within each round; time by kind of operation; and the share of the matrix rate
of the products alone that the step reaches.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measure import ProductsAlone, RecordProducts, Spread, print_parts, print_products, print_run  # noqa: E402

from model.kernels.elementwise import keep_freed_memory  # noqa: E402
from model.train.compiled import compile_blocks  # noqa: E402
from model.transformer import NucleusTransformer  # noqa: E402

CPU = torch.device("cpu")
ALONE = "our products alone"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="image patches per side; tokens are its square")
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--text-dim", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=336)
    parser.add_argument("--capacity", type=float, default=2.0)
    parser.add_argument("--no-mask", action="store_true", help="no text mask")
    parser.add_argument("--return-memory", action="store_true", help="without keep_freed_memory(), on both sides")
    parser.add_argument("--no-compile", action="store_true", help="nothing compiled: neither our model nor diffusers'")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> tuple[dict, dict]:
    """(models by name, inputs)."""
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    axis = args.head_dim // 16 * 6
    config = dict(
        in_channels=64,
        out_channels=16,
        num_layers=args.layers,
        attention_head_dim=args.head_dim,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        joint_attention_dim=args.text_dim,
        axes_dims_rope=[args.head_dim - 2 * axis, axis, axis],
        dense_moe_strategy="leave_first_block_dense",
        num_experts=args.experts,
        moe_intermediate_dim=args.hidden,
        capacity_factors=args.capacity,
    )
    torch.manual_seed(0)
    ours = NucleusTransformer.from_config(config)
    torch.nn.init.normal_(ours.proj_out.weight, std=0.05)
    models = {"ours": ours}
    for name, grouped in (("diffusers, loop", False), ("diffusers, grouped", True)):
        models[name] = NucleusMoEImageTransformer2DModel(**config, use_grouped_mm=grouped)
        models[name].load_state_dict(ours.state_dict())
    if not args.no_compile:
        for name, model in list(models.items()):
            compiled = copy.deepcopy(model)
            compile_blocks(compiled) if name == "ours" else compiled.compile_repeated_blocks()
            models[f"{name}, compiled"] = compiled
    tokens = args.rows**2
    mask = torch.arange(args.text)[None] < torch.randint(args.text // 2, args.text + 1, (args.batch, 1))
    inputs = dict(
        hidden_states=torch.randn(args.batch, tokens, 64),
        img_shapes=[(1, args.rows, args.rows)] * args.batch,
        encoder_hidden_states=torch.randn(args.batch, args.text, args.text_dim),
        encoder_hidden_states_mask=None if args.no_mask else mask,
        timestep=torch.rand(args.batch),
    )
    return models, inputs


def step(model: torch.nn.Module, inputs: dict, target: torch.Tensor) -> tuple[float, float]:
    """(wall, CPU) milliseconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out.sample
    torch.nn.functional.mse_loss(out, target).backward()
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)


def run_once(models: dict, inputs: dict, target: torch.Tensor) -> dict:
    """The models that run, after a first step, which compiles; prints the others with the reason."""
    running = {}
    torch.compiler.reset()  # kernels are made for a number of threads
    for name, model in models.items():
        begin = time.perf_counter()
        try:
            step(model, inputs, target)
        except Exception as error:  # the compiler's errors have no common base
            if not name.startswith("diffusers") or not name.endswith("compiled"):
                raise
            while cause := error.__cause__ or error.__context__:
                error = cause
            print(f"{name}: cannot be compiled: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            continue
        running[name] = model
        if name.endswith("compiled"):
            print(f"{name}: first step, which compiles, {time.perf_counter() - begin:.0f} s")
    return running


def print_ratio(label: str, above: list[float], below: list[float]) -> None:
    ratio = statistics.median(above) / statistics.median(below)
    print(f"{label}: {ratio:.3f} (within a round {Spread.of([a / b for a, b in zip(above, below)])})")


def faster(times: dict[str, list[float]], compiled: bool) -> str | None:
    """The name of diffusers' faster expert path."""
    names = [name for name in times if name.startswith("diffusers") and name.endswith("compiled") == compiled]
    return min(names, key=lambda name: statistics.median(times[name]), default=None)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.return_memory:
        keep_freed_memory()
    print_run()
    # It logs a traceback if code cannot be compiled; here the reason is printed in one line.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    models, inputs = build(args)
    target = torch.randn(args.batch, args.rows**2, 64)
    print(f"model: {sum(p.numel() for p in models['ours'].parameters()) / 1e6:.2f}M parameters, batch {args.batch}")
    with RecordProducts() as record:
        step(models["ours"], inputs, target)
    for threads in args.threads:
        torch.set_num_threads(threads)
        running = run_once(models, inputs, target)
        alone = ProductsAlone(record.products, torch.float32, CPU)
        walls: dict[str, list[float]] = {name: [] for name in [*running, ALONE]}
        cpus: dict[str, list[float]] = {name: [] for name in running}
        for round_ in range(args.rounds + 1):
            measured = {name: step(model, inputs, target) for name, model in running.items()}
            products = alone.measure()
            if round_ == 0:
                continue
            for name, (wall, cpu) in measured.items():
                walls[name].append(wall)
                cpus[name].append(cpu)
            walls[ALONE].append(products)
        for kind, times in (("CPU", cpus), ("wall", walls)):
            for name, values in times.items():
                print(f"{threads} threads  {kind:4}  {name:27} {Spread.of(values)} ms")
        for ours in (name for name in running if name.startswith("ours")):
            for compiled in (False, True):
                if theirs := faster(walls, compiled):
                    label = f"{threads} threads  {ours}: times as fast as '{theirs}'"
                    print_ratio(label, walls[theirs], walls[ours])
        for ours in (name for name in running if name.startswith("ours")):
            print_ratio(f"{threads} threads  {ours}: share of the products' rate", walls[ALONE], walls[ours])
        for name in ("ours", faster(walls, compiled=False)):
            print_parts(lambda: step(running[name], inputs, target), f"{threads} threads  time goes to  {name}")
        print(f"{threads} threads  our step's matrix products, each alone:")
        flops, took = print_products(alone.slowest_first()), statistics.median(walls[ALONE])
        print(f"  all: {flops:.1f} GFLOP in {took:.1f} ms ({1000 * flops / took:.1f} GFLOP/s)")


if __name__ == "__main__":
    main()
