"""Draws one image from a published pipeline: `python -m tasks.draw "a red circle left of a blue square"`.

Without --pipeline it takes the newest pipeline under NUCLEUS_HOME. Size, steps and guidance are those of the pipeline's
scorecard. Only diffusers computes the image.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

from model.storage import replacing
from tasks.manifest import load_manifest
from tasks.sealed import newest_pipeline
from tasks.store import home


def draw(prompt: str, pipeline: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Writes one PNG; the same prompt, seed and machine give the same file.

    Returns:
        {"path", "steps", "guidance", "size_px", "seconds"}

    Raises:
        ValueError: an empty prompt, a negative seed, or a directory that is not a published pipeline.
    """
    if not prompt.strip():
        raise ValueError('the prompt is empty; write PROMPT="a red circle left of a blue square"')
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
    if not (pipeline / "model_index.json").is_file():
        raise ValueError(f"{pipeline} is not a diffusers pipeline: it has no model_index.json")
    settings = load_manifest(pipeline).config["recipe"]["eval"]
    import torch
    from diffusers import DiffusionPipeline, TextKVCacheConfig

    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(
        pipeline,
        torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        local_files_only=True,
        use_safetensors=True,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(TextKVCacheConfig())
    side, steps, guidance = (settings[key] for key in ("image_size_px", "num_inference_steps", "guidance_scale"))
    # A scheduler with stochastic steps ignores the pipeline's generator and draws from the global one.
    generator = torch.manual_seed(seed)
    image = pipe(
        prompt, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance, generator=generator
    ).images[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        image.save(temporary, "PNG")
    seconds = round(time.monotonic() - started, 1)
    return {"path": out, "steps": steps, "guidance": guidance, "size_px": side, "seconds": seconds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.draw", description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", type=Path, help="a published directory (default: the newest)")
    parser.add_argument("--out", type=Path, help="a PNG (default: drawn/WORDS-SEED.png under NUCLEUS_HOME)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        pipeline = options.pipeline or newest_pipeline()
        words = re.sub(r"\W+", "-", options.prompt.lower()).strip("-")[:60] or "image"
        out = options.out or home() / "drawn" / f"{words}-{options.seed}.png"
        made = draw(options.prompt, pipeline, out, options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made['path']}  ({made['size_px']} px, {made['steps']} steps, {made['seconds']} s, {pipeline})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
