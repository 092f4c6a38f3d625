"""The recipe: every number that a user may change, in one file, checked before any work."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from eval.config import EvalConfig
from model.config import MergeConfig, Section, TrainConfig, TransformerConfig
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.publishing.config import PublishConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
VAE_SCALE = 8  # Qwen-Image's VAE; diffusers derives it as 2 ** 3 temporal stages


class Recipe(Section):
    """A whole reproduction. Load one with `load_recipe`."""

    name: str
    source: SourceConfig
    curation: CurationConfig
    components: ComponentsConfig
    encoding: EncodingConfig
    model: TransformerConfig
    train: TrainConfig
    merge: MergeConfig
    eval: EvalConfig
    publish: PublishConfig

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        tile = VAE_SCALE * self.model.patch_size
        for i, stage in enumerate(self.train.stages):
            if stage.image_size_px % tile:
                raise ValueError(
                    f"train.stages[{i}].image_size_px={stage.image_size_px} must be a multiple of {tile} "
                    f"(VAE {VAE_SCALE}x, patches of {self.model.patch_size})"
                )
            try:
                stage_model = TransformerConfig(
                    **{**self.model.model_dump(), "capacity_factors": stage.capacity_factors}
                )
            except ValidationError as error:
                raise ValueError(f"train.stages[{i}].capacity_factors: {error.errors()[0]['msg']}") from error
            tokens = (stage.image_size_px // tile) ** 2
            for layer in range(self.model.num_layers):
                if stage_model.is_moe_layer(layer):
                    want = stage_model.capacity_factor(layer) * tokens / self.model.num_experts
                    if want < 1:
                        raise ValueError(
                            f"train.stages[{i}].capacity_factors={stage_model.capacity_factor(layer)} at layer {layer}: "
                            f"{want:.2f} tokens for each of {self.model.num_experts} experts at "
                            f"{stage.image_size_px} px ({tokens} tokens); at least "
                            f"{self.model.num_experts / tokens:g} is needed for one"
                        )
        if self.eval.image_size_px % tile:
            raise ValueError(f"eval.image_size_px={self.eval.image_size_px} must be a multiple of {tile}")
        if self.model.num_experts % self.train.expert_parallel:
            raise ValueError(
                f"train.expert_parallel={self.train.expert_parallel} must divide "
                f"model.num_experts={self.model.num_experts}"
            )
        ranks = self.train.nnodes * self.train.nproc_per_node
        for i, stage in enumerate(self.train.stages):
            if stage.batch_size % ranks:
                raise ValueError(
                    f"train.stages[{i}].batch_size={stage.batch_size} must be a multiple of the {ranks} ranks "
                    f"(train.nnodes={self.train.nnodes} x train.nproc_per_node={self.train.nproc_per_node})"
                )
        return self


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Loads recipes/NAME.yaml or a path, applies overrides such as `train.stages[0].steps=200`, and checks it all.

    Raises:
        ValueError: one message that names the key, the value and what would be valid.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name_or_path}.yaml"
    if name_or_path not in known:
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"recipe {name_or_path!r} is neither one of {', '.join(known)} nor a file")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(_explain(path, error)) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\[\d+\])*(\.[A-Za-z_]\w*(\[\d+\])*)*", key):
        raise ValueError(f"override {override!r} must look like train.stages[0].steps=200")
    steps: list[str | int] = [
        int(part) if part.isdigit() else part for part in re.findall(r"[A-Za-z_]\w*|(?<=\[)\d+(?=\])", key)
    ]
    value = yaml.safe_load(text) if text else None
    here: Any = data
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(here, list) or step >= len(here):
                size = len(here) if isinstance(here, list) else 0
                raise ValueError(f"override {override!r}: index [{step}] is out of range, there are {size} entries")
        elif not isinstance(here, dict):
            raise ValueError(f"override {override!r}: {step!r} is below a plain value")
        if last:
            here[step] = value
        elif isinstance(step, int):
            here = here[step]
        else:
            if here.get(step) is None:
                here[step] = {}
            here = here[step]


def _explain(path: Path, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ""
        for step in item["loc"]:
            key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else str(step)
        if item["type"] == "extra_forbidden":
            valid = _valid_keys(item["loc"])
            close = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{key}: unknown key{hint} (valid: {', '.join(valid)})")
        else:
            value = f" (got {item['input']!r})" if item["loc"] and item["type"] != "missing" else ""
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key + ': ' if key else ''}{message}{value if len(value) < 200 else ''}")
    return f"recipe {path.name} is not valid: " + "; ".join(lines)


def _valid_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the section around an unknown key does know."""
    section: Any = Recipe
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        field = getattr(section, "model_fields", {}).get(step)
        if field is None:
            return []
        section = _section_class(field.annotation)
    return sorted(getattr(section, "model_fields", {}))


def _section_class(annotation: Any) -> Any:
    if hasattr(annotation, "model_fields"):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_class(argument)
        if found is not None:
            return found
    return None
