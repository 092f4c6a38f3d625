"""Rectified flow: timesteps, the path from clean to noise, the velocity, and the packing of latents.

Shape suffixes: B batch, C latent channels, S tokens.
"""

from __future__ import annotations

import torch

from model.config import TimestepConfig


def timestep_shift(num_tokens: int, config: TimestepConfig = TimestepConfig()) -> float:
    """mu, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096, extrapolated beyond both.

    Source: the paper; diffusers' `calculate_shift` is the same function.
    """
    slope = (config.max_shift - config.base_shift) / (config.max_tokens - config.base_tokens)
    return config.base_shift + slope * (num_tokens - config.base_tokens)


def sample_timesteps(
    batch: int,
    num_tokens: int,
    generator: torch.Generator | None = None,
    config: TimestepConfig = TimestepConfig(),
) -> torch.Tensor:
    """Timesteps [B] in (0, 1), fp32, 1 is noise; on the generator's device.

    Logit-normal, t = sigmoid(mu + n) with n ~ N(0, 1): the same as FlowMatch's dynamic shift
    e^mu / (e^mu + 1/t - 1) of a plain logit-normal t. A share `uniform_fraction` is uniform instead. Each sample always
    uses three draws, so that one sample's draws do not shift another's.
    """
    device = generator.device if generator is not None else None
    normal = torch.randn(batch, generator=generator, device=device)
    uniform, choice = torch.rand(2, batch, generator=generator, device=device)
    timesteps = torch.sigmoid(timestep_shift(num_tokens, config) + normal)
    return torch.where(choice < config.uniform_fraction, uniform, timesteps)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(1 - t) clean + t noise, with `t` [B] for tensors [B, ...]."""
    t = t.to(clean.dtype).view(-1, *[1] * (clean.dim() - 1))
    return (1 - t) * clean + t * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target of the released model: clean - noise (diffusers' pipeline negates it for the scheduler)."""
    return clean - noise


def predict_clean(noisy: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The clean latent for a velocity: x_t + t (clean - noise), with `t` [B]."""
    return noisy + t.to(noisy.dtype).view(-1, *[1] * (noisy.dim() - 1)) * velocity


def pack_latents(latents: torch.Tensor, patch_size: int = 2) -> torch.Tensor:
    """[B, C, h, w] -> tokens [B, h/p w/p, C p p], a token's channels in (channel, row, column) order.

    The order of diffusers' `NucleusMoEImagePipeline._pack_latents`.

    Raises:
        ValueError: a side is not a multiple of the patch size.
    """
    batch, channels, height, width = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"latents of {height} x {width} do not divide into patches of {patch_size} x {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    split = latents.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpack_latents(tokens: torch.Tensor, rows: int, columns: int, patch_size: int = 2) -> torch.Tensor:
    """The inverse of `pack_latents`: [B, S, C p p] -> [B, C, rows p, columns p]; `rows` and `columns` count patches.

    Raises:
        ValueError: rows x columns is not the number of tokens.
    """
    batch, num_tokens, size = tokens.shape
    if rows * columns != num_tokens:
        raise ValueError(f"{rows} x {columns} patches are not {num_tokens} tokens")
    split = tokens.reshape(batch, rows, columns, size // patch_size**2, patch_size, patch_size)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch_size, columns * patch_size)
