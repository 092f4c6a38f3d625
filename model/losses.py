"""Losses: flow matching; of routers z-loss, load balance and orthogonality; the wavelet loss on the clean latent.

Shape suffixes: B batch, S tokens, E experts, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from model.moe import MoE, Routing, local_part


def flow_matching_loss(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error, the same of each sample [B] without graph), in fp32; the first is the second's mean.

    The values of each sample let a trainer report the loss by timestep.
    """
    per_sample = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return per_sample.mean(), per_sample.detach()


def router_z_loss(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2, summed over the layers' `logits` [B, S, E] (ST-MoE, eq. 5).

    The sum and not the mean over layers: each layer is then held as strongly in a deep model as in a shallow
    one. 0 for a model without routers.
    """
    losses = [layer.float().logsumexp(dim=-1).square().mean() for layer in logits]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def load_balance_loss(routings: Iterable[Routing]) -> torch.Tensor:
    """E sum_e f_e p_e, summed over layers: f_e the share of a sample's assignments that went to expert e, p_e its mean
    score over the sample's tokens; the mean over samples. 1 for each layer whose experts share the tokens evenly.

    The Switch Transformer's loss (arXiv 2101.03961, eq. 4) of each sample by itself, as DeepSeek-V3's (arXiv
    2412.19437, eq. 17), so that it does not depend on how a batch is cut into micro-batches. f_e has no gradient. For
    token choice: where experts choose, it is the constant 1. 0 for a model without routers.
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
    """One gradient step of size `strength` on `router_orthogonality`, direct on each router's weight.

    Beside the optimiser, as in the paper: Adam would scale so small a gradient up to a full step. The paper gives
    the strength (1e-7) and not the formula; this one asks for orthogonal directions and leaves each row's length
    alone to first order, so that it does not shrink the logits. Nothing here waits for the device.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            weight = local_part(module.gate.weight)
            norms = weight.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
            rows = weight.float() / norms
            gram = rows @ rows.mT
            gram.fill_diagonal_(0.0)
            pull = gram @ rows * 2
            # d/dw of the cosine keeps only what is at right angles to the row itself.
            pull = (pull - (pull * rows).sum(-1, keepdim=True) * rows) / norms
            weight.sub_((strength * pull).to(weight.dtype))


def haar_bands(x_BChw: torch.Tensor) -> torch.Tensor:
    """One-level orthonormal Haar sub-bands, [B, C, h, w] -> [B, C, 4, h/2, w/2], in the order LL, LH, HL, HH.

    LH is the detail from row to row, HL from column to column, as PyWavelets' (cA, (cH, cV, cD)).

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

    As the transform is orthonormal, the bands together weigh every error as the plain MSE of the clean latent
    does; relative to the velocity loss it adds weight t^2, that is to noisy timesteps (`flow.predict_clean`).
    """
    return (haar_bands(predicted_clean.float()) - haar_bands(clean.float())).square().mean()
