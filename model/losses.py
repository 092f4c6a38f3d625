"""Losses: flow matching; z-loss, load balance and orthogonality of routers; the wavelet loss on the clean latent.

    latents, noise, t --noised--> Example --model--> velocity --objective--> one scalar to differentiate
                                     ^
             model, empty prompt; weaker model --guidance (in the steps that train it in)

`objective` is the only place where losses are added up: the trainer differentiates it, and the planner traces the memory
of the same code. A loss with a weight in the recipe (`train.losses.NAME`) is a field of `LossConfig` and an entry of
`LOSSES` here.

Shape suffixes: B batch, S tokens, E experts, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from model import flow
from model.config import LossConfig
from model.layers.moe import MoE, Routing, local_part
from model.transformer import RouterTrace


@dataclass
class Example:
    """A micro-batch on the path from clean to noise: the model's input and its target.

    `guidance_BSC` is added to the target velocity.
    """

    clean_BSC: torch.Tensor
    noise_BSC: torch.Tensor
    noisy_BSC: torch.Tensor
    t_B: torch.Tensor
    rows: int  # patches
    columns: int
    patch_size: int
    guidance_BSC: torch.Tensor | None = field(default=None, kw_only=True)


@dataclass
class Output(Example):
    """An example and the model's output for it. `trace` is None if no loss of the step reads the routers."""

    velocity_BSC: torch.Tensor
    trace: RouterTrace | None

    @property
    def routers(self) -> RouterTrace:
        assert self.trace is not None, "the loss reads routers: see `needs_trace`"
        return self.trace

    @cached_property
    def target_BSC(self) -> torch.Tensor:
        target = flow.velocity_target(self.clean_BSC, self.noise_BSC)
        return target if self.guidance_BSC is None else target + self.guidance_BSC

    @cached_property
    def target_clean_BSC(self) -> torch.Tensor:
        if self.guidance_BSC is None:
            return self.clean_BSC
        return flow.predict_clean(self.noisy_BSC, self.target_BSC, self.t_B)

    @cached_property
    def predicted_clean_BSC(self) -> torch.Tensor:
        return flow.predict_clean(self.noisy_BSC, self.velocity_BSC, self.t_B)

    def unpack(self, tokens_BSC: torch.Tensor) -> torch.Tensor:
        return flow.unpack_latents(tokens_BSC, self.rows, self.columns, self.patch_size)


def noised(latents: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor, patch_size: int) -> Example:
    """The example of latents and noise [B, C, h, w] at the timesteps `t_B` (1 is noise)."""
    rows, columns = (side // patch_size for side in latents.shape[-2:])
    clean_BSC, noise_BSC = flow.pack_latents(latents, patch_size), flow.pack_latents(noise, patch_size)
    noisy_BSC = flow.interpolate(clean_BSC, noise_BSC, t_B)
    return Example(clean_BSC, noise_BSC, noisy_BSC, t_B, rows, columns, patch_size)


def guidance(velocity_BSC: torch.Tensor, away_from: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """The term that trained-in guidance adds to the target velocity (`Example.guidance_BSC`), without graph.

    Args:
        velocity_BSC: the model's prediction v, with text.
        away_from: predictions [B, S, C] and the scale of guidance away from each: u of the model without text, with
            the scale of classifier-free guidance, and q of a weaker model with text, with that of autoguidance.

    With the scales 1 + a and 1 + b the term is (a (v - u) + b (v - q)) / (1 + a + b). If the model would predict c for
    the plain target, the fixed point is v = c + a (c - u) + b (c - q): guidance in one forward pass. The idea is model
    guidance's (arXiv 2502.12154); that a weaker model is worth guiding away from is autoguidance's (arXiv 2406.02507).
    """
    weights = [scale - 1.0 for _, scale in away_from]
    v = velocity_BSC.detach()
    terms = [weight * (v - other.detach()) for (other, _), weight in zip(away_from, weights, strict=True)]
    return sum(terms, start=torch.zeros_like(v)) / (1.0 + sum(weights))


def objective(
    example: Example, velocity_BSC: torch.Tensor, trace: RouterTrace | None, weights: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Output]:
    """The loss of a micro-batch.

    Args:
        velocity_BSC: the model's output, in fp32.
        trace: of the forward pass; required if `needs_trace(weights)`.

    Returns:
        the sum to differentiate, flow matching alone, flow matching of each sample [B] without graph, and the tensors to
        keep until the backward pass ends.
    """
    output = Output(**vars(example), velocity_BSC=velocity_BSC, trace=trace)
    mean, loss_B = flow_matching_loss(velocity_BSC, output.target_BSC)
    total = mean
    for name, loss in LOSSES.items():
        if weight := getattr(weights, name):
            total = total + weight * loss(output)
    return total, mean, loss_B, output


def needs_trace(weights: LossConfig) -> bool:
    """Whether a loss that is on reads the routers' scores."""
    return any(getattr(weights, name) for name in READS_ROUTERS)


def apply_after_step(model: nn.Module, weights: LossConfig) -> None:
    """Applies the losses that change weights directly, after the optimiser step."""
    for name, apply in AFTER_STEP.items():
        if strength := getattr(weights, name):
            apply(model, strength)


def flow_matching_loss(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error, mean squared error of each sample [B] without graph), in fp32; the first is the mean of the
    second.

    The values of each sample let a trainer report the loss by timestep.
    """
    per_sample = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return per_sample.mean(), per_sample.detach()


def router_z_loss(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2, summed over the layers' `logits` [B, S, E] (ST-MoE, eq. 5).

    With a sum, not a mean, over layers, each layer is regularised as strongly in a deep model as in a shallow one. 0
    for a model without routers.
    """
    losses = [layer.float().logsumexp(dim=-1).square().mean() for layer in logits]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def load_balance_loss(routings: Iterable[Routing]) -> torch.Tensor:
    """E sum_e f_e p_e, summed over layers: f_e the share of a sample's assignments that went to expert e, p_e its mean
    score over the sample's tokens; the mean over samples. 1 for each layer whose experts share the tokens evenly.

    The Switch Transformer's loss (arXiv 2101.03961, eq. 4) of each sample separately, as DeepSeek-V3's (arXiv
    2412.19437, eq. 17), so that it does not depend on how a batch is split into micro-batches. f_e has no gradient. For
    token choice; with expert choice it is the constant 1. 0 for a model without routers.
    """
    losses = []
    for routing in routings:
        scores_BSE = routing.scores_BSE.float()
        taken_BE = routing.taken_BSE().float().sum(dim=1)
        f_BE = taken_BE / taken_BE.sum(dim=1, keepdim=True)
        p_BE = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=1)
        losses.append((f_BE * p_BE).sum(dim=1).mean() * f_BE.shape[1])
    return torch.stack(losses).sum() if losses else torch.zeros(())


def router_orthogonality(weight_ER: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of experts of the squared cosine between their rows of a router's weight [E, 2D]: a scalar."""
    rows = nn.functional.normalize(weight_ER.float(), dim=-1)
    gram = rows @ rows.mT
    return (gram.square().sum() - gram.diagonal().square().sum()) / 2


@torch.no_grad()
def apply_router_orthogonality(model: nn.Module, strength: float) -> None:
    """One gradient step of size `strength` on `router_orthogonality`, applied directly to each router's weight.

    It bypasses the optimiser, as in the paper: Adam would scale so small a gradient up to a full step. The paper gives
    the strength (1e-7) but no formula; this formula makes directions orthogonal and keeps each row's length to first
    order, so that it does not shrink the logits. The host does not wait for the device.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            weight = local_part(module.gate.weight)
            norms = weight.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            rows = weight.float() / norms
            gram = rows @ rows.mT
            gram.fill_diagonal_(0.0)
            pull = gram @ rows * 2
            # d/dw of the cosine is orthogonal to the row itself.
            pull = (pull - (pull * rows).sum(-1, keepdim=True) * rows) / norms
            weight.sub_((strength * pull).to(weight.dtype))


def haar_bands(x_BChw: torch.Tensor) -> torch.Tensor:
    """One-level orthonormal Haar sub-bands, [B, C, h, w] -> [B, C, 4, h/2, w/2], in the order LL, LH, HL, HH.

    LH has the differences between rows, HL those between columns, as PyWavelets' (cA, (cH, cV, cD)).

    Raises:
        ValueError: an odd height or width.
    """
    height, width = x_BChw.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"the Haar transform needs even sides, got {height} x {width}")
    top, bottom = x_BChw[..., 0::2, :], x_BChw[..., 1::2, :]
    low, high = top + bottom, top - bottom
    bands = [
        low[..., 0::2] + low[..., 1::2],
        high[..., 0::2] + high[..., 1::2],
        low[..., 0::2] - low[..., 1::2],
        high[..., 0::2] - high[..., 1::2],
    ]
    return torch.stack(bands, dim=-3) / 2


def wavelet_loss(predicted_clean: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Mean over the four sub-bands of the MSE between the Haar transforms of two latents [B, C, h, w], in fp32.

    As the transform is orthonormal, the four bands together equal the MSE of the clean latent; relative to the velocity
    loss this adds weight t^2, that is, to noisy timesteps (`flow.predict_clean`).
    """
    return (haar_bands(predicted_clean.float()) - haar_bands(clean.float())).square().mean()


# A loss is a function of the model's output; its weight is the field of this name in `LossConfig`.
LOSSES: dict[str, Callable[[Output], torch.Tensor]] = {
    "router_z_loss": lambda output: router_z_loss(output.routers.logits()),
    "load_balance": lambda output: load_balance_loss(output.routers.routings()),
    "wavelet": lambda output: wavelet_loss(
        output.unpack(output.predicted_clean_BSC), output.unpack(output.target_clean_BSC)
    ),
}
READS_ROUTERS = ("router_z_loss", "load_balance")  # those that need `Output.trace`
# Applied to the weights directly, without the optimiser's scaling.
AFTER_STEP: dict[str, Callable[[nn.Module, float], None]] = {"router_orthogonality": apply_router_orthogonality}
