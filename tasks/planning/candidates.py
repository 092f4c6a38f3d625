"""The candidates of a choice: other settings of a model, other merges of its checkpoints, or other models.

guidance_scale=3              the model at another setting of the eval section; several joined by +
last_n=8                      another merge (WSM window) of --checkpoints; may be joined with settings too
./CHECKPOINTS                 the recipe's merge of another training's checkpoints
./MERGED                      merged weights
./PIPELINE, OWNER/NAME@COMMIT another pipeline

Paths may be s3:// URIs. Merges and merged weights need the components with which they were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.config import EvalConfig
from model import storage
from model.config import MergeConfig, TransformerConfig
from tasks.evaluation import models, plan
from tasks.evaluation.models import Model
from tasks.recipe import Recipe, load_recipe

INCUMBENT, WINDOW = "incumbent", "last_n"


class Merge(BaseModel):
    """A candidate that is merged first. `checkpoints`: their path or URI; "": the workflow's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: MergeConfig
    transformer: TransformerConfig
    components: str
    checkpoints: str = ""


class Candidate(BaseModel):
    """Either `model` or `merge`, which is scored with `config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    config: EvalConfig
    model: Model | None = None
    merge: Merge | None = None


def plan_candidates(
    model: Model,
    benchmark: str,
    candidates: str,
    recipe: str,
    overrides: Sequence[str],
    judges: str,
    components: str = "",
    local: bool = True,
) -> list[Candidate]:
    """The incumbent (`model` with the settings from `plan.plan_benchmarks`), then the candidates.

    Args:
        candidates: separated by commas; see the top of this file.
        recipe: has the settings, and for merges the transformer.
        components: a sealed directory of kind components, for merges and merged weights.

    Raises:
        ValueError: no candidates, a repeated one, an unknown setting, or a merge without recipe or components.
    """
    names = [name.strip() for name in candidates.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"candidates={candidates!r} must be different ones, separated by commas, such as guidance_scale=3"
        )
    loaded = load_recipe(recipe, []) if recipe else None
    base = loaded.eval.model_dump(mode="json") if loaded else models.published_settings(model) or {}
    components = components or model.components

    def configured(changes: Sequence[str] = ()) -> EvalConfig:
        changes = [*overrides, "prompt_set=development", *changes]
        (config,) = plan.plan_benchmarks(benchmark, base, changes, judges, packaged=local)
        return config

    planned = [Candidate(name=INCUMBENT, config=configured(), model=model)]
    for name in names:
        if "=" in name and not (name.startswith(("/", "./", "../")) or storage.is_remote(name)):
            changes = [change.strip() for change in name.split("+")]
            windows = [change for change in changes if change.partition("=")[0] == WINDOW]
            config = configured([change for change in changes if change not in windows])
            if windows:
                merge = _merge(name, loaded, components, windows[-1].partition("=")[2])
                planned.append(Candidate(name=name, config=config, merge=merge))
            else:
                planned.append(Candidate(name=name, config=config, model=model))
            continue
        kind = models.kind_of(name)
        if kind == "checkpoints":
            place = name if storage.is_remote(name) else str(Path(name).resolve())
            merge = _merge(name, loaded, components).model_copy(update={"checkpoints": place})
            planned.append(Candidate(name=name, config=configured(), merge=merge))
            continue
        if kind == "merged" and not components:
            raise ValueError(f"candidate {name!r} is merged weights: name their components too (--components DIR)")
        other = models.resolve(name, components=components if kind == "merged" else "", local=local)
        planned.append(Candidate(name=name, config=configured(), model=other))
    return planned


def _merge(name: str, recipe: Recipe | None, components: str, last_n: str | None = None) -> Merge:
    """The recipe's merge, with the window `last_n` if given."""
    if recipe is None or not components:
        raise ValueError(
            f"candidate {name!r} is another merge: it needs the components and the recipe that the checkpoints were trained "
            "with (--components, --recipe)"
        )
    if models.kind_of(components) != "components":
        raise ValueError(f"{components} is not a sealed directory of kind components, which candidate {name!r} needs")
    values = recipe.merge.model_dump() | ({} if last_n is None else {WINDOW: last_n})
    try:
        config = MergeConfig(**values)
    except ValidationError as error:
        raise ValueError(f"candidate {name!r}: {WINDOW}: {error.errors()[0]['msg']}") from None
    place = components if storage.is_remote(components) else str(Path(components).resolve())
    return Merge(config=config, transformer=plan_transformer(recipe), components=place)


def plan_transformer(recipe: Recipe) -> TransformerConfig:
    """The transformer of a recipe's last stage, to which its checkpoints belong."""
    from tasks.planning.sections import stages

    return stages(recipe)[-1].train.model
