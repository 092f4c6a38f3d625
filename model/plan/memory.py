"""Memory of a training step on one rank, by part, at each moment at which it can peak.

    forward of block i    state + ends + `entered` of earlier blocks + the block's own peak
    loss                  state + ends + `entered` of all blocks + the loss's own peak
    backward of block i   state + ends + `kept` of earlier blocks and of this one + its own peak + gradients so far
    sum over replicas     state + gradients + one all-reduce buffer for all gradients (without FSDP)
    optimiser step        state + gradients + the optimiser's workspace

Sizes of blocks and of the loss come from `model.plan.memory_trace`, parameter counts from the model on the meta device.
Buffers of FSDP2 and expert parallelism follow model/train/parallel/parallelize.py. benchmarks/memory.py compares the result with
measured peaks. Not included: memory outside of PyTorch's tensors (CUDA context, NCCL, cuBLAS workspaces), fragmentation.

A layout has `gpus` data-parallel ranks. Weights, gradients and optimiser state are sharded over `shard` of them and
replicated gpus / shard times. Expert-parallel ranks are a subset of the shard ranks, as in torchtitan: a rank computes
num_experts / expert_parallel experts of each layer, and shard / expert_parallel ranks shard the weights of those.

Source: ZeRO stage 3 (arXiv 1910.02054) for sharding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from model.config import StageConfig, TransformerConfig
from model.optim import OPTIMIZERS, parameter_groups, split_matrices
from model.plan.memory_trace import Step, block_bytes, end_bytes, muon_workspace
from model.ranks import remainder
from model.transformer import NucleusTransformer

FP32 = 4
EXPERTS = ".img_mlp.experts."  # in the names of routed experts
ROUTER = ".img_mlp.gate."  # in the names of routers; every rank stores a full copy


@dataclass(frozen=True)
class Layout:
    """Parallelism degrees of a stage. `checkpointing` is "none", "selective" or "full" (model/train/activation.py)."""

    gpus: int
    shard: int
    expert_parallel: int
    micro_batch: int  # samples per rank and accumulation step
    checkpointing: str

    def check(self, num_experts: int, stage: StageConfig) -> None:
        """Raises ValueError if a degree does not divide what it splits; the message shows the division."""
        for what, total, name, part in (
            ("GPUs", self.gpus, "shard", self.shard),
            ("shard ranks", self.shard, "expert_parallel", self.expert_parallel),
            ("num_experts", num_experts, "expert_parallel", self.expert_parallel),
            (f"{stage.name}: batch_size", stage.batch_size, "GPUs", self.gpus),
            (f"{stage.name}: samples per GPU and step", stage.batch_size // self.gpus, "micro_batch", self.micro_batch),
        ):
            if part < 1 or total < 1 or total % part:
                rest = remainder(total, part) if part > 0 else f"{name} is under 1"
                raise ValueError(f"{what} {total} must be a multiple of {name} {part}: {rest}")

    def __str__(self) -> str:
        degrees = f"shard {self.shard}, replicas {self.gpus // self.shard}, expert parallel {self.expert_parallel}"
        return f"{self.gpus} GPUs, {degrees}, micro-batch {self.micro_batch}, checkpointing {self.checkpointing}"


class Shapes:
    """Parameter counts of a configuration, from the real module on the meta device.

    `total`, `frozen`, `experts` (routed), `muon`, `adamw` and `trained` (a dict by optimiser) count parameters.
    `newton_schulz_flops` counts one iteration on every Muon matrix.
    """

    def __init__(self, config: TransformerConfig, matrices: str = "muon"):
        with torch.device("meta"):
            model = NucleusTransformer(config)
        groups = parameter_groups(model, matrices)
        self.layers = config.num_layers
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.group = {name: group for group, members in groups.items() for name, _ in members}
        self.total = sum(map(math.prod, self.shapes.values()))
        self.trained = {name: sum(p.numel() for _, p in named) for name, named in groups.items()}
        self.muon, self.adamw = self.trained["muon"], self.trained["adamw"]
        self.frozen = self.total - sum(self.trained.values())
        self.experts = sum(math.prod(shape) for name, shape in self.shapes.items() if EXPERTS in name)
        self.newton_schulz_flops = 0
        for name, parameter in groups["muon"]:
            packed, stacked = split_matrices(name, parameter)
            m, n = sorted(parameter.chunk(packed, dim=2 if stacked else 0)[0].shape[-2:])
            count = parameter.numel() // (m * n)
            self.newton_schulz_flops += count * (4 * m * m * n + 2 * m**3)  # see `newton_schulz`

    def per_gpu(self, layout: Layout, group: str | None = None, prefix: str = "") -> int:
        """Parameters that a rank stores, with FSDP2's padding.

        `group` selects the parameters of one optimiser (a name in OPTIMIZERS), `prefix` those whose name starts with it.
        """
        names = [n for n in self.shapes if n.startswith(prefix) and (group is None or self.group.get(n) == group)]
        return sum(_sharded(name, self.shapes[name], layout) for name in names)

    def trainable_per_gpu(self, layout: Layout, prefix: str = "") -> int:
        return sum(self.per_gpu(layout, group, prefix) for group in self.trained)

    def units(self, layout: Layout) -> tuple[int, list[tuple[int, int]]]:
        """Parameters that a rank gathers for each FSDP unit, without routers: (the unit outside of blocks, [(a block's
        dense unit, the unit of its local experts), ...])."""
        ends, blocks = 0, [[0, 0] for _ in range(self.layers)]
        for name, shape in self.shapes.items():
            if not name.startswith("transformer_blocks."):
                ends += math.prod(shape)
            elif EXPERTS in name:
                blocks[int(name.split(".")[1])][1] += math.prod(shape) // layout.expert_parallel
            elif ROUTER not in name:
                blocks[int(name.split(".")[1])][0] += math.prod(shape)
        return ends, [tuple(block) for block in blocks]


def _sharded(name: str, shape: tuple[int, ...], layout: Layout) -> int:
    """Elements of a parameter that a rank stores. FSDP2 pads rows; experts are sharded as in model.train.parallel.parallelize."""
    if ROUTER in name:
        return math.prod(shape)
    if EXPERTS not in name:
        return math.ceil(shape[0] / layout.shard) * math.prod(shape[1:])
    experts, degree = shape[0] // layout.expert_parallel, layout.shard // layout.expert_parallel
    if experts % degree == 0:
        return experts // degree * math.prod(shape[1:])
    return experts * math.ceil(shape[1] / degree) * shape[2]


class Moment(NamedTuple):
    """Bytes by part on one rank at one moment of a step. See `moments` for the parts."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def moments(
    shapes: Shapes, config: TransformerConfig, layout: Layout, step: Step, device: str = "meta", ns_steps: int = 5
) -> list[Moment]:
    """The moments of a training step at which memory can peak, in order.

    weights, optimizer_muon, optimizer_adamw: fp32; see `OPTIMIZERS` for the number of state tensors.
    weaker_model: the weights that autoguidance guides away from, fp32; only with `step.weaker_model`.
    gradients: fp32, complete ones.
    activations: tensors saved for the backward, inputs, and autocast's copies of weights.
    workspace: temporary tensors of the block, the loss, the sum over replicas or the optimiser.
    gathered_weights: FSDP units in the compute dtype: the unit outside of blocks, the current block's, its experts',
        and in the backward the prefetched unit of the next block.
    gathered_gradients: the fp32 copy of a unit's gradients during its reduce-scatter.
    all_to_all: rows sent and rows received by expert parallelism, E C B rows of width D each.

    Args:
        step: `batch`, `sharded` and `checkpointing` are taken from the layout. `accumulate`: a step has several
            micro-batches.
        device: "cpu", or "meta" for an optimiser that runs on an accelerator; see `muon_workspace`.
    """
    layers, sharded = range(config.num_layers), layout.shard > 1
    accumulate = step.accumulate
    # FSDP frees unsharded gradients after each micro-batch and accumulates only their shards.
    step = replace(
        step,
        batch=layout.micro_batch,
        checkpointing=layout.checkpointing,
        sharded=sharded,
        accumulate=accumulate and not sharded,
    )
    element = step.dtype.itemsize
    ends, blocks = end_bytes(config, step), [block_bytes(config, layer, step) for layer in layers]
    outside, units = shapes.units(layout)
    rows = [_row_bytes(config, layer, step) if layout.expert_parallel > 1 else 0 for layer in layers]
    # Selective checkpointing saves the outputs of both all-to-alls.
    kept_rows = [2 * row_bytes if step.checkpointing == "selective" else 0 for row_bytes in rows]
    all_gradients = FP32 * shapes.trainable_per_gpu(layout)
    state = {
        "weights": FP32 * shapes.per_gpu(layout),
    }
    if step.weaker_model:
        state["weaker_model"] = state["weights"]
    for name, optimizer in OPTIMIZERS.items():
        state[f"optimizer_{name}"] = optimizer.state_tensors * FP32 * shapes.per_gpu(layout, name)

    def gathered(*sizes: int) -> int:
        return element * sum(sizes, outside) if sharded else 0

    result = []
    saved = 0
    for i in layers:
        parts = {
            "gradients": all_gradients if accumulate else 0,
            "activations": ends.before + saved,
            "workspace": blocks[i].forward_peak,
            "gathered_weights": gathered(*units[i]),
            "all_to_all": 2 * rows[i],
        }
        result.append(Moment(f"forward of block {i}", state | parts))
        saved += blocks[i].entered + kept_rows[i]
    parts = {
        "gradients": all_gradients if accumulate else 0,
        "activations": ends.before + saved,
        "workspace": ends.tail_peak - ends.before,
        "gathered_weights": gathered(),
    }
    result.append(Moment("loss", state | parts))

    left = complete = 0
    kept = sum(block.kept for block in blocks) + sum(kept_rows)
    for i in reversed(layers):
        reduced = max(*units[i], units[min(i + 1, layers[-1])][0]) if sharded else 0
        parts = {
            "gradients": all_gradients if accumulate else complete,
            "activations": ends.during + kept + left,
            "workspace": blocks[i].backward_peak - blocks[i].kept,
            "gathered_weights": gathered(*units[i], units[i - 1][0] if i else 0),
            "gathered_gradients": FP32 * reduced,
            "all_to_all": 2 * rows[i],
        }
        result.append(Moment(f"backward of block {i}", state | parts))
        kept -= blocks[i].kept + kept_rows[i]
        left += blocks[i].left
        prefix = f"transformer_blocks.{i}."
        complete += FP32 * shapes.trainable_per_gpu(layout, prefix) if sharded else blocks[i].gradients
    parts = {
        "gradients": all_gradients if accumulate else complete,
        "activations": left,
        "workspace": ends.head_peak,
        "gathered_weights": gathered(),
        "gathered_gradients": FP32 * outside if sharded else 0,
    }
    result.append(Moment("backward of the embeddings", state | parts))

    state["gradients"] = all_gradients
    if layout.gpus > 1 and not sharded:
        result.append(Moment("sum over replicas", state | {"workspace": all_gradients}))
    degrees = layout.shard, layout.expert_parallel
    workspace = muon_workspace(config, ns_steps, device, *degrees) if shapes.muon else 0
    result.append(Moment("optimiser step", state | {"workspace": workspace}))
    return result


def _row_bytes(config: TransformerConfig, layer: int, step: Step) -> int:
    """Bytes of the rows that the experts of block `layer` select from a micro-batch; 0 for a dense block."""
    if not config.is_moe_layer(layer):
        return 0
    rows = config.num_experts * config.capacity(layer, step.tokens) * step.batch
    return rows * config.width * step.dtype.itemsize
