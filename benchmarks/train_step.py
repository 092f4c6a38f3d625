"""Time of one training step's forward and backward pass, against diffusers' model with the same weights.

    python benchmarks/train_step.py [--threads 1 2] [--rounds 15] [--layers 6] [--capacity 2] [--tokens 16] ...

Both models run in turns within one process, so that a busy machine disturbs both alike; diffusers' at the faster
of its two expert paths (loop, grouped products) for each setting. Prints the command, the machine, and for each
side the median and the quartiles over the rounds, of wall time and of CPU time (which counts all threads, and is
the steadier of the two on a machine that does other work as well).
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.cpu_ops import keep_freed_memory  # noqa: E402
from model.transformer import NucleusTransformer  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4, help="image patches per side; tokens are its square")
    parser.add_argument("--text", type=int, default=16, help="text tokens")
    parser.add_argument("--text-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--capacity", type=float, default=2.0)
    parser.add_argument("--no-mask", action="store_true", help="no text mask")
    parser.add_argument("--keep-memory", action="store_true", help="keep_freed_memory(), for both sides")
    parser.add_argument("--compile", action="store_true", help="our model also with torch.compile")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> tuple[dict, dict]:
    """(models by name, inputs)."""
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    config = dict(
        in_channels=64,
        out_channels=16,
        num_layers=args.layers,
        attention_head_dim=args.head_dim,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        joint_attention_dim=args.text_dim,
        axes_dims_rope=[args.head_dim - 2 * (args.head_dim // 16 * 6), args.head_dim // 16 * 6, args.head_dim // 16 * 6],
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


def main() -> None:
    args = parse()
    if args.keep_memory:
        keep_freed_memory()
    models, inputs = build(args)
    target = torch.randn(args.batch, args.rows**2, 64)
    print("command:", shlex.join(["python", *sys.argv]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores ({_cpu_name()}), torch {torch.__version__}")
    print(f"model: {sum(p.numel() for p in models['ours'].parameters()) / 1e6:.2f}M parameters, batch {args.batch}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for round_ in range(args.rounds + 2):
            for name, model in models.items():
                measured = step(model, inputs, target)
                if round_ >= 2:
                    times[name].append(measured)
        for i, kind in enumerate(("wall", "CPU")):
            medians = {}
            for name, pairs in times.items():
                values = [pair[i] for pair in pairs]
                low, medians[name], high = statistics.quantiles(values, n=4)
                print(
                    f"{threads} threads  {kind:4}  {name:20} {medians[name]:8.1f} ms  "
                    f"(quartiles {low:.1f} to {high:.1f}, least {min(values):.1f}, n={len(values)})"
                )
            faster = min((name for name in models if name.startswith("diffusers")), key=medians.get)
            print(f"{threads} threads  {kind:4}  ours: {medians[faster] / medians['ours']:.2f}x as fast as '{faster}'")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
