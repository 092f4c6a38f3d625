"""Estimates the memory, time and cost of training a recipe, and suggests a layout that fits.

    python -m model.plan recipes/nucleus_17b.yaml --gpus 64 --gpu h100 [--mfu 0.35] [--cost-per-gpu-hour 2.5]
                         [--network-gbps 400]

Every number is computed from the model's shapes (on the meta device), the recipe and data sheets. model/plan/memory.py
estimates memory, defines a layout and lists what the estimate leaves out. See docs/decisions/planner.md.

Units: bytes, FLOPs (one multiply-add is 2), seconds; GB is 1e9 bytes. Letters: B samples of a micro-batch, S image
tokens, T text tokens, D width, J text width, N and K query and key-value heads, H head dim, E experts, C capacity
(tokens that an expert takes of each sample; fixed, since experts choose tokens), F expert hidden, I dense inner width.

Source of the FLOPs of matrix products and of MFU: PaLM (arXiv 2204.02311, appendix B: recomputation does not count).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from model.config import RoutingConfig, StageConfig, TrainConfig, TransformerConfig
from model.constants import VAE_SCALE
from model.optim import OPTIMIZERS
from model.plan.data_costs import Corpus, Prices, data_costs
from model.plan.data_costs import render as data_costs_text
from model.plan.gpus import GPUS, NODE, Gpu
from model.plan.memory import FP32, Layout, Moment, Shapes, moments
from model.plan.memory_trace import Step
from model.plan.plan_text import render
from model.ranks import micro_batch as micro_batch_of
from model.recipe_yaml import read_recipe

TEXT_TOKENS = 512  # captions of up to 200 words and the chat template; the pipeline's limit is 1024
USABLE = 0.9  # share of a GPU's memory; the rest is for the CUDA context, NCCL, cuBLAS and fragmentation
NOTE = (
    "Memory is estimated for eager code without Triton kernels and was checked against measured peaks of small models "
    "(benchmarks/memory.py); torch.compile and the kernels need less. Times are FLOPs at the given MFU; nothing was "
    "measured on these GPUs. Times contain no separate terms for network, GPU memory traffic, data loading, checkpoints "
    "and sampling: choose an MFU that includes them."
)
TOKEN_CHOICE_NOTE = (
    "Token choice is planned at its limit of tokens per expert, or at an even load if it has no limit: the most loaded "
    "expert of a batch sets the number of rows of all experts, and memory and time grow with it."
)
DIST_MUON_NOTE = (
    "Muon's memory is estimated for this project's implementation; torchtitan's allocates two buffers of a block's "
    "matrices."
)
CHECKPOINTING = ("none", "selective", "full")  # from most memory to least


def active_parameters(shapes: Shapes, config: TransformerConfig, tokens: int) -> int:
    """Parameters that process one image token: all but routed experts, plus the E C / S experts of an average token.

    Includes parameters that run once per sample (modulation, timestep) or on text, as "17B, about 2B active" does.
    """
    expert = 3 * config.width * config.moe_intermediate_dim
    experts = sum(config.num_experts * config.capacity(layer, tokens) / tokens for layer in _moe_layers(config))
    return round(shapes.total - shapes.experts + experts * expert)


def forward_flops(
    config: TransformerConfig, tokens: int, text_tokens: int, batch: int = 1, fp32: bool = False
) -> dict[str, int]:
    """FLOPs of a forward pass of `batch` samples, by part. Counts matrix products, not element-wise operations.

    attention: scores and values, 4 S (S + T) N H per sample; experts: 6 E C D F at the capacity factors; all other
    parts: 2 x weights x rows. `fp32`: text K/V use one fused product wherever `Block.text_kv` does.
    """
    c, S, T = config, tokens, text_tokens
    D, J, E, F, L = c.width, c.joint_attention_dim, c.num_experts, c.moe_intermediate_dim, c.num_layers
    queries, kv = c.num_attention_heads * c.attention_head_dim, 2 * c.kv_heads * c.attention_head_dim
    moe = _moe_layers(c)
    separate, fused = batch * T * (J * D + D * kv), kv * D * J + batch * T * kv * J
    out = c.patch_size**2 * (c.out_channels or c.in_channels)
    return {
        "projections": batch * L * 2 * S * D * (2 * queries + kv),
        "attention": batch * L * 4 * S * (S + T) * queries,
        "text_kv": 2 * L * (fused if fp32 and fused < separate else separate),
        "experts": batch * sum(6 * E * c.capacity(layer, S) * D * F for layer in moe),
        "shared_expert": batch * len(moe) * 6 * S * D * F,
        "router": batch * len(moe) * 2 * (S + 1) * D * E,
        "dense_ffn": batch * sum(6 * S * D * c.ffn_hidden(layer) for layer in range(L) if layer not in moe),
        "modulation": batch * L * 2 * D * 4 * D,
        "ends": batch * 2 * (S * D * (c.in_channels + out) + D * 8 * D + D * 2 * D),
    }


def traffic(
    shapes: Shapes,
    config: TransformerConfig,
    layout: Layout,
    stage: StageConfig,
    tokens: int,
    element: int,
    activations: int,
) -> dict[str, int]:
    """Bytes that one rank sends over the network, and reads or writes in GPU memory, per optimiser step.

    Network, by ring formulas: each accumulation step all-gathers weights twice (forward, backward) and reduce-scatters
    fp32 gradients once, (n-1)/n of a block's size over n ranks; replicas all-reduce once per step. Expert parallelism
    sends rows to the experts and back in the forward, the backward and the recomputation; (ep-1)/ep of them go to other
    ranks. `between_nodes` is the traffic through a GPU's link to other nodes. Ranks are placed in torchtitan's order
    (replicas, shard, ep), so a ring enters a node once for all of its ranks there, while rows go directly to the
    expert's rank (`between_nodes_rows` of them leave the node).
    Memory, a lower bound: each pass reads the weights (the backward twice), saved activations are written and read once,
    and the optimiser reads gradients and reads and writes weights and state (16 bytes per Muon parameter, 24 per AdamW
    parameter).
    """
    local, recompute = stage.batch_size // layout.gpus, layout.checkpointing == "full"
    micro_steps = local // layout.micro_batch
    shard, ep, replicas = layout.shard, layout.expert_parallel, layout.gpus // layout.shard
    dense, experts = shapes.total - shapes.experts, shapes.experts // ep
    rings = [(dense * (shard - 1) / shard, shard, 1), (experts * (shard // ep - 1) / (shard // ep), shard // ep, ep)]
    over_network = sum(size for size, _, _ in rings)
    all_reduced = 2 * shapes.per_gpu(layout) * (replicas - 1) / replicas
    rows = sum(config.num_experts * config.capacity(i, tokens) for i in _moe_layers(config))
    rows_sent = local * rows * config.width * element * (4 + 2 * recompute)

    def entering(size: float, ranks: int, stride: int) -> float:
        together = max(1, NODE // stride)  # ranks of the ring in one node
        return size / together if ranks > together else 0.0

    between = micro_steps * (2 * element + FP32) * sum(entering(*ring) for ring in rings)
    rows_between = rows_sent * max(0, ep - NODE) / ep
    between += FP32 * entering(all_reduced, replicas, shard) + rows_between
    updated = sum((2 * (1 + o.state_tensors) + 1) * shapes.per_gpu(layout, name) for name, o in OPTIMIZERS.items())
    return {
        "network_weights": round(micro_steps * 2 * element * over_network),
        "network_gradients": round(FP32 * (micro_steps * over_network + all_reduced)),
        "network_all_to_all": round(rows_sent * (ep - 1) / ep),
        "between_nodes": round(between),
        "between_nodes_rows": round(rows_between),
        "memory_weights": micro_steps * element * (dense + experts) * (3 + recompute),
        "memory_activations": micro_steps * 2 * activations,
        "memory_optimizer": FP32 * updated,  # weights and state read and written, gradients read
    }


def passes(stage: StageConfig) -> float:
    """FLOPs of a step divided by those of a forward, averaged over a stage: the backward takes two forwards, and a step
    that trains guidance in has one more forward, with the empty prompt, and one of the weaker model."""
    return 3 + (stage.guidance.forwards * stage.guidance.steps / stage.steps if stage.guidance is not None else 0)


def plan_stage(
    shapes: Shapes,
    model: TransformerConfig,
    train: TrainConfig,
    stage: StageConfig,
    layout: Layout,
    gpu: Gpu,
    *,
    mfu: float = 0.35,
    cost_per_gpu_hour: float | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, Any]:
    """The plan of one stage, as plain numbers (bytes, FLOPs, seconds, days, and the price's currency).

    step time = `passes` x forward FLOPs / (gpus x peak x mfu), the mean of the stage's steps. Recomputation
    and the optimiser count in `hardware_flops`, not in MFU. Step time contains no term for data transfer; the memory
    and network floors are separate lower bounds, and a step takes at least the longest of the three. `exposed_rows_s`
    is the communication time of the experts' rows that the shared expert's computation does not hide; transfers of
    weights and gradients overlap with the computation of other blocks. Image tokens are those of the square bucket;
    other aspect ratios differ by about 1 to 2 percent. The peak is bf16's, also if the recipe trains in fp32.

    Raises:
        ValueError: degrees that do not divide, sizes that do not tile, or an MFU or price out of range.
    """
    config, tokens = _stage_model(model, stage)
    layout.check(config.num_experts, stage)
    price = cost_per_gpu_hour
    if not 0 < mfu <= 1 or text_tokens < 1 or (price is not None and not 0 <= price < math.inf):
        valid = f"mfu={mfu} must be in (0, 1], text_tokens={text_tokens} at least 1"
        raise ValueError(f"{valid}, cost_per_gpu_hour={price} at least 0")
    element = 2 if train.dtype == "bfloat16" else FP32
    step_moments = _moments(shapes, config, train, stage, layout, tokens, text_tokens)
    peak = max(step_moments, key=lambda moment: moment.total)
    micro = forward_flops(config, tokens, text_tokens, layout.micro_batch, fp32=element == FP32)
    forward = {part: flops * (stage.batch_size // layout.micro_batch) for part, flops in micro.items()}
    total = round(passes(stage) * sum(forward.values()))
    newton_schulz = train.optim.muon_ns_steps * shapes.newton_schulz_flops * (layout.gpus // layout.shard)
    activations = max(moment.parts.get("activations", 0) for moment in step_moments)
    moved = traffic(shapes, config, layout, stage, tokens, element, activations)
    step_s = total / (layout.gpus * gpu.flops * mfu)
    rows_s = moved["between_nodes_rows"] / gpu.network
    rows_s += (moved["network_all_to_all"] - moved["between_nodes_rows"]) / gpu.nvlink
    hidden_s = 3 * forward["shared_expert"] / (layout.gpus * gpu.flops * mfu)
    hours, limit = step_s * stage.steps / 3600, USABLE * gpu.memory
    gpu_hours = hours * layout.gpus
    return {
        "stage": stage.name,
        "layout": asdict(layout),
        "image_tokens": tokens,
        "text_tokens": text_tokens,
        "parameters": shapes.total,
        "active_parameters_per_image_token": active_parameters(shapes, config, tokens),
        "memory_bytes": peak.parts | {"peak": peak.total},
        "memory_moment": peak.name,
        "usable_bytes": round(limit),
        "fits": peak.total <= limit,
        "flops": {"forward": forward, "forward_and_backward": total},
        "hardware_flops": total + newton_schulz + (layout.checkpointing == "full") * sum(forward.values()),
        "bytes_per_step": moved,
        "memory_floor_s": sum(v for key, v in moved.items() if key.startswith("memory")) / gpu.bandwidth,
        "network_floor_s": moved["between_nodes"] / gpu.network,
        "exposed_rows_s": max(0.0, rows_s - hidden_s),
        "step_s": step_s,
        "images_per_s": stage.batch_size / step_s,
        "days": hours / 24,
        "gpu_hours": gpu_hours,
        "cost": None if price is None else gpu_hours * price,
    }


def _moments(
    shapes: Shapes,
    config: TransformerConfig,
    train: TrainConfig,
    stage: StageConfig,
    layout: Layout,
    tokens: int,
    text_tokens: int,
) -> list[Moment]:
    step = Step(
        batch=layout.micro_batch,
        tokens=tokens,
        text_tokens=text_tokens,
        dtype=getattr(torch, train.dtype),
        checkpointing=layout.checkpointing,
        accumulate=stage.batch_size // layout.gpus > layout.micro_batch,
        losses=stage.active_losses(train.losses),
        guided=stage.guidance is not None,
        weaker_model=stage.needs_weaker_model,
    )
    return moments(shapes, config, layout, step, ns_steps=train.optim.muon_ns_steps)


def suggest(
    shapes: Shapes,
    model: TransformerConfig,
    train: TrainConfig,
    stage: StageConfig,
    asked: Layout,
    gpu: Gpu,
    text_tokens: int = TEXT_TOKENS,
) -> Layout | None:
    """The layout on the same number of GPUs that fits and is nearest to `asked` (sharding first, then expert parallelism,
    then checkpointing), with the largest micro-batch; None if no layout fits."""
    config, tokens = _stage_model(model, stage)

    def fits(layout: Layout) -> bool:
        step_moments = _moments(shapes, config, train, stage, layout, tokens, text_tokens)
        return max(moment.total for moment in step_moments) <= USABLE * gpu.memory

    divisors = lambda number: [i for i in range(1, number + 1) if number % i == 0]  # noqa: E731
    distance = lambda name: abs(CHECKPOINTING.index(name) - CHECKPOINTING.index(asked.checkpointing))  # noqa: E731
    for shard in dict.fromkeys((asked.shard, asked.gpus)):
        for ep in sorted(
            divisors(math.gcd(shard, config.num_experts)), key=lambda ep: abs(math.log(ep / asked.expert_parallel))
        ):
            for checkpointing in sorted(CHECKPOINTING, key=distance):
                layout = replace(asked, shard=shard, expert_parallel=ep, micro_batch=1, checkpointing=checkpointing)
                if fits(layout):  # memory grows with the micro-batch: find the largest that fits
                    sizes = divisors(stage.batch_size // asked.gpus)
                    low, high = 0, len(sizes) - 1
                    while low < high:
                        middle = (low + high + 1) // 2
                        low, high = (
                            (middle, high) if fits(replace(layout, micro_batch=sizes[middle])) else (low, middle - 1)
                        )
                    return replace(layout, micro_batch=sizes[low])
    return None


def plan(
    model: TransformerConfig,
    train: TrainConfig,
    gpu: Gpu,
    *,
    gpus: int | None = None,
    shard: int | None = None,
    expert_parallel: int | None = None,
    micro_batch: int | None = None,
    checkpointing: str | None = None,
    mfu: float = 0.35,
    cost_per_gpu_hour: float | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, Any]:
    """`plan_stage` of each stage, checkpoint sizes, and a `suggestion` (or None) for each stage that does not fit.

    Arguments that are None come from the recipe: ranks, replicas, expert_parallel, local_batch_size (at most a rank's
    share of the batch) and activation_checkpointing. Raises ValueError as `plan_stage` does.
    """
    gpus = train.nnodes * train.nproc_per_node if gpus is None else gpus
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    checkpointing = checkpointing or train.activation_checkpointing
    if shard is None:
        shard = train.data_parallel_shard if train.data_parallel_shard > 0 else gpus // train.data_parallel_replicate
    expert_parallel = train.expert_parallel if expert_parallel is None else expert_parallel
    shapes = Shapes(model, train.optim.matrices)
    options = dict(mfu=mfu, cost_per_gpu_hour=cost_per_gpu_hour, text_tokens=text_tokens)
    stages = []
    for stage in train.stages:
        local = micro_batch_of(stage, train, gpus) if micro_batch is None else micro_batch
        asked = Layout(gpus, shard, expert_parallel, local, checkpointing)
        report = plan_stage(shapes, model, train, stage, asked, gpu, **options)
        if not report["fits"]:
            fitting = suggest(shapes, model, train, stage, asked, gpu, text_tokens)
            report["suggestion"] = fitting and plan_stage(shapes, model, train, stage, fitting, gpu, **options)
        stages.append(report)
    notes = [NOTE]
    if model.routing.kind == "token_choice":
        notes.append(TOKEN_CHOICE_NOTE)
    if train.muon_implementation == "torchtitan":
        notes.append(DIST_MUON_NOTE)
    return {
        "note": " ".join(notes),
        "gpu": asdict(gpu),
        "gpus": gpus,
        "mfu": mfu,
        "dtype": train.dtype,
        "parameters": {"total": shapes.total, **shapes.trained, "frozen": shapes.frozen},
        # Bytes of tensors, without file headers. full: weights and optimiser state in fp32.
        "checkpoint_bytes": {
            "model_bf16": 2 * shapes.total,
            "model_fp32": FP32 * shapes.total,
            "full": FP32
            * (shapes.total + sum(o.state_tensors * shapes.trained[name] for name, o in OPTIMIZERS.items())),
        },
        "stages": stages,
        "days": sum(stage["days"] for stage in stages),
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages),
        "cost": None if cost_per_gpu_hour is None else sum(stage["cost"] for stage in stages),
    }


def _moe_layers(config: TransformerConfig) -> list[int]:
    return [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]


def _stage_model(model: TransformerConfig, stage: StageConfig) -> tuple[TransformerConfig, int]:
    """(the model with the stage's capacity factors, image tokens of the square bucket)."""
    tile = VAE_SCALE * model.patch_size
    if stage.image_size_px % tile:
        raise ValueError(f"{stage.name}: image_size_px={stage.image_size_px} must be a multiple of {tile}")
    config = _validated(lambda: model.with_capacity_factors(stage.capacity_factors), stage.name)
    return _planned_routing(config), (stage.image_size_px // tile) ** 2


def _planned_routing(config: TransformerConfig) -> TransformerConfig:
    """Replaces token choice, whose rows per expert depend on the data, by expert choice with the same number of rows; see
    TOKEN_CHOICE_NOTE."""
    if config.routing.kind != "token_choice":
        return config
    limit, E = config.routing.expert_limit or 1.0, config.num_experts
    even = config.model_copy(update={"routing": RoutingConfig(coupled=config.routing.coupled)})
    return even.with_capacity_factors([min(limit * config.capacity_factor(i), E) for i in range(config.num_layers)])


def _validated(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (where, *first["loc"])))
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None


def load_sections(path: str | Path) -> tuple[TransformerConfig, TrainConfig]:
    """The `model` and `train` sections of a recipe file. Other sections are neither required nor checked.

    Raises:
        ValueError: no such file, not YAML, or a missing or wrong section (the message names the key).
    """
    data = read_recipe(path)
    if not {"model", "train"} <= data.keys():
        raise ValueError(f"{path} must have the sections model and train")
    return tuple(
        _validated(partial(section.model_validate, data[key]), key)
        for key, section in (("model", TransformerConfig), ("train", TrainConfig))
    )


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0, or 2 with one line on stderr if the recipe or the layout is wrong."""
    parser = argparse.ArgumentParser(prog="python -m model.plan", description=f"Plan a recipe's training. {NOTE}")
    parser.add_argument("recipe", help="path of a recipe file, such as recipes/nucleus_17b.yaml")
    add = parser.add_argument
    add("--gpus", type=int, help="default: the recipe's nnodes x nproc_per_node")
    add("--gpu", choices=sorted(GPUS), default="h100")
    add("--shard", type=int, help="ranks that share weights and state (default: all GPUs)")
    add("--expert-parallel", type=int, help="default: the recipe's")
    add("--micro-batch", type=int, help="samples per GPU and accumulation step (default: the recipe's)")
    add("--checkpointing", choices=CHECKPOINTING, help="default: the recipe's")
    add("--mfu", type=float, default=0.35, help="assumed share of the peak FLOP/s (model FLOPs utilisation)")
    add("--cost-per-gpu-hour", type=float)
    add(
        "--network-gbps",
        type=float,
        help="each GPU's bandwidth to other nodes (default: see the first line of the plan)",
    )
    add("--text-tokens", type=int, default=TEXT_TOKENS, help="padded text length of a batch, chat template included")
    for name, value in asdict(Corpus()).items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=type(value), default=value, help=f"property of the corpus (default: {value:,})")
    add("--json", action="store_true")
    options = vars(parser.parse_args(arguments))
    as_json, path, gpu = options.pop("json"), options.pop("recipe"), GPUS[options.pop("gpu")]
    try:
        if (gbps := options.pop("network_gbps")) is not None:
            if not 0 < gbps < math.inf:
                raise ValueError(f"network_gbps={gbps} must be above 0")
            gpu = replace(gpu, network=gbps * 1e9 / 8)
        corpus = Corpus(**{name: options.pop(name) for name in asdict(Corpus())})
        model, train = load_sections(path)
        result = plan(model, train, gpu, **options)
        result["data"] = data_costs(
            train.stages,
            corpus,
            gpu_flops=gpu.flops,
            training_days=result["days"],
            gpus=result["gpus"],
            text_width=model.joint_attention_dim,
            prices=Prices() if options["cost_per_gpu_hour"] is None else Prices(gpu_hour=options["cost_per_gpu_hour"]),
        )
        chosen = (read_recipe(path).get("encoding") or {}).get("text")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join([render(result), "", *data_costs_text(result["data"], result["stages"], chosen)])
    print(json.dumps(result, indent=2) if as_json else text)
    return 0
