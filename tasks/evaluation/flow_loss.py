"""Measures the held-out flow loss: the squared error of the predicted velocity of real images, by timestep.

    real image --VAE--> clean latent --with noise at t--> transformer(caption) --> velocity, against clean - noise

Only for pipelines of this project's class: others predict something else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.flow_loss import FILE, TIMESTEPS
from eval.config import EvalConfig
from eval.files import replacing
from eval.generation.generate import image_seed, plan_batches
from eval.judging.images import open_png

PIPELINE = "NucleusMoEImagePipeline"


def measure(
    pipeline: Any,
    prompts: Sequence[dict[str, Any]],
    config: EvalConfig,
    images_dir: Path,
    references: Path,
    shard: int = 0,
    shards: int = 1,
) -> int:
    """Writes `FILE` next to the images of each prompt of a shard; existing files are kept. Returns the number written.

    Args:
        references: the folder that the prompts' "reference" files are relative to.
    """
    if type(pipeline).__name__ != PIPELINE:
        return 0
    written = 0
    for batch in plan_batches(prompts, config, images_dir)[shard::shards]:
        for index, prompt in batch.prompts:
            path = images_dir / f"seed{batch.seed}" / f"{index:05d}" / FILE
            if path.is_file():
                continue
            losses = flow_losses(
                pipeline,
                references / prompt["reference"]["file"],
                prompt["prompt"],
                image_seed("flow loss", prompt["id"], 0, batch.seed),
            )
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(losses) + "\n", encoding="utf-8")
            written += 1
    return written


def flow_losses(pipeline: Any, image_path: Path, caption: str, seed: int) -> dict[str, float]:
    """{timestep: loss} of one image: one noise for all timesteps, in one batch.

    Args:
        seed: of the noise.
    """
    import numpy as np
    import torch

    from model.flow import interpolate, pack_latents, velocity_target
    from tasks.encoding.vae_codec import to_tensor

    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    vae, patch = pipeline.vae, pipeline.transformer.config.patch_size
    with torch.inference_mode():
        pixels = to_tensor(np.array(open_png(image_path).convert("RGB"))[None]).to(vae.device, vae.dtype)
        latent = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0].float()
        center = torch.tensor(vae.config.latents_mean, device=latent.device).view(1, -1, 1, 1)
        deviation = torch.tensor(vae.config.latents_std, device=latent.device).view(1, -1, 1, 1)
        clean = pack_latents((latent - center) / deviation, patch).to(device)
        noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device)
        count = len(TIMESTEPS)
        t = torch.tensor(TIMESTEPS, device=device)
        clean, noise = clean.expand(count, -1, -1), noise.expand(count, -1, -1)
        embeds, mask = pipeline.encode_prompt(prompt=[caption] * count, device=device)
        rows, columns = (side // patch for side in latent.shape[-2:])
        if getattr(pipeline.transformer, "is_cache_enabled", False):
            pipeline.transformer._reset_stateful_cache()
        velocity = pipeline.transformer(
            hidden_states=interpolate(clean, noise, t).to(dtype),
            timestep=t.to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[(1, rows, columns)] * count,
            return_dict=False,
        )[0]
        errors = (velocity.float() - velocity_target(clean, noise)).square().mean(dim=(1, 2))
    return {str(timestep): round(float(error), 6) for timestep, error in zip(TIMESTEPS, errors, strict=True)}
