"""Activation memory of one block, and of the rest of the model, in a training step: bytes, from shapes alone.

The model's own forward, loss and backward run on fake tensors (shapes and types without memory), with one block and
with none. A dispatch mode tracks every storage from its allocation until it is freed.

The code path is the eager one of an accelerator: fused attention, no CPU functions, plain functions in place of Triton
kernels. torch.compile and the kernels save less. Memory inside an operation (cuBLAS workspaces, NCCL) and fragmentation
are not included.

Shape suffixes: B batch, S image tokens, T text tokens, C channels of a token, D width, E experts.
The reasons are in docs/decisions/planner.md.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import losses
from model.config import LossConfig, TransformerConfig
from model.layers.moe import local_part
from model.optim import Muon, parameter_groups
from model.transformer import NucleusTransformer, RouterTrace


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that operations allocated, and their peak since the last `mark`."""

    def __init__(self, known: Iterator[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no address is reused
        self._known_ids = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def mark(self) -> tuple[int, int]:
        """(bytes now, peak since the last mark)."""
        peak, self.peak = self.peak, self.live
        return self.live, peak

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._known_ids:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class BlockBytes(NamedTuple):
    """Bytes that one block adds to the memory already in use."""

    entered: int  # after its forward, while autocast still caches its copies of weights
    kept: int  # saved by its forward for its backward
    forward_peak: int
    backward_peak: int  # includes `kept`
    gradients: int  # of its weights, if its backward allocates them
    left: int  # after its backward, without gradients: the router trace that the loss reads


class EndBytes(NamedTuple):
    """Bytes of everything outside of blocks: inputs, embeddings, output and loss."""

    before: int  # when the first block starts
    tail_peak: int  # from the last block's forward to its backward
    during: int  # when the last block's backward starts
    after: int  # when the first block's backward has ended
    head_peak: int  # from then to the end
    gradients: int  # of the weights outside of blocks, if the backward allocates them


@dataclass(frozen=True)
class Step:
    """One forward and backward of a micro-batch.

    `sharded`: FSDP casts weights and frees their unsharded gradients; otherwise autocast casts. `accumulate`: gradients
    exist already and are added to.
    """

    batch: int
    tokens: int
    text_tokens: int
    dtype: torch.dtype
    checkpointing: str
    sharded: bool = False
    accumulate: bool = False
    masked: bool = True  # whether a batch has texts of different lengths
    losses: LossConfig = LossConfig(router_z_loss=1.0, wavelet=1.0)
    guided: bool = False  # trains guidance in; the forward without text saves nothing, so its blocks are left out
    weaker_model: bool = False  # whose weights are kept besides, for autoguidance


@functools.lru_cache(maxsize=256)
def end_bytes(config: TransformerConfig, step: Step) -> EndBytes:
    marks = _run(_with_one_block(config, 0), step, blocks=False)
    return EndBytes(
        before=marks["enter"][0],
        tail_peak=marks["leave"][1],
        during=marks["leave"][0],
        after=marks["return"][0],
        head_peak=marks["end"][1],
        gradients=marks["gradients"][0],
    )


def block_bytes(config: TransformerConfig, layer: int, step: Step) -> BlockBytes:
    """Bytes of block `layer`: a step of a model with only this block, minus a step of one without blocks."""
    return _block_bytes(_with_one_block(config, layer), step)


@functools.lru_cache(maxsize=256)
def _block_bytes(config: TransformerConfig, step: Step) -> BlockBytes:
    ends, marks = end_bytes(config, step), _run(config, step, blocks=True)
    gradients = marks["gradients"][0] - ends.gradients
    return BlockBytes(
        entered=marks["exit"][0] - ends.before,
        kept=marks["leave"][0] - ends.during,
        forward_peak=marks["exit"][1] - ends.before,
        backward_peak=marks["return"][1] - ends.during,
        gradients=gradients,
        left=marks["return"][0] - ends.after - gradients,
    )


def _with_one_block(config: TransformerConfig, layer: int) -> TransformerConfig:
    """A model whose only block is like block `layer` of `config`."""
    strategy = "all_moe" if config.is_moe_layer(layer) else "all_dense"
    values = {"num_layers": 1, "dense_moe_strategy": strategy, "capacity_factors": config.capacity_factor(layer)}
    return TransformerConfig(**{**config.model_dump(), **values})


class _Marker(nn.Module):
    """An identity block that calls `forward` in the forward pass and `backward` in the backward pass."""

    def __init__(self, forward: Callable[[], None], backward: Callable[[], None]):
        super().__init__()
        self.calls = forward, backward

    def forward(self, x_BSD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        return _Mark.apply(x_BSD, *self.calls), None


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_call = backward
        forward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.backward_call()
        return gradient, None, None


def _run(config: TransformerConfig, step: Step, blocks: bool) -> dict[str, tuple[int, int]]:
    """(bytes, peak since the previous mark) by mark. Inputs count, weights do not.

    enter, exit: before and after the block's forward. leave, return: before and after its backward. end: after the
    step. gradients: bytes of the gradients that the step allocated.
    """
    marks: dict[str, tuple[int, int]] = {}
    with FakeTensorMode():
        model = NucleusTransformer(config)
        if step.sharded:
            _cast_as_fsdp(model, step.dtype)
        if step.checkpointing != "none":
            from model.train.activation import activation_config  # imports torchtitan

            activation_config(step.checkpointing).build().apply(model)
        known = list(model.parameters())
        if step.accumulate:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                known.append(parameter.grad)
        live = LiveBytes(known)

        def at(name: str) -> Callable[[], None]:
            return lambda: marks.update({name: live.mark()})

        inside = model.transformer_blocks if blocks else ()
        model.transformer_blocks = nn.ModuleList(
            [_Marker(at("enter"), at("return")), *inside, _Marker(at("exit"), at("leave"))]
        )
        with live:
            kept = _train(model, config, step)
            marks["end"] = live.mark()
            del kept
        new = 0 if step.accumulate else sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        marks["gradients"] = new, new
    return marks


def _cast_as_fsdp(model: NucleusTransformer, dtype: torch.dtype) -> None:
    """Casts weights to the types in which `model.train.parallel.parallelize` gathers them: `dtype`, and fp32 for routers."""
    routers = [block.img_mlp.gate for block in model.transformer_blocks if block.moe_enabled]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A new parameter: `Module.to` cannot change fake ones in place.
            cast = parameter.detach().to(torch.float32 if module in routers else dtype)
            setattr(module, name, nn.Parameter(cast, requires_grad=parameter.requires_grad))


def _train(model: NucleusTransformer, config: TransformerConfig, step: Step) -> Any:
    """The work of `NucleusTrainer.forward_backward_step` on zeros. Returns the tensors that the trainer keeps alive until
    the end of the step."""
    B, S, T, patch = step.batch, step.tokens, step.text_tokens, config.patch_size
    rows = math.isqrt(S)
    while S % rows:
        rows -= 1
    columns = S // rows
    channels = config.in_channels // patch**2
    latents, noise = (torch.zeros(B, channels, rows * patch, columns * patch) for _ in range(2))
    text, t_B = torch.zeros(B, T, config.joint_attention_dim), torch.zeros(B)
    mask = torch.ones(B, T, dtype=torch.bool) if step.masked else None
    example = losses.noised(latents, noise, t_B, patch)
    trace = RouterTrace()
    cast = step.dtype if step.sharded else torch.float32
    autocast = torch.autocast("cpu", step.dtype) if step.dtype != cast else contextlib.nullcontext()
    with autocast:
        velocity_BSC = model(
            example.noisy_BSC.to(cast), (1, rows, columns), text.to(cast), mask, t_B.to(cast), collect=trace
        )
    velocity_BSC = velocity_BSC.float()
    if step.guided:
        example.guidance_BSC = losses.guidance(velocity_BSC, [(torch.zeros_like(velocity_BSC), 2.0)])
    total, mean, loss_B, _kept = losses.objective(example, velocity_BSC, trace, step.losses)
    del mean  # 4 bytes
    total.backward()
    return trace, velocity_BSC, loss_B


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def muon_workspace(
    config: TransformerConfig, ns_steps: int, device: str, shard: int = 1, expert_parallel: int = 1
) -> int:
    """Bytes of temporary tensors in Muon's step on the first of `shard` ranks: updates, matrices sent to their owners and
    back, and Newton-Schulz. `device` is "cpu" (fp32), or "meta" for an accelerator (bf16)."""
    with contextlib.ExitStack() as stack:
        if shard == 1:
            optimizer_class = Muon
            with torch.device("meta"):
                model = NucleusTransformer(config)
        else:
            from model.train.parallel.fake_ranks import first_rank_of  # imports torchtitan
            from model.train.parallel.sharded_muon import ShardedMuon

            optimizer_class = ShardedMuon
            model = stack.enter_context(first_rank_of(shard, expert_parallel, config))
        if device == "cpu":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # the layout is known from meta tensors
        named = [(name, nn.Parameter(_like(p, device))) for name, p in parameter_groups(model)["muon"]]
        muon = optimizer_class(named, ns_steps=ns_steps)
        known = []
        for _, parameter in named:
            parameter.grad, buffer = _like(parameter, device), _like(parameter, device)
            muon.state[parameter]["momentum_buffer"] = buffer
            known += [local_part(parameter), local_part(parameter.grad), local_part(buffer)]
        with LiveBytes(known) as live:
            muon.step()
            return live.mark()[1]


def _like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """An empty tensor with the shape and sharding of `tensor`, on another device."""
    local = torch.empty(local_part(tensor).shape, device=device)
    if not isinstance(tensor, DTensor):
        return local
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
