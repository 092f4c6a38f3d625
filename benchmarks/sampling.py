"""Images per second of the project's sampler and of diffusers' pipeline, each with and without a cache of text K, V.

    python benchmarks/sampling.py [--models tiny mid] [--steps 20] [--batch 8] [--guidance 4] [--rounds 5]
    python benchmarks/sampling.py --pipeline DIR [--size 64] ...      # a published directory: its own weights

"tiny" has the shapes of recipes/tiny.yaml, "mid" is 12 layers of width 512 with 16 experts at 256 image tokens; both
with random weights, which take the same time as trained ones. Text is random too, and latents are not decoded: the
denoising loop alone is timed. Ours runs guidance in one batched forward a step, the pipeline in two. All sides run in
turns within one process, and their latents after two steps are compared first.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measure import in_turns, print_run  # noqa: E402

from model.config import TransformerConfig  # noqa: E402
from model.sampling.sampler import sample_latents  # noqa: E402
from model.transformer import NucleusTransformer  # noqa: E402
from model.weights.export import load_transformer, read_config  # noqa: E402

NEGATIVE_TOKENS = 8
COMPARED_STEPS = 2  # the second reuses the cache; over many steps random weights amplify rounding errors
AGREEMENT = {torch.float32: 0.05, torch.bfloat16: 0.5}  # relative; nearly equal scores may route differently


class Model(NamedTuple):
    config: TransformerConfig
    size_px: int
    text_tokens: int
    directory: Path | None = None  # of weights


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=["tiny", "mid"], default=["tiny", "mid"])
    parser.add_argument("--pipeline", type=Path, help="a published directory, instead of --models")
    parser.add_argument("--size", type=int, help="pixels per side; a recipe's last stage, 256 for mid and pipelines")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args(argv)


def models(args: argparse.Namespace) -> dict[str, Model]:
    if args.pipeline:
        directory = args.pipeline / "transformer"
        return {args.pipeline.name: Model(read_config(directory), args.size or 256, 64, directory)}
    result = {}
    if "tiny" in args.models:
        from tasks.recipe import load_recipe

        recipe = load_recipe("tiny")
        size = args.size or recipe.train.stages[-1].image_size_px
        result["tiny"] = Model(recipe.model, size, recipe.encoding.max_text_tokens)
    if "mid" in args.models:
        config = TransformerConfig(
            out_channels=16,
            num_layers=12,
            attention_head_dim=64,
            num_attention_heads=8,
            num_key_value_heads=2,
            joint_attention_dim=1024,
            axes_dims_rope=(8, 28, 28),
            dense_moe_strategy="leave_first_three_blocks_dense",
            num_experts=16,
            moe_intermediate_dim=336,
            capacity_factors=2.0,
        )
        result["mid"] = Model(config, args.size or 256, 64)
    return result


class WithoutCache(torch.nn.Module):
    """The model for `sample_latents`, recomputing the text's keys and values at every step."""

    def __init__(self, model: NucleusTransformer):
        super().__init__()
        self.model = model

    def text_kv(self, text: torch.Tensor, img_shape: Any) -> torch.Tensor:
        return text

    def forward(self, *, text_kv: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.model(encoder_hidden_states=text_kv, **kwargs)


def samplers(args: argparse.Namespace, model: Model) -> dict[str, Callable[[int], torch.Tensor]]:
    """Functions of a number of steps that return packed latents, by name."""
    from diffusers import FlowMatchEulerDiscreteScheduler, NucleusMoEImagePipeline, TextKVCacheConfig
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    dtype, side = getattr(torch, args.dtype), model.size_px // 16
    torch.manual_seed(0)
    if model.directory:
        ours = load_transformer(model.directory)
    else:
        ours = NucleusTransformer(model.config)
        torch.nn.init.normal_(ours.proj_out.weight, std=model.config.width**-0.5)
    pipelines = {}
    for name in ("without cache", "with cache"):
        if model.directory:
            theirs = NucleusMoEImageTransformer2DModel.from_pretrained(model.directory, use_grouped_mm=True)
        else:
            config = model.config.model_dump(mode="json") | {"use_grouped_mm": True}
            theirs = NucleusMoEImageTransformer2DModel(**config)
            theirs.load_state_dict(ours.state_dict())
        if name == "with cache":
            theirs.enable_cache(TextKVCacheConfig())
        pipelines[name] = NucleusMoEImagePipeline(
            transformer=theirs.to(args.device, dtype).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            processor=None,
        )
        pipelines[name].set_progress_bar_config(disable=True)
    ours.to(args.device, dtype).eval()

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=args.device).to(dtype)

    width = model.config.joint_attention_dim
    text, negative = randn(args.batch, model.text_tokens, width), randn(args.batch, NEGATIVE_TOKENS, width)
    lengths = torch.randint(model.text_tokens // 2, model.text_tokens + 1, (args.batch, 1), device=args.device)
    mask = torch.arange(model.text_tokens, device=args.device) < lengths
    negative_mask = torch.ones(args.batch, NEGATIVE_TOKENS, dtype=torch.bool, device=args.device)
    noise = randn(args.batch, side * side, model.config.in_channels)

    def run_ours(network: Any) -> Callable[[int], torch.Tensor]:
        return lambda steps: sample_latents(
            network, text, mask, negative, negative_mask, noise, (1, side, side), steps, args.guidance
        )

    def run_pipeline(pipeline: Any) -> Callable[[int], torch.Tensor]:
        return lambda steps: (
            pipeline(
                prompt_embeds=text,
                prompt_embeds_mask=mask,
                negative_prompt_embeds=negative,
                negative_prompt_embeds_mask=negative_mask,
                latents=noise,
                height=model.size_px,
                width=model.size_px,
                num_inference_steps=steps,
                guidance_scale=args.guidance,
                output_type="latent",
            ).images
        )

    return {
        "ours, without cache": run_ours(WithoutCache(ours)),
        "ours, with cache": run_ours(ours),
        **{f"diffusers, {name}": run_pipeline(pipeline) for name, pipeline in pipelines.items()},
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print_run(args.device)
    print(f"{args.steps} steps, batch {args.batch}, guidance {args.guidance}, {torch.get_num_threads()} threads")
    for name, model in models(args).items():
        weights = "its own" if model.directory else "random"
        print(f"\n{name}: {model.size_px} px, {(model.size_px // 16) ** 2} image tokens, {weights} weights")
        runs = samplers(args, model)
        reference = runs["diffusers, without cache"](COMPARED_STEPS).float()
        for side, run in runs.items():
            distance = ((run(COMPARED_STEPS).float() - reference).norm() / reference.norm()).item()
            if not distance < AGREEMENT[getattr(torch, args.dtype)]:
                raise RuntimeError(f"'{side}' draws different images: {distance:.2g} from the pipeline's latents")
        timed = {side: functools.partial(run, args.steps) for side, run in runs.items()}
        times = in_turns(timed, args.rounds, torch.device(args.device), warm_up=0)
        for side, spread in times.items():
            rate = [1000 * args.batch / ms for ms in (spread.median, spread.high, spread.low)]
            print(f"  {side:26} {rate[0]:9.3f} images/s (quartiles {rate[1]:.3f} to {rate[2]:.3f}, n={spread.count})")
        for cache in ("with", "without"):
            ratio = times[f"diffusers, {cache} cache"].median / times[f"ours, {cache} cache"].median
            print(f"  ours, {cache} cache: {ratio:.2f}x as many images as diffusers, {cache} cache")


if __name__ == "__main__":
    main()
