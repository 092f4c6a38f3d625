"""Sample grids while a stage trains: always the same prompts and noise, so that learning shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.planning.sections import TrainStage

STEPS, GUIDANCE, IMAGES_PER_PROMPT, SEED = 20, 4.0, 4, 0


def sampler(components: Path, latents: Path, stage: TrainStage) -> Callable[[Any, int, Path], None] | None:
    """`f(model, step, path)` that writes a PNG of one row per prompt of `train.sample_prompts`; None if there are none.

    Prompts are cut where the captions of `latents` were. The VAE and the text encoder are loaded at the first grid, and only the embeddings of the prompts are kept.
    """
    prompts = list(stage.train.sample_prompts)
    if not prompts or not stage.train.sample_every_steps:
        return None
    cache: dict[str, Any] = {}

    def write(model: Any, step: int, path: Path) -> None:
        import torch
        from PIL import Image

        from model.flow import unpack_latents
        from model.sampler import sample_latents

        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        if not cache:
            cache.update(_load(components, latents, prompts))
        vae, device = cache["vae"], next(model.parameters()).device
        side = stage.stage.image_size_px // cache["scale"] // stage.model.patch_size
        number = len(prompts) * IMAGES_PER_PROMPT
        noise = torch.randn(number, side * side, stage.model.in_channels, generator=torch.Generator().manual_seed(SEED))
        text, mask, negative, negative_mask = (
            None if tensor is None else tensor.to(device)
            for tensor in (cache["text"], cache["mask"], cache["negative"], cache["negative_mask"])
        )
        was_training = model.training
        model.eval()
        tokens = sample_latents(
            model, text, mask, negative, negative_mask, noise.to(device), (1, side, side), STEPS, GUIDANCE
        )
        model.train(was_training)
        unpacked = unpack_latents(tokens, side, side, stage.model.patch_size).cpu()
        with torch.no_grad():
            images = vae.decode((unpacked * cache["std"] + cache["mean"])[:, :, None], return_dict=False)[0][:, :, 0]
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        height, width = pixels.shape[1:3]
        grid = Image.new("RGB", (width * IMAGES_PER_PROMPT, height * len(prompts)))
        for i, image in enumerate(pixels):
            grid.paste(Image.fromarray(image), (i % IMAGES_PER_PROMPT * width, i // IMAGES_PER_PROMPT * height))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)

    return write


def _load(components: Path, latents: Path, prompts: list[str]) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKLQwenImage

    from tasks.encoding.chat import encode_text, load_processor, load_text_encoder
    from tasks.encoding.encode import text_settings

    max_tokens = text_settings(latents)["max_text_tokens"]
    vae = AutoencoderKLQwenImage.from_pretrained(components / "vae").eval()
    encoder = load_text_encoder(components / "text_encoder")
    processor = load_processor(components / "processor")
    with torch.no_grad():
        text, mask = encode_text(encoder, processor, prompts, max_tokens)
        negative, negative_mask = encode_text(encoder, processor, [""], max_tokens)

    def repeat(tensor: Any) -> Any:
        return None if tensor is None else tensor.repeat_interleave(IMAGES_PER_PROMPT, dim=0)

    shape = (1, vae.config.z_dim, 1, 1)
    return {
        "vae": vae,
        "scale": 2 ** len(vae.config.temperal_downsample),
        "mean": torch.tensor(vae.config.latents_mean).view(shape),
        "std": torch.tensor(vae.config.latents_std).view(shape),
        "text": repeat(text),
        "mask": repeat(mask),
        "negative": negative,
        "negative_mask": negative_mask,
    }
