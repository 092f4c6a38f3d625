"""Generated images, answers about them, their scores, and a gate that a drop fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flytekit import Deck, task

from eval.config import EvalConfig
from tasks import envs
from tasks.artifacts import (
    AnswersDir,
    ComponentsDir,
    ImagesDir,
    MergedDir,
    PipelineDir,
    ScorecardDir,
    exclusive,
    fetch,
    plain_errors,
    produce,
    work_path,
)
from tasks.evaluation.evaluate import Part


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_images(merged: MergedDir, components: ComponentsDir, config: EvalConfig, seed: int) -> ImagesDir:
    """One seed's images for every prompt of the benchmark, sampled through diffusers' pipeline."""
    from tasks.evaluation import evaluate

    merged_path, components_path = fetch(merged, "merged"), fetch(components, "components")
    return _images(
        [merged_path, components_path],
        {"eval": config.model_dump(mode="json"), "seed": seed},
        lambda work, out: evaluate.generate_seed(merged_path, components_path, config, seed, work, out),
    )


@task(**envs.light("evaluator"))
def plan_parts(config: EvalConfig, parts_per_seed: int) -> list[Part]:
    """What `generate_part` and its like are mapped over: shares of the batches of each seed."""
    from tasks.evaluation import evaluate

    with plain_errors():
        return evaluate.plan_parts(config, parts_per_seed)


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_part(merged: MergedDir, components: ComponentsDir, config: EvalConfig, part: Part) -> ImagesDir:
    """One part of a seed's images, of merged weights with their components."""
    from tasks.evaluation import evaluate

    merged_path, components_path = fetch(merged, "merged"), fetch(components, "components")
    return _images(
        [merged_path, components_path],
        {"eval": config.model_dump(mode="json"), "part": part.model_dump()},
        lambda work, out: evaluate.generate_part(merged_path, components_path, config, part, work, out),
    )


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_from_pipeline(pipeline: PipelineDir, config: EvalConfig, part: Part) -> ImagesDir:
    """One part of a seed's images, of a published pipeline."""
    from tasks.evaluation import evaluate

    path = fetch(pipeline, "pipeline")
    return _images(
        [path],
        {"eval": config.model_dump(mode="json"), "part": part.model_dump()},
        lambda work, out: evaluate.generate_from_pipeline(path, config, part, work, out),
    )


@task(**envs.light("evaluator"))
def resolve_model(model: str, revision: str) -> str:
    """What names the weights of a directory or Hub id for good. Not cached: a directory may have changed."""
    from eval.pipelines import resolve

    with plain_errors():
        return resolve(model, revision or None)


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_from_model(model: str, digest: str, config: EvalConfig, part: Part) -> ImagesDir:
    """One part of a seed's images, of any diffusers pipeline; `digest` is `resolve_model`'s."""
    from tasks.evaluation import evaluate

    return _images(
        [],
        {"eval": config.model_dump(mode="json"), "part": part.model_dump(), "digest": digest},
        lambda work, out: evaluate.generate_from_model(model, digest, config, part, work, out),
    )


def _images(parents: Sequence[Path], section: dict[str, Any], make: Callable[[Path, Path], dict[str, Any]]) -> Any:
    """Seals what `make` samples; a killed attempt's images are kept for the next."""
    work_dir = work_path("images", "evaluation", section, parents)
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "images",
            lambda out: make(work_dir, out),
            parents=parents,
            config=section,
            counts=lambda report: {"images": int(report["images"])},
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def judge_images(images: list[ImagesDir], config: EvalConfig) -> AnswersDir:
    """The judges' answers about all images; a killed attempt's answers are kept for the next."""
    from tasks.evaluation import evaluate

    paths = [fetch(part, "images") for part in images]
    section = config.model_dump(mode="json")
    work_dir = work_path("answers", "evaluation", section, paths)
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "answers", lambda out: evaluate.judge(paths, config, work_dir, out), parents=paths, config=section
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("evaluation"), enable_deck=True, **envs.gather("evaluator"))
def score_images(images: list[ImagesDir], config: EvalConfig) -> ScorecardDir:
    """Scores of all seeds, by judges that need no accelerator: means, noises, intervals, a gallery to look at."""
    from tasks.evaluation import evaluate

    paths = [fetch(part, "images") for part in images]
    artifact, final, _ = produce(
        "scorecard", lambda out: evaluate.score(paths, config, out), parents=paths, config=config
    )
    _deck(final)
    return artifact


@task(cache=envs.cache("evaluation"), enable_deck=True, **envs.gather("evaluator"))
def score_answers(images: list[ImagesDir], answers: AnswersDir, config: EvalConfig) -> ScorecardDir:
    """The same from answers: neither weights nor an accelerator are needed."""
    from tasks.evaluation import evaluate

    paths, judged = [fetch(part, "images") for part in images], fetch(answers, "answers")
    artifact, final, _ = produce(
        "scorecard", lambda out: evaluate.score(paths, config, out, judged), parents=[*paths, judged], config=config
    )
    _deck(final)
    return artifact


def _deck(scorecard: Path) -> None:
    Deck("Scorecard", (Path(scorecard) / "scorecard.html").read_text())


@task(**envs.light("evaluator"))
def gate(scorecard: ScorecardDir, incumbent: ScorecardDir) -> str:
    """Fails where the score is worse than the incumbent's beyond noise: the last task, when the scorecard is stored."""
    from tasks.evaluation import evaluate

    current, before = fetch(scorecard, "scorecard"), fetch(incumbent, "scorecard")
    with plain_errors():
        sentence = evaluate.check_drop(before, current)
    print(sentence, flush=True)
    return sentence


@task(cache=envs.cache("evaluation"), **envs.light("evaluator"))
def choose_candidate(incumbent: ScorecardDir, candidates: list[ScorecardDir]) -> int:
    """Index of the candidate that beats the incumbent on development prompts; -1 keeps the incumbent."""
    from eval.select_candidate import select_candidate

    paths = [fetch(candidate, "scorecard") for candidate in candidates]
    with plain_errors():
        selection = select_candidate(fetch(incumbent, "scorecard"), paths)
    print(selection.sentence, flush=True)
    return next((i for i, path in enumerate(paths) if str(path) == selection.chosen), -1)
