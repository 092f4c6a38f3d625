"""Chooses a setting, merge or checkpoint on development prompts, by a statistical test against the one in use.

    pyflyte run workflows/choose_candidate.py choose_candidate --model newest --benchmark shapes \\
        --candidates guidance_scale=3,guidance_scale=5
    pyflyte run workflows/choose_candidate.py choose_candidate --model newest --recipe tiny --benchmark shapes \\
        --components .nucleus/artifacts/components/DIGEST --checkpoints .nucleus/artifacts/checkpoints/DIGEST \\
        --candidates last_n=4,last_n=8
    pyflyte run workflows/choose_candidate.py choose_candidate --model newest --recipe tiny --benchmark shapes \\
        --components .nucleus/artifacts/components/DIGEST --candidates .nucleus/artifacts/merged/DIGEST,./other_pipeline

    incumbent, candidates --> a scorecard each --max-T test--> the best candidate that beats the incumbent, or the
    incumbent

Then score the choice once on official prompts: workflows/evaluate.py.
"""

from __future__ import annotations

from typing import Optional, Union

from flytekit import dynamic, workflow
from flytekit.types.directory import FlyteDirectory

from tasks import envs
from tasks.artifacts import CheckpointsDir, CuratedDir, plain_errors
from tasks.evaluation.task import Choice, choose_scorecard, resolve_incumbent
from tasks.merging.task import merge_checkpoints
from tasks.planning.candidates import Candidate
from tasks.planning.task import plan_candidates
from workflows.evaluate import score_merged, score_model


@dynamic(**envs.dynamic("evaluator"))
def score_candidates(
    candidates: list[Candidate],
    parts_per_seed: int,
    checkpoints: Optional[CheckpointsDir] = None,
    curated: Optional[CuratedDir] = None,
) -> Choice:
    """A scorecard for each candidate, and the choice between them."""
    with plain_errors():
        for candidate in candidates:
            if candidate.merge is not None and not candidate.merge.checkpoints and checkpoints is None:
                raise ValueError(f"candidate {candidate.name} is another merge: give --checkpoints")
    scorecards = []
    for candidate in candidates:
        if candidate.merge is not None:
            merge = candidate.merge
            merged = merge_checkpoints(
                checkpoints=FlyteDirectory(merge.checkpoints) if merge.checkpoints else checkpoints,
                model=merge.transformer,
                config=merge.config,
            )
            scorecard = score_merged(
                merged=merged,
                components=FlyteDirectory(merge.components),
                config=candidate.config,
                curated=curated,
                parts_per_seed=parts_per_seed,
            )
        else:
            scorecard = score_model(
                model=candidate.model,
                digest=candidate.model.digest,
                config=candidate.config,
                parts_per_seed=parts_per_seed,
                curated=curated,
            )
        scorecards.append(scorecard)
    return choose_scorecard(names=[candidate.name for candidate in candidates], scorecards=scorecards)


@workflow
def choose_candidate(
    model: str,
    candidates: str,
    benchmark: str,
    revision: str = "",
    components: str = "",
    recipe: str = "",
    overrides: Union[list[str], str] = [],
    judges: str = "",
    parts_per_seed: int = 1,
    checkpoints: Optional[CheckpointsDir] = None,
    curated: Optional[CuratedDir] = None,
) -> Choice:
    """Chooses between a model and candidates to replace it.

    Args:
        model: see workflows/evaluate.py; it is the incumbent.
        candidates: separated by commas: another setting (guidance_scale=3; several joined by +), another merge of
            `checkpoints` (last_n=8), or the place of another pipeline, of merged weights, or of another training's checkpoints,
            which are merged as the recipe says.
        benchmark: one that has development prompts, or any with prompts_file in `overrides`.
        revision: the commit of a Hub id; default: the newest.
        components: a sealed directory of kind components, for merges and merged weights, the model's or a candidate's.
        recipe: its eval section has the settings, and its model is that of the merges.
        overrides: a setting of all candidates, or a JSON list of them. May be given several times.
        judges: see workflows/evaluate.py.
        parts_per_seed: number of map tasks that sample the images of one seed.
        checkpoints: a sealed directory of kind checkpoints, for merges.
        curated: a sealed directory of kind curated, for the captions benchmark.
    """
    resolved = resolve_incumbent(model=model, revision=revision, components=components)
    planned = plan_candidates(
        model=resolved,
        benchmark=benchmark,
        candidates=candidates,
        recipe=recipe,
        overrides=overrides,
        judges=judges,
        components=components,
    )
    return score_candidates(
        candidates=planned,
        parts_per_seed=parts_per_seed,
        checkpoints=checkpoints,
        curated=curated,
    )
