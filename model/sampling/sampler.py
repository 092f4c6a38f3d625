"""Sampling: the Euler loop of diffusers' NucleusMoEImagePipeline, with one batched forward per step.

noise [B,S,64], text [B,T,J], negative text --> text K, V once --> steps x (forward 2B, guidance, Euler)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.layers.rope import ImageShape
from model.transformer import NucleusTransformer


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The noise levels of the released scheduler (no dynamic shifting): linear from 1 to 1/steps, then 0, each s mapped to
    shift s / (1 + (shift - 1) s). A shift above 1 spends more steps near pure noise.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    linear = (1.0 - i / steps for i in range(steps))
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in linear] + [0.0]


def guide(conditional: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance, with each token rescaled to the norm of the conditional prediction, as in diffusers."""
    combined = negative + guidance * (conditional - negative)
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def _pad(text: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = tokens - text.shape[1]
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return F.pad(text, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing), value=False)


@torch.no_grad()
def sample_latents(
    model: NucleusTransformer,
    text: torch.Tensor,
    text_mask: torch.Tensor | None,
    negative: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
    latents: torch.Tensor,
    img_shape: ImageShape,
    steps: int,
    guidance: float,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    shift: float = 1.0,
    step_noise: torch.Generator | None = None,
) -> torch.Tensor:
    """Normalised packed latents [B, S, 64] from the noise `latents`.

    Args:
        text, negative: embeddings [B, T, J] and [B, T', J] (or [1, T', J]) as the pipeline passes them; the
            shorter is padded and masked. `negative` is unused, and may be None, with guidance <= 1.
        text_mask, negative_mask: [B, T], true for real tokens; None if all are real.
        img_shape: (1, rows, columns) in patches.
        on_step: called after each step with its number (from 0) and the latents.
        shift: shift of the scheduler (`sigmas`).
        step_noise: a CPU generator for stochastic sampling, the scheduler's `stochastic_sampling`: each step predicts
            clean latents and mixes them with fresh noise. None: deterministic.

    Equals the pipeline's `output_type="latent"` for the same inputs, up to rounding.

    Raises:
        ValueError: steps < 1, or guidance without negative text.
    """
    schedule = sigmas(steps, shift)
    guided = guidance > 1
    batch = latents.shape[0]
    if guided:
        if negative is None:
            raise ValueError(f"guidance={guidance} needs negative text (the empty prompt's embedding)")
        tokens = max(text.shape[1], negative.shape[1])
        text, text_mask = _pad(text, text_mask, tokens)
        negative, negative_mask = _pad(negative, negative_mask, tokens)
        text = torch.cat((text, negative.expand(batch, -1, -1)))
        text_mask = torch.cat((text_mask, negative_mask.expand(batch, -1)))
    if text_mask is not None and bool(text_mask.all()):
        text_mask = None
    text_kv = model.text_kv(text, img_shape)
    was_training = model.training
    model.eval()
    for i, (sigma, following) in enumerate(zip(schedule, schedule[1:])):
        doubled = torch.cat((latents, latents)) if guided else latents
        prediction = model(
            hidden_states=doubled,
            img_shapes=img_shape,
            encoder_hidden_states_mask=text_mask,
            timestep=torch.full((doubled.shape[0],), sigma, dtype=latents.dtype, device=latents.device),
            text_kv=text_kv,
        )
        if guided:
            prediction = guide(*prediction.chunk(2), guidance)
        # The model predicts clean minus noise, and sigma falls from noise to clean. In fp32, like the scheduler's step.
        if step_noise is None:
            latents = (latents.float() + (sigma - following) * prediction.float()).to(latents.dtype)
        else:
            clean = latents.float() + sigma * prediction.float()
            noise = torch.randn(clean.shape, generator=step_noise).to(clean)
            latents = ((1.0 - following) * clean + following * noise).to(latents.dtype)
        if on_step is not None:
            on_step(i, latents)
    model.train(was_training)
    return latents
