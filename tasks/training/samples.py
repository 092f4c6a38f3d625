"""Sample grids during training, always with the same prompts and noise, so that steps can be compared.

    rank 0: prompts -> embeddings --broadcast--> every rank: noise -> latents --> rank 0: VAE -> one PNG

If ranks share weights or experts, a forward pass needs all ranks, each with the same number of rows. So all ranks
sample the same images; only rank 0 encodes the prompts and decodes the images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model import storage
from model.stages import TrainingStage

if TYPE_CHECKING:
    import torch

STEPS, GUIDANCE, IMAGES_PER_PROMPT, SEED = 20, 4.0, 4, 0
T = TypeVar("T")


def sampler(components: Path, max_text_tokens: int, stage: TrainingStage) -> Callable[[Any, int, Path], None] | None:
    """`f(model, step, path)` that writes a PNG of one row per prompt of `train.sample_prompts`; None if there are none.

    Every rank calls it, and gets an error if rank 0 fails. Prompts are cut at `max_text_tokens`. At the first grid rank
    0 loads the VAE, which stays on the host between grids, and the text encoder, of which only the prompts' embeddings
    are kept. Both run on the model's device, since the other ranks wait, and torch elastic's processes have a single
    CPU thread.
    """
    prompts = list(stage.train.sample_prompts)
    if not prompts or not stage.train.sample_every_steps:
        return None
    kept: dict[str, Any] = {}

    def load(device: torch.device) -> tuple[int, list[tuple[torch.Size, torch.dtype] | None]]:
        kept.update(_load(components, max_text_tokens, prompts, device))
        return kept["scale"], [None if text is None else (text.shape, text.dtype) for text in kept["texts"]]

    def write(model: Any, step: int, path: Path) -> None:
        import torch

        from model.sampling.sampler import sample_latents

        device = next(model.parameters()).device
        if "side" not in kept:
            scale, shapes = on_rank_0(lambda: load(device), device)
            kept["texts"] = [
                None if shape is None else _from_rank_0(text, *shape, device)
                for text, shape in zip(kept.get("texts") or [None] * len(shapes), shapes)
            ]
            kept["side"] = stage.stage.image_size_px // scale // stage.model.patch_size
        side, number = kept["side"], len(prompts) * IMAGES_PER_PROMPT
        noise = torch.randn(number, side * side, stage.model.in_channels, generator=torch.Generator().manual_seed(SEED))
        guidance = GUIDANCE if stage.guidance_at(step) is None else 1.0  # guidance is trained in
        tokens = sample_latents(model, *kept["texts"], noise.to(device), (1, side, side), STEPS, guidance)
        on_rank_0(lambda: _save(kept, tokens, stage.model.patch_size, path), device)

    return write


def on_rank_0(work: Callable[[], T], device: torch.device) -> T:
    """Runs `work()` on rank 0 and returns its result on every rank (pickled, so keep it small). The global random state
    is unchanged, and autocast is off: `work` computes on `device` in the dtypes of its tensors.

    Raises:
        Exception: on rank 0, the error of `work`.
        RuntimeError: on the other ranks, with its message, so that none waits for rank 0.
    """
    import torch
    import torch.distributed as dist

    result, error, message = None, None, None
    if not _several() or dist.get_rank() == 0:
        try:
            with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
                result = work()
        except Exception as raised:
            error, message = raised, f"{type(raised).__name__}: {raised}"
    if _several():
        answer = [result, message]
        dist.broadcast_object_list(answer)
        result, message = answer
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"rank 0 could not sample: {message}")
    return result


def _several() -> bool:
    """Whether there are other ranks. A single process must not start gloo's threads (see StageCheckpointer)."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def _from_rank_0(
    tensor: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Broadcasts rank 0's `tensor` to every rank's device; `tensor` is None on the other ranks."""
    import torch
    import torch.distributed as dist

    # A copy: the text encoder's output is an inference tensor, which cannot be written to.
    here = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device, copy=True)
    if _several():
        dist.broadcast(here, src=0)
    return here


def _load(components: Path, max_tokens: int, prompts: list[str], device: torch.device) -> dict[str, Any]:
    """The VAE, its statistics, and "texts": embeddings and mask of the prompts, one row per image, and of the negative
    prompt."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    from tasks.encoding.text.chat import encode_text, load_processor, load_text_encoder

    vae = AutoencoderKLQwenImage.from_pretrained(components / "vae").eval()
    encoder = load_text_encoder(components / "text_encoder", dtype="auto").to(device)  # as for captions
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
        "texts": [repeat(text), repeat(mask), negative, negative_mask],
    }


def _save(kept: dict[str, Any], tokens: torch.Tensor, patch_size: int, path: Path) -> None:
    """Decodes normalised latents [n, S, C] of square images, and writes them as a grid with a row for each prompt."""
    import torch
    from PIL import Image

    from model.flow import unpack_latents

    side, device = kept["side"], tokens.device
    unpacked = unpack_latents(tokens, side, side, patch_size)
    latents = (unpacked * kept["std"].to(device) + kept["mean"].to(device))[:, :, None]
    vae = kept["vae"].to(device)
    at_once = len(latents) if device.type == "cpu" else 1  # training leaves little memory of an accelerator
    with torch.no_grad():
        images = torch.cat([vae.decode(part, return_dict=False)[0][:, :, 0].cpu() for part in latents.split(at_once)])
    vae.cpu()
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    grid = Image.new("RGB", (width * IMAGES_PER_PROMPT, height * (len(pixels) // IMAGES_PER_PROMPT)))
    for i, image in enumerate(pixels):
        grid.paste(Image.fromarray(image), (i % IMAGES_PER_PROMPT * width, i // IMAGES_PER_PROMPT * height))
    with storage.replacing(path) as temporary:
        grid.save(temporary, format="PNG")
