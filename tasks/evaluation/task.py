"""Tasks of evaluation: prompts, images, answers, scores, a choice between scorecards, and a gate that fails on a
drop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from flytekit import Deck, task
from flytekit.types.directory import FlyteDirectory

from eval import html_page
from eval.config import EvalConfig
from eval.scorecards import card as cards
from tasks import envs
from tasks.artifacts import (
    AnswersDir,
    ComponentsDir,
    CuratedDir,
    ImagesDir,
    MergedDir,
    PromptsDir,
    ScorecardDir,
    exclusive,
    fetch,
    is_local,
    plain_errors,
    produce,
    work_path,
)
from tasks.artifacts import source as source_of
from tasks.evaluation.models import Model
from tasks.evaluation.plan import ImagesPart
from tasks.manifest import load_manifest


@task(**envs.light("evaluator"))
def resolve_model(model: str, revision: str, components: str) -> Model:
    """Resolves a model to a digest of its weights. Not cached: a location may have other weights by now."""
    from tasks.evaluation import models

    with plain_errors():
        return models.resolve(model, revision, components, local=is_local())


@task(**envs.light("evaluator"))
def resolve_incumbent(model: str, revision: str, components: str) -> Model:
    """`resolve_model` for the incumbent. `components` are for merged weights, of the incumbent or a candidate."""
    from tasks.evaluation import models

    with plain_errors():
        return models.resolve_incumbent(model, revision, components, local=is_local())


class Generation(NamedTuple):
    """The parts over which `generate_part` and `generate_from_model` are mapped, shares of the batches of each seed; and
    their configuration. Flyte hashes all of a configuration, so that one with other settings would sample again."""

    parts: list[ImagesPart]
    config: EvalConfig


@task(**envs.light("evaluator"))
def plan_generation(config: EvalConfig, parts_per_seed: int) -> Generation:
    """The inputs of `make_prompts`, `generate_part` and `generate_from_model`."""
    from tasks.evaluation import plan

    with plain_errors():
        return Generation(plan.plan_parts(config, parts_per_seed), plan.generation_config(config))


@task(cache=envs.cache("prompts"), **envs.gather("evaluator"))
def make_prompts(config: EvalConfig, curated: Optional[CuratedDir] = None) -> PromptsDir:
    """The benchmark's prompts, downloaded at the official commit; for captions, those of held-out images."""
    from tasks.curation.curated import LARGE_FILES
    from tasks.evaluation import plan, prompts

    config = plan.generation_config(config)
    needs_corpus = config.benchmark == prompts.CAPTIONS and config.prompts_file is None
    corpus = fetch(curated, "curated", LARGE_FILES) if curated is not None and needs_corpus else None
    artifact, _, _ = produce(
        "prompts",
        lambda out: prompts.write_prompts(config, out, corpus),
        parents=[corpus] if corpus else [],
        config={"eval": prompts.deciding(config)},
        counts=lambda report: report,
    )
    return artifact


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def generate_part(
    merged: MergedDir, components: ComponentsDir, prompts: PromptsDir, config: EvalConfig, part: ImagesPart
) -> ImagesDir:
    """Generates one part of a seed's images from merged weights and components, through diffusers' pipeline."""
    from tasks.evaluation import evaluate

    paths = fetch(merged, "merged"), fetch(components, "components"), fetch(prompts, "prompts")
    return _images(
        paths, config, part, {}, lambda given, work, out: evaluate.generate_part(*paths, given, part, work, out)
    )


@task(cache=envs.cache("evaluation", ignored_inputs=("model",)), **envs.gpu_single("evaluator"))
def generate_from_model(
    model: Model, digest: str, prompts: PromptsDir, config: EvalConfig, part: ImagesPart
) -> ImagesDir:
    """Generates one part of a seed's images from any diffusers pipeline. `digest` identifies the model; its location is
    not part of the cache key."""
    from tasks.evaluation import evaluate

    assert digest == model.digest, "the cache knows the model by its digest"
    path = fetch(prompts, "prompts")
    return _images(
        [path],
        config,
        part,
        {"digest": digest},
        lambda given, work, out: evaluate.generate_from_model(model, path, given, part, work, out),
    )


def _images(
    parents: Sequence[Path],
    config: EvalConfig,
    part: ImagesPart,
    more: dict[str, Any],
    make: Callable[[EvalConfig, Path, Path], dict[str, Any]],
) -> Any:
    """Seals the images that `make` samples; a killed attempt's images are kept for the next."""
    from tasks.evaluation import plan

    config = plan.generation_config(config)
    section = {"eval": config.model_dump(mode="json"), "part": part.model_dump(), **more}
    work_dir = work_path("images", "evaluation", section, parents)
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "images",
            lambda out: make(config, work_dir, out),
            parents=parents,
            config=section,
            counts=lambda report: {"images": int(report["images"])},
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("evaluation"), **envs.gpu_single("evaluator"))
def judge_images(images: list[ImagesDir], prompts: PromptsDir, config: EvalConfig) -> AnswersDir:
    """Judges all images; a killed attempt's answers are kept for the next, and those of other runs are reused."""
    from tasks.evaluation import evaluate, plan

    parts, asked = [fetch(part, "images") for part in images], fetch(prompts, "prompts")
    section = plan.judging_config(config).model_dump(mode="json")
    work_dir = work_path("answers", "evaluation", section, [*parts, asked])
    with exclusive(work_dir):
        artifact, _, _ = produce(
            "answers",
            lambda out: evaluate.judge(parts, asked, config, work_dir, out),
            parents=[*parts, asked],
            config=section,
        )
        shutil.rmtree(work_dir, ignore_errors=True)
    return artifact


@task(cache=envs.cache("evaluation"), enable_deck=True, **envs.gather("evaluator"))
def score_answers(
    images: list[ImagesDir], prompts: PromptsDir, answers: AnswersDir, config: EvalConfig
) -> ScorecardDir:
    """Writes the scorecard: means, noise, intervals and a gallery. Needs neither weights nor an accelerator."""
    from tasks.evaluation import evaluate

    parts, asked, judged = [fetch(p, "images") for p in images], fetch(prompts, "prompts"), fetch(answers, "answers")
    artifact, final, _ = produce(
        "scorecard",
        lambda out: evaluate.score(parts, asked, config, judged, out),
        parents=[*parts, asked, judged],
        config=config,
    )
    Deck("Scorecard", (final / "scorecard.html").read_text())
    return artifact


@task(**envs.light("evaluator"))
def gate(scorecard: ScorecardDir, incumbent: ScorecardDir) -> str:
    """Fails if the score is lower than the incumbent's beyond noise. The last task, after the scorecard is stored."""
    from tasks.evaluation import evaluate

    current, before = _scores(scorecard), _scores(incumbent)
    with plain_errors():
        _, sentence = evaluate.check_drop(before, current)
    print(sentence, flush=True)
    return sentence


def _scores(scorecard: Any) -> Path:
    """A scorecard without its images and pages, which no comparison reads."""
    return fetch(scorecard, "scorecard", without=(".png", ".html"))


@task(**envs.light("evaluator"))
def find_changed(source: str, model: Model, configs: list[EvalConfig]) -> list[EvalConfig]:
    """The configurations for which the store has no score of this model, as the last one of `source`."""
    from tasks.evaluation import history

    changed = [config for config in configs if not history.is_known(source, model, config)]
    if not changed:
        print(f"{source} is still {model.digest[:16]}, which was scored: nothing to do", flush=True)
    return changed


@task(**envs.light("evaluator"))
def store_score(source: str, model: Model, config: EvalConfig, scorecard: ScorecardDir) -> str:
    """Records the scorecard; returns the input of `gate_scores`, as JSON."""
    from tasks.evaluation import history

    card = cards.load(_scores(scorecard))  # verified, so that the recorded scorecard can be read
    return history.store_score(source, model, config, source_of(scorecard), card)


@task(enable_deck=True, **envs.light("evaluator"))
def gate_scores(stored: list[str]) -> list[str]:
    """Fails if any score is lower than the reference of its kind beyond noise. Says which scores were not compared, and
    why."""
    from tasks.evaluation import history

    rows: list[tuple[str]] = []

    def log(sentence: str) -> None:
        print(sentence, flush=True)
        rows.append((sentence,))

    try:
        with plain_errors():
            return history.gate(stored, lambda uri: _scores(FlyteDirectory(uri)), log)
    finally:
        Deck("Gate", html_page.page("Gate", html_page.table(["scores of this night"], rows)))


class Choice(NamedTuple):
    """The name of the chosen candidate, or "incumbent" if none beats it, and the reason."""

    chosen: str
    sentence: str


@task(**envs.light("evaluator"))
def choose_scorecard(names: list[str], scorecards: list[ScorecardDir]) -> Choice:
    """Chooses the candidate that beats the incumbent (the first scorecard) on development prompts.

    A candidate with the scorecard of one before it, such as the incumbent's own setting, is the same candidate.
    """
    from eval.scorecards.select_candidate import lines, select_candidate

    paths: dict[str, Path] = {}
    same: list[str] = []
    for name, scorecard in zip(names, scorecards, strict=True):
        path = _scores(scorecard)
        twin = next(
            (other for other in paths if load_manifest(paths[other]).digest == load_manifest(path).digest), None
        )
        if twin is None:
            paths[name] = path
        else:
            same.append(f"{name} is the same as {twin}")
    incumbent, *others = paths
    if not others:
        return Choice(incumbent, f"the incumbent stays: {', '.join(same)}")
    with plain_errors():
        selection = select_candidate(paths[incumbent], [paths[name] for name in others])
    names_of = {str(path): name for name, path in paths.items()}
    chosen = names_of[selection.chosen]
    sentence = "; ".join([f"{selection.name}: {selection.sentence.replace(selection.chosen, chosen)}", *same])
    print("\n".join([sentence, *lines(selection, names_of)]), flush=True)
    return Choice(chosen, sentence)
