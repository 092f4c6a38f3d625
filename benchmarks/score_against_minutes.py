"""Score on the shapes benchmark against minutes of training: how to split a budget between stages, and at what rates.

    python benchmarks/score_against_minutes.py --recipe tiny [--overrides '["train.optim.muon_lr=0.01"]'] --name LABEL
    python benchmarks/score_against_minutes.py --draw docs/score_against_minutes.png a.jsonl b.jsonl

Curates, encodes and trains as `reproduce` does: run `make reproduce` first, so that its artifacts are at hand; the
newest components are taken, and the latents made with them. Scores come from the project's own sampler (equal to the
pipeline's images, see the tests) with the unmerged weights, one seed; the time is that of training alone. Writes
LABEL.jsonl, one line per score, and prints command and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GUIDANCE, STEPS, BATCH = 4.0, 20, 88


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--overrides", default="[]", help="a JSON list")
    parser.add_argument("--name", default="run")
    parser.add_argument("--every", type=int, default=300, help="steps between scores")
    parser.add_argument("--prompts", type=int, default=24, help="images per task")
    parser.add_argument("--home", default=os.environ.get("NUCLEUS_HOME", ".nucleus"))
    parser.add_argument("--draw", help="draw the named .jsonl files instead")
    parser.add_argument("files", nargs="*")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, args.files)
    else:
        print(f"command: {shlex.join(sys.argv)}\nmachine: {platform.platform()}, {os.cpu_count()} CPUs", flush=True)
        measure(args)


def measure(args: argparse.Namespace) -> None:
    from model.train.run import train_stage
    from tasks.planning.sections import train_stage as section_of
    from tasks.recipe import load_recipe

    recipe = load_recipe(args.recipe, json.loads(args.overrides))
    artifacts = Path(args.home) / "artifacts"
    components = max((artifacts / "components").iterdir(), key=lambda path: path.stat().st_mtime)
    judge = Judge(components, args.prompts)
    out = Path(f"{args.name}.jsonl")
    out.write_text("")
    started, paused, init = time.perf_counter(), 0.0, None
    with tempfile.TemporaryDirectory() as scratch:
        for index, stage in enumerate(recipe.train.stages):
            section = section_of(recipe, index)
            train = section.train.model_copy(update={"sample_every_steps": args.every})

            def score(model: Any, step: int, path: Path, stage=stage) -> None:
                nonlocal paused
                begin = time.perf_counter()
                minutes = (begin - started - paused) / 60
                row = {"stage": stage.name, "step": step, "minutes": round(minutes, 2), "px": stage.image_size_px}
                row |= judge(model, stage.image_size_px)
                with open(out, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                paused += time.perf_counter() - begin

            latents = _latents(artifacts, components, section_of(recipe, index).stage.image_size_px)
            work, result = Path(scratch) / f"work{index}", Path(scratch) / f"out{index}"
            result.mkdir()
            train_stage(latents, section.model, train, 0, init, work, result, score)
            init = result


def _latents(artifacts: Path, components: Path, image_size_px: int) -> Path:
    """The latents of that size made with these components."""
    from tasks.manifest import load_manifest

    digest = load_manifest(components).digest
    for path in sorted((artifacts / "latents").iterdir(), key=lambda p: -p.stat().st_mtime):
        manifest = load_manifest(path)
        same = any(parent.digest == digest for parent in manifest.parents)
        if same and manifest.config["stage"]["image_size_px"] == image_size_px:
            return path
    raise SystemExit(f"no latents of {image_size_px} px for {components}; run `make reproduce` with this recipe first")


class Judge:
    """Draws the benchmark's seen prompts with a model that is being trained, and judges them."""

    def __init__(self, components: Path, prompts_per_task: int):
        import torch
        from diffusers import AutoencoderKLQwenImage
        from transformers import Qwen3VLForConditionalGeneration

        from eval.shapes import make_prompts
        from tasks.encoding.chat import encode_text, load_processor
        from tasks.encoding.frames import FrameCodec

        vae = AutoencoderKLQwenImage.from_pretrained(components / "vae").eval()
        encoder = Qwen3VLForConditionalGeneration.from_pretrained(components / "text_encoder").eval()
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

    def __call__(self, model: Any, side_px: int) -> dict[str, float]:
        import torch
        from PIL import Image

        from eval.shapes import judge
        from model.flow import unpack_latents
        from model.sampler import sample_latents

        side, right = side_px // 16, {}
        noise = torch.randn(len(self.prompts), side * side, 64, generator=torch.Generator().manual_seed(0))
        for start in range(0, len(self.prompts), BATCH):
            part = slice(start, start + BATCH)
            text, mask = (None if tensor is None else tensor[part] for tensor in self.texts)
            negative, negative_mask = (
                None if tensor is None else tensor.expand(len(text), *tensor.shape[1:]) for tensor in self.negative
            )
            shape = (1, side, side)
            tokens = sample_latents(
                model, text, mask, negative, negative_mask, noise[part], shape, STEPS, GUIDANCE
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
