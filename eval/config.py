"""The `eval` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class SchedulerConfig(BaseModel):
    """The published `FlowMatchEulerDiscreteScheduler`'s settings; the defaults are the released model's.

    shift: sigma -> shift sigma / (1 + (shift - 1) sigma): above 1, more of the steps are near pure noise.
    stochastic_sampling: each step goes to the predicted clean latent and adds fresh noise, so that later steps may
        correct earlier ones. Off: sampling is deterministic given the initial noise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shift: Annotated[float, Field(gt=0)] = 1.0
    stochastic_sampling: bool = False


class EvalConfig(BaseModel):
    """How images are sampled, and which benchmark and judge score them.

    benchmark: a name of eval.benchmarks.registry.
    further_benchmarks: others that a reproduction scores too, with the same sampling settings and each with its official
        numbers and recommended judges; a workflow makes a configuration of each.
    judges: {skill: name of eval.catalog}, for the skills that the benchmark has (Benchmark.judges); the shapes benchmark
        has its own judges.
    prompts_file: the benchmark's prompts, if they are not part of this package.
    prompt_set: "development" prompts are others of the same kind, for choosing; "official" prompts are for reporting.
    prompts_per_task: per category; None is all of them.
    prompt_rewrites: a JSON file {prompt id or text: rewritten text}; None: the prompts are used unchanged.
    negative_prompt: None is the pipeline's own (the empty prompt).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    benchmark: str = "shapes"
    further_benchmarks: tuple[str, ...] = ()
    judges: dict[str, str] = {}
    prompts_file: str | None = None
    prompt_set: Literal["official", "development"] = "official"
    prompts_per_task: Annotated[int, Field(gt=0)] | None = None
    prompt_rewrites: str | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    images_per_prompt: Annotated[int, Field(gt=0)] = 1
    image_size_px: Annotated[int, Field(gt=0, le=16384)] = 1024
    num_inference_steps: Annotated[int, Field(gt=0)] = 50
    guidance_scale: Annotated[float, Field(ge=1)] = 8.0
    negative_prompt: str | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    batch_size: Annotated[int, Field(gt=0)] = 64
    judge_batch_size: Annotated[int, Field(gt=0)] = 64
    # a missing image is an error; "official" shrinks the denominator instead, as GenEval's own code does
    missing: Literal["error", "official"] = "error"

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(
                f"seeds must be different whole numbers from 0 to {2**32 - 1}: a repeated run is no new evidence"
            )
        return seeds

    @field_validator("benchmark")
    @classmethod
    def _known_benchmark(cls, name: str) -> str:
        from eval.benchmarks import registry

        registry.load(name)
        return name

    @model_validator(mode="after")
    def _known_further_benchmarks(self) -> EvalConfig:
        from eval.benchmarks import registry

        names = (self.benchmark, *self.further_benchmarks)
        if len(set(names)) < len(names):
            raise ValueError(f"further_benchmarks={list(self.further_benchmarks)} names one twice, or benchmark again")
        for name in self.further_benchmarks:
            registry.load(name)
        return self

    @field_validator("judges")
    @classmethod
    def _known_judges(cls, judges: dict[str, str]) -> dict[str, str]:
        from eval import catalog

        for name in judges.values():
            catalog.check_judge(name)
        return judges


RETIRED = ("bootstrap_samples", "equal_within")  # written before 2026-11-30; nothing read them


def stored_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stored run, scorecard or pipeline, without those that this version no longer has."""
    return {key: value for key, value in config.items() if key not in RETIRED}


FILES = ("prompts_file", "prompt_rewrites")  # settings that name a file
# Settings that only scoring reads: images do not depend on them.
SCORING_KEYS = frozenset({"further_benchmarks", "judges", "judge_batch_size", "missing"})
