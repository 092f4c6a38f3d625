"""The `eval` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SchedulerConfig(BaseModel):
    """What the published `FlowMatchEulerDiscreteScheduler` says; the defaults are the released model's.

    shift: sigma -> shift sigma / (1 + (shift - 1) sigma): above 1, more of the steps are spent near pure noise.
    stochastic_sampling: each step goes to the predicted clean latent and adds fresh noise, so that later steps may
        mend what earlier ones left undecided.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shift: Annotated[float, Field(gt=0)] = 1.0
    stochastic_sampling: bool = False


class EvalConfig(BaseModel):
    """How images are sampled and which benchmark scores them. Prompt counts are per task; None is all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmark: Literal["shapes", "geneval"] = "shapes"
    prompts_per_task: Annotated[int, Field(gt=0)] | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    images_per_prompt: Annotated[int, Field(gt=0)] = 1
    image_size_px: Annotated[int, Field(gt=0)] = 1024
    num_inference_steps: Annotated[int, Field(gt=0)] = 50
    guidance_scale: Annotated[float, Field(ge=1)] = 8.0
    scheduler: SchedulerConfig = SchedulerConfig()
    batch_size: Annotated[int, Field(gt=0)] = 64
    bootstrap_samples: Annotated[int, Field(gt=0)] = 1000
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
