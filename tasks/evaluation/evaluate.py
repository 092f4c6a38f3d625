"""Images of one seed through diffusers' pipeline, and the scores of all seeds together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eval.config import EvalConfig, SchedulerConfig
from tasks.diffusers_parts import SCHEDULER, processor_class
from tasks.manifest import load_manifest


def generate_seed(
    merged: Path, components: Path, config: EvalConfig, seed: int, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """Samples one seed's images; those that an earlier, killed attempt left in `work_dir` are kept.

    Args:
        merged: sealed directory with `transformer/`.
        components: sealed directory with `vae/`, `text_encoder/`, `processor/`.
        config: the recipe's eval section; its `seeds` are replaced by `seed`.
        work_dir: the same for every attempt at the same images. Not removed here.
        out_dir: gets images/ in GenEval's layout.

    Returns:
        {"images", "seconds"}
    """
    from eval.generate import IMAGES, diffusers_sampler, generate
    from eval.scorecard import benchmark_prompts

    config = config.model_copy(update={"seeds": (seed,)})
    pipeline = load_pipeline(merged, components, config.scheduler)
    sampler = diffusers_sampler(pipeline, config, text_kv_cache=hasattr(pipeline.transformer, "enable_cache"))
    report = generate(
        sampler,
        benchmark_prompts(config),
        config,
        work_dir,
        provenance={
            part: load_manifest(path).digest for part, path in (("merged", merged), ("components", components))
        },
        log=lambda line: print(f"[seed {seed}] {line}", flush=True),
    )
    # Hidden files are what an attempt that was killed had half written.
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(work_dir / IMAGES, out_dir / IMAGES, copy_function=shutil.copyfile, ignore=hidden)
    return {"images": report["expected"], "seconds": report["seconds"]}


def load_pipeline(merged: Path, components: Path, scheduler: SchedulerConfig = SchedulerConfig()) -> Any:
    """diffusers' NucleusMoEImagePipeline over the parts where they lie: the one that publishing writes down.

    An ablation, which diffusers' transformer cannot compute, is this project's own model in its place.
    """
    import transformers
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        NucleusMoEImagePipeline,
        NucleusMoEImageTransformer2DModel,
    )

    from model.sampling.pipeline_transformer import PipelineTransformer
    from model.weights.export import load_transformer, read_config
    from tasks.encoding.chat import load_text_encoder

    if read_config(merged / "transformer").is_ablation:
        transformer = PipelineTransformer(load_transformer(merged / "transformer"))
    else:
        transformer = NucleusMoEImageTransformer2DModel.from_pretrained(merged / "transformer").eval()
    processor = getattr(transformers, processor_class(components / "processor"))
    return NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler.model_dump()),
        vae=AutoencoderKLQwenImage.from_pretrained(components / "vae").eval(),
        text_encoder=load_text_encoder(components / "text_encoder"),
        processor=processor.from_pretrained(components / "processor"),
    )


def score(parts: list[Path], config: EvalConfig, out_dir: Path) -> dict[str, Any]:
    """Gathers the seeds' images and writes the scorecard.

    Raises:
        ValueError: the parts were sampled from different weights or prompts.
    """
    from eval.generate import IMAGES, PROMPTS, SETTINGS
    from eval.scorecard import rescore

    images = out_dir / IMAGES
    images.mkdir()
    common: dict[str, Any] = {}
    for part in parts:
        settings = json.loads((part / IMAGES / SETTINGS).read_text(encoding="utf-8"))
        settings["config"]["seeds"] = list(config.seeds)
        prompts = (part / IMAGES / PROMPTS).read_text(encoding="utf-8")
        if common and common != {"settings": settings, "prompts": prompts}:
            raise ValueError(f"{part} was sampled from other weights, prompts or settings than {parts[0]}")
        common = {"settings": settings, "prompts": prompts}
        for folder in sorted((part / IMAGES).glob("seed*")):
            shutil.copytree(folder, images / folder.name, copy_function=shutil.copyfile)
    (images / SETTINGS).write_text(json.dumps(common["settings"], indent=1) + "\n", encoding="utf-8")
    (images / PROMPTS).write_text(common["prompts"], encoding="utf-8")
    card = rescore(out_dir, out_dir, config, log=lambda line: print(line, flush=True))
    print(f"overall {card['overall']['mean']:.3f} over {len(config.seeds)} seeds", flush=True)
    return card
