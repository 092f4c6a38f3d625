"""Images of a part of a benchmark, answers about them, and the scores of all parts together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eval.config import EvalConfig, SchedulerConfig
from tasks.diffusers_parts import SCHEDULER, processor_class
from tasks.manifest import load_manifest


class Part(BaseModel):
    """One of `parts` shares of one sampling seed's images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int = Field(ge=0)
    index: int = Field(default=0, ge=0)
    parts: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _inside(self) -> Part:
        if self.index >= self.parts:
            raise ValueError(f"index={self.index} must be one of the {self.parts} parts from 0 to {self.parts - 1}")
        return self


def plan_parts(config: EvalConfig, parts_per_seed: int) -> list[Part]:
    """Every part of a run. How many there are does not change any image: batches are the same."""
    if parts_per_seed < 1:
        raise ValueError(f"parts_per_seed={parts_per_seed} must be at least 1")
    return [
        Part(seed=seed, index=index, parts=parts_per_seed) for seed in config.seeds for index in range(parts_per_seed)
    ]


def generate_seed(
    merged: Path, components: Path, config: EvalConfig, seed: int, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """All of one seed's images (see `generate_part`) of merged weights with their components."""
    return generate_part(merged, components, config, Part(seed=seed), work_dir, out_dir)


def generate_part(
    merged: Path, components: Path, config: EvalConfig, part: Part, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """Samples one part of a seed's images; those that an earlier, killed attempt left in `work_dir` are kept.

    Args:
        merged: sealed directory with `transformer/`.
        components: sealed directory with `vae/`, `text_encoder/`, `processor/`.
        config: the recipe's eval section; its `seeds` are replaced by the part's.
        work_dir: the same for every attempt at the same images. Not removed here.
        out_dir: gets images/ in GenEval's layout.

    Returns:
        {"images", "seconds"}
    """
    provenance = {name: load_manifest(path).digest for name, path in (("merged", merged), ("components", components))}
    pipeline = load_pipeline(merged, components, config.scheduler)
    return sample_part(pipeline, provenance, config, part, work_dir, out_dir)


def generate_from_pipeline(
    pipeline: Path, config: EvalConfig, part: Part, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """The same of a published pipeline, a sealed directory."""
    from eval.pipelines import load_pipeline as load_any

    loaded, _ = load_any(str(pipeline.resolve()))
    return sample_part(loaded, {"pipeline": load_manifest(pipeline).digest}, config, part, work_dir, out_dir)


def generate_from_model(
    model: str, digest: str, config: EvalConfig, part: Part, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    """The same of any diffusers pipeline.

    Args:
        model: a directory, or a Hub id (see eval.pipelines).
        digest: of `eval.pipelines.resolve`: the commit of a Hub id, or the digest of a directory's files.

    Raises:
        ValueError: the directory is not the one that was resolved.
    """
    from eval.pipelines import is_local
    from eval.pipelines import load_pipeline as load_any

    pipeline, provenance = load_any(model, revision=None if is_local(model) else digest)
    if provenance["digest"] != digest:
        raise ValueError(f"{model} changed since it was resolved: its digest is {provenance['digest']}, not {digest}")
    return sample_part(pipeline, provenance, config, part, work_dir, out_dir)


def sample_part(
    pipeline: Any, provenance: dict[str, Any], config: EvalConfig, part: Part, work_dir: Path, out_dir: Path
) -> dict[str, Any]:
    from eval import catalog, pipelines
    from eval.generate import IMAGES, generate

    config = config.model_copy(update={"seeds": (part.seed,)})
    report = generate(
        pipelines.diffusers_sampler(pipeline, config),
        catalog.prompts(config),
        config,
        work_dir,
        shard=part.index,
        shards=part.parts,
        provenance=provenance,
        log=lambda line: print(f"[seed {part.seed}, part {part.index} of {part.parts}] {line}", flush=True),
    )
    # Hidden files are what an attempt that was killed had half written.
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(work_dir / IMAGES, out_dir / IMAGES, copy_function=shutil.copyfile, ignore=hidden)
    return {"images": report["expected"], "seconds": report["seconds"]}


def load_pipeline(merged: Path, components: Path, scheduler: SchedulerConfig = SchedulerConfig()) -> Any:
    """diffusers' NucleusMoEImagePipeline over the parts where they are: the one that publishing writes down.

    An ablation, which diffusers' transformer cannot compute, is this project's own model in its place.
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
    from tasks.encoding.chat import load_text_encoder

    if read_config(merged / "transformer").is_ablation:
        transformer = PipelineTransformer(load_transformer(merged / "transformer"))
    else:
        transformer = NucleusMoEImageTransformer2DModel.from_pretrained(merged / "transformer").eval()
    processor = getattr(transformers, processor_class(components / "processor"))
    pipeline = NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler.model_dump()),
        vae=AutoencoderKLQwenImage.from_pretrained(components / "vae").eval(),
        text_encoder=load_text_encoder(components / "text_encoder"),
        processor=processor.from_pretrained(components / "processor"),
    )
    return pipeline.to("cuda") if torch.cuda.is_available() else pipeline


def gather_images(parts: Sequence[Path], config: EvalConfig, out_dir: Path) -> None:
    """One run of all parts' images in `out_dir`: files are linked where the file system can.

    Raises:
        ValueError: the parts were sampled from different weights, prompts or settings.
    """
    from eval.generate import IMAGES, PROMPTS, SETTINGS

    images = out_dir / IMAGES
    images.mkdir(parents=True)
    common: dict[str, Any] = {}
    for part in parts:
        settings = json.loads((part / IMAGES / SETTINGS).read_text(encoding="utf-8"))
        settings["config"]["seeds"] = list(config.seeds)
        prompts = (part / IMAGES / PROMPTS).read_text(encoding="utf-8")
        if common and common != {"settings": settings, "prompts": prompts}:
            raise ValueError(f"{part} was sampled from other weights, prompts or settings than {parts[0]}")
        common = {"settings": settings, "prompts": prompts}
        for folder in sorted((part / IMAGES).glob("seed*")):
            shutil.copytree(folder, images / folder.name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    (images / SETTINGS).write_text(json.dumps(common["settings"], indent=1) + "\n", encoding="utf-8")
    (images / PROMPTS).write_text(common["prompts"], encoding="utf-8")


def judge(parts: list[Path], config: EvalConfig, work_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Answers about all parts' images; those that an earlier attempt left in `work_dir` are kept.

    Args:
        work_dir: the same for every attempt at the same answers. Not removed here.
        out_dir: gets images.parquet, judges.json and answers.parquet.

    Raises:
        ValueError: see eval.scorecard.judge_run.
    """
    from eval import catalog
    from eval.answers import SEALED
    from eval.judging import INDEX, JUDGES
    from eval.scorecard import judge_run

    run = work_dir / "run"
    shutil.rmtree(run, ignore_errors=True)
    gather_images(parts, config, run)
    judged = work_dir / "judged"
    report = judge_run(run, judged, catalog.load_judges(config), config, log=lambda line: print(line, flush=True))
    for name in (INDEX, JUDGES, SEALED):
        shutil.copyfile(judged / name, out_dir / name)
    return report


def score(parts: list[Path], config: EvalConfig, out_dir: Path, judged: Path | None = None) -> dict[str, Any]:
    """Gathers the parts' images and writes the scorecard.

    Args:
        judged: answers of `judge`; None asks the judges now.

    Raises:
        ValueError: the parts were sampled from different weights or prompts, or the answers are incomplete.
    """
    from eval.scorecard import lines, rescore

    gather_images(parts, config, out_dir)
    card = rescore(out_dir, out_dir, config, judged=judged, log=lambda line: print(line, flush=True))
    print("\n".join(lines(card)), flush=True)
    return card


class DropError(ValueError):
    """A score that is worse than the incumbent's beyond noise."""


def check_drop(incumbent: Path, current: Path) -> str:
    """Why the current score is no drop, as a sentence.

    Raises:
        DropError: it is worse beyond noise; names both scorecards.
    """
    from eval.compare import drop_beyond_noise

    dropped, sentence = drop_beyond_noise(incumbent, current)
    if dropped:
        raise DropError(f"the score dropped beyond noise, from {incumbent} to {current}: {sentence}")
    return sentence
