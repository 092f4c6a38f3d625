"""Plans the benchmarks, judges and settings of a command.

A benchmark's settings come from, in rising precedence: its official numbers, the recipe's eval section (or that of a
published pipeline's scorecard), overrides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval import catalog
from eval.benchmarks import registry
from eval.config import SCORING_KEYS, EvalConfig
from tasks.evaluation.prompts import CAPTIONS

# GenEval is saturated: GenEval 2 is the second headline.
HEADLINES = ("geneval", "geneval2")
# Settings of one benchmark that are wrong for another.
OF_A_BENCHMARK = {
    "benchmark",
    "further_benchmarks",
    "judges",
    "prompts_file",
    "prompts_per_task",
    "prompt_rewrites",
    "images_per_prompt",
}


class ImagesPart(BaseModel):
    """The part of one sampling seed's images that one task generates and seals: number `index` of `parts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int = Field(ge=0)
    index: int = Field(default=0, ge=0)
    parts: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _inside(self) -> ImagesPart:
        if self.index >= self.parts:
            raise ValueError(f"index={self.index} must be one of the {self.parts} parts from 0 to {self.parts - 1}")
        return self


def plan_parts(config: EvalConfig, parts_per_seed: int) -> list[ImagesPart]:
    """All parts of a run. Their number does not change any image: batches are the same."""
    if parts_per_seed < 1:
        raise ValueError(f"parts_per_seed={parts_per_seed} must be at least 1")
    return [
        ImagesPart(seed=seed, index=index, parts=parts_per_seed)
        for seed in config.seeds
        for index in range(parts_per_seed)
    ]


def plan_benchmarks(
    benchmarks: str,
    base: Mapping[str, Any],
    overrides: Sequence[str] = (),
    judges: str = "",
    packaged: bool = False,
) -> list[EvalConfig]:
    """The configuration of each benchmark.

    Args:
        benchmarks: names, separated by commas.
        base: an eval section, such as a recipe's; its judges, prompts and counts are used for its own benchmark alone.
        overrides: KEY=VALUE for all benchmarks, or BENCHMARK.KEY=VALUE for one.
        judges: [BENCHMARK.][SKILL=]NAME, separated by commas; "" takes those of the base, of the recipe's benchmark, or the
            recommended ones.
        packaged: prefer judges with weights in packages, which run on a CPU.

    Raises:
        ValueError: an unknown benchmark, skill, judge or key, or a benchmark without a judge.
    """
    names = [name.strip() for name in benchmarks.split(",") if name.strip()]
    if not names:
        raise ValueError("benchmarks is empty; name at least one, such as geneval,dpg,oneig")
    if len(set(names)) < len(names):
        raise ValueError(f"benchmarks={benchmarks!r} names one twice")
    named = catalog.named_judges([item.strip() for item in judges.split(",") if item.strip()], names)
    configs = []
    for name in names:
        benchmark = registry.load(name)
        values = {key: value for key, value in base.items() if key not in OF_A_BENCHMARK}
        values |= {"benchmark": name, "images_per_prompt": benchmark.images_per_prompt}
        if base.get("benchmark", "shapes") == name:
            values |= {key: base[key] for key in OF_A_BENCHMARK - {"further_benchmarks"} if key in base}
        for change in overrides:
            _override(values, change, name, names)
        chosen = catalog.recommended(benchmark, packaged) | dict(values.pop("judges", {}))
        chosen |= named[name]
        try:
            config = EvalConfig(**values, judges=chosen)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
        catalog.judges_of(config)
        configs.append(config)
    return configs


def further_configs(config: EvalConfig, packaged: bool = False) -> list[EvalConfig]:
    """The configuration of each of `config.further_benchmarks`.

    Raises:
        ValueError: see `plan_benchmarks`.
    """
    if not config.further_benchmarks:
        return []
    return plan_benchmarks(",".join(config.further_benchmarks), config.model_dump(mode="json"), packaged=packaged)


def default_benchmarks(base: Mapping[str, Any]) -> str:
    """The benchmarks of a command that names none: those of the eval section `base`, of a recipe or a published pipeline.

    Without captions, whose prompts are of a corpus. `HEADLINES` if there is no other.
    """
    names = [base["benchmark"], *base.get("further_benchmarks", ())] if "benchmark" in base else []
    return ",".join([name for name in names if name != CAPTIONS] or HEADLINES)


def _override(values: dict[str, Any], change: str, name: str, names: Sequence[str]) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"override {change!r} must look like guidance_scale=4, or geneval.guidance_scale=4")
    path = key.strip().removeprefix("eval.").split(".")
    if path[0] in registry.BENCHMARKS or path[0] in names:
        if path[0] != name:
            return
        path = path[1:]
    here = values
    for step in path[:-1]:
        here[step] = dict(here.get(step) or {})
        here = here[step]
    try:
        here[path[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {change!r} is not YAML: {' '.join(str(error).split())}") from error


def generation_config(config: EvalConfig) -> EvalConfig:
    """The configuration of prompts and images: without settings that only scoring reads, and without the seeds, of which
    each part has its own. Caches do not depend on these."""
    return _with_defaults(config, SCORING_KEYS | {"seeds"})


def judging_config(config: EvalConfig) -> EvalConfig:
    """The configuration of answers: without settings that only scoring reads, except the judges."""
    return _with_defaults(config, SCORING_KEYS - {"judges"})


def _with_defaults(config: EvalConfig, keys: Iterable[str]) -> EvalConfig:
    return config.model_copy(update={key: EvalConfig.model_fields[key].get_default() for key in keys})
