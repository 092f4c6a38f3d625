"""Time of one training step's forward and backward pass on a CPU, against diffusers' model with the same weights.

    python benchmarks/train_step.py [--threads 2] [--rounds 15] [--layers 12] [--capacity 2] [--rows 16] ...

The defaults are 12 layers of width 512 with 16 experts, at 256 image tokens and batch 8, in the proportions of the
released model: a quarter as many key-value heads as heads, expert width 0.656 of the width, text twice as wide as it.
Both models run in turns within one process, so that a busy machine disturbs both alike; diffusers' at the faster
of its two expert paths (loop, grouped products) for each setting. Prints the command, the machine, and for each side
the median and the quartiles over the rounds, of wall time and of CPU time (which counts all threads, and is the
steadier of the two on a machine that does other work as well). Then where the time goes, by kind of operation, and
how long the very same matrix products take alone: their share of the step is how much of the machine's matrix rate
the step reaches.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measure import RecordProducts, Spread, print_parts, print_products, print_run, time_alone  # noqa: E402

from model.cpu_ops import keep_freed_memory  # noqa: E402
from model.transformer import NucleusTransformer  # noqa: E402

CPU = torch.device("cpu")


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
    parser.add_argument("--compile", action="store_true", help="our model also with torch.compile")
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
    if args.compile:
        models["ours, compiled"] = torch.compile(ours)
    for name, grouped in (("diffusers, loop", False), ("diffusers, grouped", True)):
        models[name] = NucleusMoEImageTransformer2DModel(**config, use_grouped_mm=grouped)
        models[name].load_state_dict(ours.state_dict())
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.return_memory:
        keep_freed_memory()
    models, inputs = build(args)
    target = torch.randn(args.batch, args.rows**2, 64)
    print_run()
    print(f"model: {sum(p.numel() for p in models['ours'].parameters()) / 1e6:.2f}M parameters, batch {args.batch}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for round_ in range(args.rounds + 2):
            for name, model in models.items():
                measured = step(model, inputs, target)
                if round_ >= 2:
                    times[name].append(measured)
        walls = {}
        for i, kind in reversed(list(enumerate(("wall", "CPU")))):
            walls = {name: Spread.of([pair[i] for pair in pairs]) for name, pairs in times.items()}
            for name, spread in walls.items():
                print(f"{threads} threads  {kind:4}  {name:20} {spread} ms")
            faster = min((name for name in models if name.startswith("diffusers")), key=lambda n: walls[n].median)
            ratio = walls[faster].median / walls["ours"].median
            print(f"{threads} threads  {kind:4}  ours: {ratio:.3f}x as fast as '{faster}'")
        for name in ("ours", faster):
            print_parts(lambda: step(models[name], inputs, target), f"{threads} threads  time goes to  {name}")
        with RecordProducts() as record:
            step(models["ours"], inputs, target)
        print(f"{threads} threads  our step's matrix products, each alone:")
        print_products(time_alone(record.products, args.rounds, torch.float32, CPU), walls["ours"].median)


if __name__ == "__main__":
    main()
