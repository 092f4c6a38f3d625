"""Generates the images of a part of a benchmark, judges them, and scores all parts together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.config import EvalConfig, SchedulerConfig
from tasks.diffusers_parts import SCHEDULER, processor_class
from tasks.evaluation import models
from tasks.evaluation.models import Loaded, Model
from tasks.evaluation.plan import ImagesPart
from tasks.evaluation.prompts import CAPTIONS, REFERENCE, read_prompts
from tasks.manifest import load_manifest


def generate_part(
    merged: Path, components: Path, prompts: Path, config: EvalConfig, part: ImagesPart, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """Samples one part of a seed's images; images of an earlier, killed attempt in `work_dir` are kept.

    Args:
        merged: sealed directory with `transformer/`.
        components: sealed directory with `vae/`, `text_encoder/`, `processor/`.
        prompts: sealed directory of tasks.evaluation.prompts.
        config: the recipe's eval section; its `seeds` are replaced by the part's.
        work_dir: the same for every attempt at the same images. Not removed here.
        out_dir: gets images/ in GenEval's layout.

    Returns:
        {"images", "seconds"}
    """
    provenance = {name: load_manifest(path).digest for name, path in (("merged", merged), ("components", components))}
    loaded = Loaded(load_pipeline(merged, components, config.scheduler), provenance)
    return sample_part(loaded, prompts, config, part, work_dir, out_dir)


def generate_from_model(
    model: Model, prompts: Path, config: EvalConfig, part: ImagesPart, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """Like `generate_part`, for any diffusers pipeline.

    Raises:
        ValueError: the model is not the one that was resolved.
    """
    return sample_part(models.load(model, config.scheduler), prompts, config, part, work_dir, out_dir)


def sample_part(
    loaded: Loaded, prompts_dir: Path, config: EvalConfig, part: ImagesPart, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    from eval.generation import pipelines
    from eval.generation.generate import IMAGES, generate
    from tasks.evaluation import flow_loss

    config = config.model_copy(update={"seeds": (part.seed,)})
    prompts = read_prompts(prompts_dir)
    report = generate(
        pipelines.diffusers_sampler(loaded.pipeline, config),
        prompts,
        config,
        work_dir,
        shard=part.index,
        shards=part.parts,
        provenance=loaded.provenance,
        log=lambda line: print(f"[seed {part.seed}, part {part.index} of {part.parts}] {line}", flush=True),
    )
    if config.benchmark == CAPTIONS:
        flow_loss.measure(
            loaded.pipeline, prompts, config, work_dir / IMAGES, prompts_dir, shard=part.index, shards=part.parts
        )
    # Hidden files are partial writes of a killed attempt.
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(work_dir / IMAGES, out_dir / IMAGES, copy_function=_link, ignore=hidden)
    return {"images": report["expected"], "seconds": report["seconds"]}


def _link(source: str, target: str) -> None:
    """A second name for a file that nothing writes again; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def load_pipeline(merged: Path, components: Path, scheduler: SchedulerConfig = SchedulerConfig()) -> Any:
    """diffusers' NucleusMoEImagePipeline with the parts in place, equal to the published pipeline.

    For an ablation, which diffusers' transformer cannot compute, this project's own model replaces it.
    """
    import torch
    import transformers
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        NucleusMoEImagePipeline,
        NucleusMoEImageTransformer2DModel,
    )

    from model.sampling.pipeline_transformer import PipelineTransformer
    from model.weights.export import load_transformer, read_config
    from tasks.encoding.text.chat import load_text_encoder

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32  # as eval.generation.pipelines loads a published pipeline
    if read_config(merged / "transformer").is_ablation:
        transformer = PipelineTransformer(load_transformer(merged / "transformer"))
    else:
        transformer = NucleusMoEImageTransformer2DModel.from_pretrained(
            merged / "transformer", torch_dtype=dtype
        ).eval()
    processor = getattr(transformers, processor_class(components / "processor"))
    pipeline = NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler.model_dump()),
        vae=AutoencoderKLQwenImage.from_pretrained(components / "vae").eval(),
        text_encoder=load_text_encoder(components / "text_encoder"),
        processor=processor.from_pretrained(components / "processor"),
    )
    return pipeline.to("cuda", dtype) if on_gpu else pipeline


def gather_images(
    parts: Sequence[Path],
    prompts: Path,
    config: EvalConfig,
    out_dir: Path,
    copy: Callable[[str, str], object] = shutil.copyfile,
) -> None:
    """Gathers all parts' images in `out_dir`, with the real images of their captions if the prompts have some.

    Args:
        copy: (file, its name in `out_dir`); `_link` for a folder that is only read.

    Raises:
        ValueError: the parts were sampled from different weights, prompts or settings.
    """
    from eval.generation.generate import IMAGES, PROMPTS, SETTINGS

    images = out_dir / IMAGES
    images.mkdir(parents=True)
    common: dict[str, Any] = {}
    for part in parts:
        settings = json.loads((part / IMAGES / SETTINGS).read_text(encoding="utf-8"))
        settings["config"]["seeds"] = list(config.seeds)
        lines = (part / IMAGES / PROMPTS).read_text(encoding="utf-8")
        if common and common != {"settings": settings, "prompts": lines}:
            raise ValueError(f"{part} was sampled from other weights, prompts or settings than {parts[0]}")
        common = {"settings": settings, "prompts": lines}
        for folder in sorted((part / IMAGES).glob("seed*")):
            shutil.copytree(folder, images / folder.name, copy_function=copy, dirs_exist_ok=True)
    if (prompts / REFERENCE).is_dir():
        shutil.copytree(prompts / REFERENCE, images / REFERENCE, copy_function=copy)
    (images / SETTINGS).write_text(json.dumps(common["settings"], indent=1) + "\n", encoding="utf-8")
    (images / PROMPTS).write_text(common["prompts"], encoding="utf-8")


def judge(parts: list[Path], prompts: Path, config: EvalConfig, work_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Answers about all parts' images. Answers of an earlier attempt in `work_dir` are kept, and those of other runs are
    reused.

    Args:
        work_dir: the same for every attempt at the same answers. Not removed here.
        out_dir: gets images.parquet, judges.json and answers.parquet.

    Raises:
        ValueError: see eval.scorecard.judge_run.
    """
    from eval import catalog
    from eval.judging.answers import SEALED
    from eval.judging.run import INDEX, JUDGES
    from eval.scorecard import judge_run
    from tasks.evaluation.stored_answers import StoredAnswers

    run = work_dir / "run"
    shutil.rmtree(run, ignore_errors=True)
    gather_images(parts, prompts, config, run, _link)
    judged = work_dir / "judged"
    jpeg = catalog.benchmark(config.benchmark).jpeg_tiles
    with StoredAnswers("judged through JPEG" if jpeg else "", log=_print) as shared:
        report = judge_run(run, judged, catalog.load_judges(config), config, shared=shared, log=_print)
    for name in (INDEX, JUDGES, SEALED):
        shutil.copyfile(judged / name, out_dir / name)
    return report


def score(parts: list[Path], prompts: Path, config: EvalConfig, judged: Path, out_dir: Path) -> dict[str, Any]:
    """Gathers the parts' images and writes the scorecard.

    Args:
        judged: answers of `judge`.

    Raises:
        ValueError: the parts were sampled from different weights or prompts, or the answers are incomplete.
    """
    from eval.scorecard import lines, rescore

    gather_images(parts, prompts, config, out_dir)
    card = rescore(out_dir, out_dir, config, judged=judged, log=_print)
    print("\n".join(lines(card)), flush=True)
    return card


def _print(line: str) -> None:
    print(line, flush=True)


class DropError(ValueError):
    """A score is lower than the incumbent's beyond noise."""


def check_drop(incumbent: Path, current: Path) -> tuple[str | None, str]:
    """(the verdict on the current score, None if the two cannot be compared; a sentence about it).

    Raises:
        DropError: it is lower beyond noise; names both scorecards.
    """
    from eval.scorecards.compare import compare_to_incumbent

    verdict, sentence = compare_to_incumbent(incumbent, current)
    if verdict == "worse":
        raise DropError(f"the score dropped beyond noise, from {incumbent} to {current}: {sentence}")
    return verdict, sentence
