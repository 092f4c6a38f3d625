"""Score on the shapes benchmark against minutes of training.

    pyflyte run workflows/reproduce.py reproduce --recipe tiny --overrides train.keep_checkpoints=1000
    python benchmarks/evaluation/score_against_minutes.py --recipe tiny --out LABEL.jsonl \\
        --components .nucleus/artifacts/components/DIGEST --checkpoints .nucleus/artifacts/checkpoints/DIGEST...
    python benchmarks/evaluation/score_against_minutes.py --draw docs/images/score_against_minutes.png a.jsonl b.jsonl

`--checkpoints` are folders of step-*/ and metrics.jsonl, those of the stages in order; minutes are of training alone,
added up from their metrics. Images come from the project's own sampler (equal to the pipeline's, see the tests) with
the recipe's eval settings and the weights of one step, not merged; one image per seen prompt, one seed. Appends to
LABEL.jsonl, one line per score; a second start skips existing lines. Prints command and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BATCH = 88


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--overrides", default="[]", help="a JSON list")
    parser.add_argument("--components", type=Path)
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("score_against_minutes.jsonl"))
    parser.add_argument("--every", type=int, default=500, help="steps between scores")
    parser.add_argument("--prompts", type=int, default=32, help="images per task")
    parser.add_argument("--draw", help="draw the named .jsonl files instead")
    parser.add_argument("files", nargs="*")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, args.files)
    elif args.components is None or not args.checkpoints:
        parser.error("--components and --checkpoints are needed")
    else:
        print(f"command: {shlex.join(sys.argv)}\nmachine: {platform.platform()}, {os.cpu_count()} CPUs", flush=True)
        measure(args)


def measure(args: argparse.Namespace) -> None:
    from model.train.checkpoint import finished_checkpoints
    from model.transformer import NucleusTransformer
    from model.weights.load import open_weights
    from tasks.recipe import load_recipe

    recipe = load_recipe(args.recipe, json.loads(args.overrides))
    if len(args.checkpoints) > len(recipe.train.stages):
        raise SystemExit(f"{len(args.checkpoints)} --checkpoints, but {len(recipe.train.stages)} stages in the recipe")
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    done = {(row["stage"], row["step"]) for row in known}
    judge, before = Judge(args.components, args.prompts, recipe), 0.0
    model = NucleusTransformer(recipe.model)
    model.set_capacity_factors(recipe.train.stages[-1].capacity_factors)
    for stage, folder in zip(recipe.train.stages, args.checkpoints):
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds = {row["step"]: row["seconds"] for row in metrics}
        for step, path in finished_checkpoints(folder).items():
            if step % args.every or step not in seconds or (stage.name, step) in done:
                continue
            weights = open_weights(path)
            model.load_state_dict({name: weights.read(name) for name in weights.described})
            row = {"stage": stage.name, "step": step, "minutes": round((before + seconds[step]) / 60, 2)} | judge(model)
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        before += metrics[-1]["seconds"]


class Judge:
    """Draws the benchmark's seen prompts with a model, and judges them."""

    def __init__(self, components: Path, prompts_per_task: int, recipe: Any):
        import torch
        from diffusers import AutoencoderKLQwenImage

        from eval.benchmarks.shapes.benchmark import make_prompts
        from tasks.encoding.text.chat import encode_text, load_processor, load_text_encoder
        from tasks.encoding.vae_codec import FrameCodec

        self.settings, self.channels = recipe.eval, recipe.model.in_channels
        vae = AutoencoderKLQwenImage.from_pretrained(components / "vae").eval()
        encoder = load_text_encoder(components / "text_encoder")
        processor = load_processor(components / "processor")
        shape = (1, vae.config.z_dim, 1, 1)
        self.mean, self.std = (
            torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.codec = FrameCodec(vae)
        self.prompts = [p for p in make_prompts(prompts_per_task) if p["split"] == "seen" for _ in range(p["images"])]
        with torch.no_grad():
            self.texts = encode_text(encoder, processor, [p["prompt"] for p in self.prompts])
            self.negative = encode_text(encoder, processor, [""])

    def __call__(self, model: Any) -> dict[str, float]:
        import torch
        from PIL import Image

        from eval.benchmarks.shapes.benchmark import judge
        from model.flow import unpack_latents
        from model.sampling.sampler import sample_latents

        side, right, scheduler = self.settings.image_size_px // 16, {}, self.settings.scheduler
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(self.prompts), side * side, self.channels, generator=generator)
        for start in range(0, len(self.prompts), BATCH):
            part = slice(start, start + BATCH)
            text, mask = (None if tensor is None else tensor[part] for tensor in self.texts)
            negative, negative_mask = (
                None if tensor is None else tensor.expand(len(text), *tensor.shape[1:]) for tensor in self.negative
            )
            tokens = sample_latents(
                model,
                text,
                mask,
                negative,
                negative_mask,
                noise[part],
                (1, side, side),
                self.settings.num_inference_steps,
                self.settings.guidance_scale,
                shift=scheduler.shift,
                step_noise=generator if scheduler.stochastic_sampling else None,
            )
            with torch.no_grad():
                images = self.codec.decode(unpack_latents(tokens, side, side) * self.std + self.mean)
            pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            for prompt, image in zip(self.prompts[part], pixels):
                right.setdefault(prompt["tag"], []).append(judge(Image.fromarray(image), prompt)["correct"])
        tasks = {tag: round(sum(values) / len(values), 3) for tag, values in right.items()}
        return {"overall": round(sum(tasks.values()) / len(tasks), 3), **tasks}


def draw(target: str, files: list[str]) -> None:
    """Overall score against minutes, a line per file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for file in files:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        axis.plot([r["minutes"] for r in rows], [r["overall"] for r in rows], marker="o", label=Path(file).stem)
    axis.set_xlabel("minutes of training (2 CPU cores)")
    axis.set_ylabel("shapes benchmark, overall (one seed, unmerged)")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
