"""Collects the numbers of one run that a study compares: scores, losses, cost, routing. Trains nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from eval.files import read_json_lines
from eval.scorecards.card import scored_by
from model.constants import TILE_PX
from model.stages import TrainingStage, training_stages
from tasks.compare import losses_before_guidance, scores_of
from tasks.manifest import as_parent
from tasks.recipe import Recipe
from tasks.study.config import StudyRun

MAX_POINTS = 400  # points of a loss curve
IMAGES, TIMESTEPS = 4, 5  # images on which routing is measured
# Name in a study -> mean over layers of model/routing_report.py.
ROUTING = {
    "routing_stability": "jaccard",
    "routing_stability_by_chance": "jaccard_by_chance",
    "gate_stability": "cosine",
    "router_similarity": "router_row_cosine",
    "expert_similarity": "expert_output_cosine",
}


def describe_run(
    run: StudyRun, recipe: Recipe, checkpoints: list[Path], merged: Path, latents: Path, scorecard: Path
) -> dict[str, Any]:
    """
    Args:
        checkpoints: of each stage, in order; their weights are not read.
        latents: of the last stage.

    Returns:
        JSON-able: variant, seed, settings, scores, losses [[step, loss]] of the last stage before its guidance, cost,
        routing, timing (values that depend on the machine), parents.
    """
    card = json.loads((scorecard / "scorecard.json").read_text())
    reports = [json.loads((path / "report.json").read_text()) for path in checkpoints]
    lines = [row for _, row in read_json_lines(checkpoints[-1] / "metrics.jsonl")]
    stages = training_stages(recipe.model, recipe.train)
    losses = losses_before_guidance(lines, recipe.train.stages[-1].model_dump(mode="json"))
    every = max(1, len(losses) // MAX_POINTS)
    return {
        "variant": run.variant,
        "seed": run.seed,
        "settings": recipe.model_dump(mode="json"),
        "scored_by": scored_by(card),
        "scores": scores_of(card),
        "losses": [list(point) for point in losses[::every]],
        "cost": {
            "steps": sum(report["steps"] for report in reports),
            "images": sum(report["images_seen"] for report in reports),
            "training_flops": sum(training_flops(stage, recipe.encoding.max_text_tokens) for stage in stages),
            "parameters": reports[-1]["parameters"],
            "active_parameters": reports[-1]["active_parameters"],
            "skipped_steps": sum(report["skipped_steps"] for report in reports),
        },
        "routing": measure_routing(merged, latents, recipe),
        "timing": {
            "minutes": sum(report["train_s"] for report in reports) / 60,
            "device": reports[-1]["device"],
            "ranks": reports[-1]["ranks"],
        },
        "parents": [as_parent(scorecard).model_dump(), as_parent(merged).model_dump()],
    }


def training_flops(stage: TrainingStage, text_tokens: int) -> int:
    """FLOPs of all steps of a stage, forward and backward, as the planner counts them: square images, texts at full length."""
    from model.plan.planner import forward_flops, passes

    tokens = (stage.stage.image_size_px * 2 // (TILE_PX * stage.model.patch_size)) ** 2
    fp32 = stage.train.dtype == "float32"
    forward = forward_flops(stage.model, tokens, text_tokens, stage.stage.batch_size, fp32)
    return round(passes(stage.stage) * sum(forward.values()) * stage.stage.steps)


def measure_routing(merged: Path, latents: Path, recipe: Recipe) -> dict[str, float]:
    """Stability of routing over timesteps and similarity of experts (1: all equal); empty without MoE layers."""
    from model.routing_report import analyse, find_transformer

    if not any(recipe.model.is_moe_layer(layer) for layer in range(recipe.model.num_layers)):
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        report = analyse(find_transformer(merged), latents, Path(scratch) / "routing", IMAGES, TIMESTEPS, seed=0)
    return {name: report["mean"][key] for name, key in ROUTING.items()}
