"""The candidates of a choice: one model at other settings, other merges of its checkpoints, or other models.

guidance_scale=3              the model at another setting of the eval section; several joined by +
last_n=8                      another merge (WSM window) of --checkpoints
./DIR, OWNER/NAME@COMMIT      another model
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from eval.config import EvalConfig
from model.config import MergeConfig, TransformerConfig
from tasks.evaluation import models, plan
from tasks.evaluation.models import Model

INCUMBENT, WINDOW = "incumbent", "last_n"


class Candidate(BaseModel):
    """`merge`: how to merge checkpoints of `transformer`; None: use `model` unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    model: Model
    config: EvalConfig
    merge: MergeConfig | None = None
    transformer: TransformerConfig | None = None


def plan_candidates(
    model: Model,
    benchmark: str,
    candidates: str,
    recipe: str,
    overrides: Sequence[str],
    judges: str,
    local: bool = True,
) -> list[Candidate]:
    """The incumbent (`model` with the settings from `plan.plan_benchmarks`), then the candidates.

    Args:
        candidates: separated by commas; see the top of this file.
        recipe: has the settings, and for merges the transformer.

    Raises:
        ValueError: no candidates, a repeated one, an unknown setting, or a merge without recipe or components.
    """
    from tasks.recipe import load_recipe

    names = [name.strip() for name in candidates.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"candidates={candidates!r} must be different ones, separated by commas, such as guidance_scale=3"
        )
    loaded = load_recipe(recipe, []) if recipe else None
    base = loaded.eval.model_dump(mode="json") if loaded else models.published_settings(model) or {}

    def configured(changes: Sequence[str]) -> EvalConfig:
        changes = [*overrides, "prompt_set=development", *changes]
        (config,) = plan.plan_benchmarks(benchmark, base, changes, judges, packaged=local)
        return config

    planned = [Candidate(name=INCUMBENT, model=model, config=configured([]))]
    for name in names:
        key, equals, value = name.partition("=")
        if not equals:
            planned.append(Candidate(name=name, model=models.resolve(name, local=local), config=configured([])))
        elif key == WINDOW:
            if loaded is None or not model.components or not value.isdecimal():
                raise ValueError(
                    f"candidate {name!r} is another merge: it needs a whole number, merged weights with components as the "
                    "model, --checkpoints, and the recipe that they were trained with"
                )
            merge = MergeConfig(**loaded.merge.model_dump() | {WINDOW: int(value)})
            transformer = plan_transformer(loaded)
            planned.append(
                Candidate(name=name, model=model, config=configured([]), merge=merge, transformer=transformer)
            )
        else:
            planned.append(Candidate(name=name, model=model, config=configured(name.split("+"))))
    return planned


def plan_transformer(recipe) -> TransformerConfig:
    """The transformer of a recipe's last stage, to which its checkpoints belong."""
    from tasks.planning.sections import stages

    return stages(recipe)[-1].train.model
