"""A small `AutoencoderKLQwenImage`, trained on the curated corpus in a few minutes on a laptop.

Measured on 2 CPU cores, these make it fast: 2-D convolutions for still frames (`vae_codec.FrameCodec`), Muon for the inner
kernels (AdamW was 4 dB worse after equal time), a larger initial scale of the kernels, and most steps on halved or cropped
images. A KL term and latents sampled from the posterior keep the latent space smooth, so that small errors of a diffusion
model decode to small errors. The reasons are in docs/decisions/tiny.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.logs import get_logger
from tasks.encoding.buckets import Bucket
from tasks.encoding.config import TinyVAEConfig
from tasks.encoding.vae_codec import FrameCodec, to_tensor

logger = get_logger(__name__)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage

# Views of a batch: (share of steps, scale, crop instead of resize). Smaller views are cheaper, allow more images per batch,
# and train the lower resolutions of earlier stages.
VIEWS = ((0.25, 0.5, True), (0.30, 0.5, False), (0.20, 0.75, False), (0.25, 1.0, False))
KERNEL_GAIN = 1.7  # about sqrt(3); PyTorch's default scale is too small for a deep convolutional network
FIRST_LOGVAR = -4.0  # initial log-variance of the posterior: almost no noise
WARMUP_STEPS = 20


def build_vae(config: TinyVAEConfig, seed: int) -> AutoencoderKLQwenImage:
    """An untrained VAE; its weights are a function of the seed."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLQwenImage(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=[False, True, True],  # the pipeline computes the scale as 2 ** len
            latents_mean=[0.0] * config.z_dim,
            latents_std=[1.0] * config.z_dim,
        )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.weight.mul_(KERNEL_GAIN)
        vae.quant_conv.bias[config.z_dim :] += FIRST_LOGVAR
    return vae


def train_vae(
    images: dict[Bucket, np.ndarray], config: TinyVAEConfig, seed: int = 0, state_path: Path | None = None
) -> AutoencoderKLQwenImage:
    """Trains on uint8 images [n, H, W, 3] of each bucket, and stores the latents' mean and deviation in the config.

    The same seed, images and number of threads give the same weights, also if a killed attempt resumes from `state_path`.
    """
    import torch

    from model.optim import Muon
    from tasks.encoding.small.training_state import TrainingState

    vae = build_vae(config, seed)
    codec = FrameCodec(vae)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    matrices, others = codec.matrices(), codec.others()
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    flat = [p.detach().view(len(p), -1) for p in matrices]  # views [out, in * k * k]
    muon = Muon(flat, lr=config.muon_lr)

    state = TrainingState(state_path, [*matrices, *others], (adamw, muon), generator, rng)
    done, _ = state.load()

    started = time.monotonic()
    for step in range(done, config.steps):
        batch = _batch(images, config, rng)
        mean, logvar = codec.encode(batch)
        noise = torch.randn(mean.shape, generator=generator)
        out = codec.decode(mean + torch.exp(0.5 * logvar) * noise)
        distortion = (out - batch).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()  # nats per latent number
        rise = min(1.0, step / (0.3 * config.steps))  # the full KL weight from the start would collapse the posterior
        for parameter in (*matrices, *others):
            parameter.grad = None
        (distortion + config.kl_weight * rise * kl).backward()
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 2.0 * (1.0 - step / config.steps))
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for matrix, kernel in zip(flat, matrices, strict=True):
            matrix.grad = kernel.grad.reshape(matrix.shape)
        adamw.param_groups[0]["lr"] = config.lr * scale
        muon.param_groups[0]["lr"] = config.muon_lr * scale
        adamw.step()
        muon.step()
        if (step + 1) % max(1, config.steps // 20) == 0:
            psnr = -10.0 * float(torch.log10(distortion.detach() / 4.0))
            logger.info(
                f"vae {step + 1}/{config.steps} steps, {time.monotonic() - started:.0f} s: "
                f"{psnr:.1f} dB on the batch, KL {float(kl.detach()):.2f} nats per number"
            )
        state.save(step + 1, {}, last=step + 1 == config.steps)
    codec.write_back()
    vae.requires_grad_(False).eval()
    _store_statistics(codec, images, config)
    return vae


def _batch(images: dict[Bucket, np.ndarray], config: TinyVAEConfig, rng: np.random.Generator) -> torch.Tensor:
    """A random view of images of one bucket, float32 [B, 3, h, w]. Smaller views have more images."""
    from torch.nn.functional import interpolate

    names = sorted(images)
    counts = np.array([len(images[name]) for name in names], dtype=float)
    pixels = images[names[rng.choice(len(names), p=counts / counts.sum())]]
    _, scale, crop = VIEWS[rng.choice(len(VIEWS), p=[view[0] for view in VIEWS])]
    chosen = pixels[rng.integers(len(pixels), size=round(config.batch_size / scale))]
    height, width = (max(8, round(side * scale / 8) * 8) for side in pixels.shape[1:3])
    if crop:
        top = rng.integers(pixels.shape[1] - height + 1)
        left = rng.integers(pixels.shape[2] - width + 1)
        chosen = chosen[:, top : top + height, left : left + width]
    batch = to_tensor(np.ascontiguousarray(chosen))
    if batch.shape[2:] != (height, width):
        batch = interpolate(batch, size=(height, width), mode="bicubic", antialias=True).clamp_(-1.0, 1.0)
    return batch


def _store_statistics(codec: FrameCodec, images: dict[Bucket, np.ndarray], config: TinyVAEConfig) -> None:
    """Stores mean and deviation of each latent channel over full images in the VAE's configuration. Latents normalised by
    them have mean 0 and deviation `latent_std`.

    The deviation includes the posterior's variance. So an unused channel, whose means hardly vary, stays small after
    normalisation instead of being scaled to unit variance.
    """
    import torch

    sums, squares, count = torch.zeros(config.z_dim), torch.zeros(config.z_dim), 0
    with torch.no_grad():
        for pixels in images.values():
            for start in range(0, min(len(pixels), 1024), 64):
                mean, logvar = codec.encode(to_tensor(pixels[start : start + 64]))
                sums += mean.sum((0, 2, 3))
                squares += (mean.square() + logvar.exp()).sum((0, 2, 3))
                count += mean.numel() // config.z_dim
    center = sums / count
    deviation = (squares / count - center.square()).sqrt() / config.latent_std
    codec.vae.register_to_config(latents_mean=center.tolist(), latents_std=deviation.tolist())
