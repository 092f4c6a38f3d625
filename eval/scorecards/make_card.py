"""Makes the scorecard of judged images: scores with their error bars, and everything that they depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval import catalog, stats
from eval.benchmarks.base import Benchmark, Judged, Mode, Pooling, mean
from eval.config import EvalConfig
from eval.geneval import expected_images
from eval.judging.protocols import category_of, digest_of, score_name
from eval.judging.run import BLACK, Row, expected_count, has_score, prompt_scores
from eval.modes import MODES
from eval.scorecards.card import (
    CategoryScore,
    Comparison,
    Counts,
    Interval,
    JudgeRecord,
    Noise,
    Scorecard,
    Scores,
    Settings,
    not_comparable,
)


def scorecard(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    generation: Mapping[str, Any] | None = None,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
    answered: Mapping[int, Mapping[str, Judged]] | None = None,
) -> Scorecard:
    """The scores with their error bars, and everything that they depend on.

    Args:
        rows: of `score_rows`.
        prompts: all expected prompts, with ids.
        generation: content of generation.json.
        judges: {skill: {"name", "model", "revision", "spec"}}.
        answered: of `judged_prompts`, for the official aggregates.

    Raises:
        ValueError: no image could be scored.
    """
    benchmark = catalog.benchmark(config.benchmark)
    pooling = benchmark.pooling
    scored = [row for row in rows if has_score(row, pooling)]
    readable = [row for row in rows if not row["error"]]
    black = sum(row["error"] == BLACK for row in rows)
    expected = expected_count(prompts, config)
    seen = [row for row in scored if row["split"] != "held_out"]
    held_out = [row for row in scored if row["split"] == "held_out"]
    if not seen:
        raise ValueError(f"none of {expected} images could be scored")
    summaries = {mode: _summaries(benchmark, prompts, answered or {}, mode) for mode in MODES}
    aggregates = {mode: _over_seeds(summaries[mode]) for mode in MODES}
    main_scores = _scores(seen, prompts, pooling, aggregates)
    name = score_name(benchmark, judges or {})
    wanted = dict.fromkeys(category_of(p) for p in prompts if p.get("split") != "held_out")
    present = {row["category"] for row in readable if row["split"] != "held_out"}
    generation = dict(generation or {})
    return Scorecard(
        name=name,
        benchmark=benchmark.name,
        version=benchmark.version,
        scale=benchmark.scale,
        pooling=pooling,
        overall=main_scores.overall,
        tasks=main_scores.tasks,
        image_accuracy=main_scores.image_accuracy,
        prompt_accuracy=main_scores.prompt_accuracy,
        held_out=_scores(held_out, prompts, pooling, {}) if held_out else None,
        official=aggregates["official"],
        fixed=aggregates["fixed"],
        missing_tasks=[tag for tag in wanted if tag not in present],
        counts=Counts(
            expected=expected,
            generated=len(rows),
            scored=len(scored),
            failed=max(0, expected - len(readable)),
        ),
        deviations=[
            *_not_judged(benchmark, judges or {}),
            *_other_words(benchmark, answered or {}),
            *_deviations(benchmark, config, generation, prompts),
            *_absent(rows, prompts, config),
            *(
                f"seed {seed}: {note}"
                for seed, summary in summaries["official"].items()
                for note in summary.get("notes", ())
            ),
            *([f"{black} black images were left out, as the official code does"] if black else []),
        ],
        seeds=list(config.seeds),
        interval=Interval(),
        settings=_settings(rows, prompts, config, generation, benchmark, judges or {}),
        references=_references(benchmark, name, main_scores, aggregates["official"]),
        measures=_measures(benchmark, prompts, answered or {}),
        config=config.model_dump(mode="json"),
        generation=generation,
    )


def _summaries(
    benchmark: Benchmark, prompts: Sequence[Mapping[str, Any]], answered: Mapping[int, Mapping[str, Judged]], mode: Mode
) -> dict[int, dict[str, Any]]:
    return {
        seed: benchmark.summarise(prompts, judged, mode)
        for seed, of_seed in answered.items()
        if (judged := with_images(of_seed))
    }


def _over_seeds(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The means of the seeds' summaries, {"overall", "categories"}; a score is None if the official code stops at one of
    them. None without summaries."""
    if not summaries:
        return None
    names = dict.fromkeys(name for summary in summaries.values() for name in summary["categories"])

    def over_seeds(values: Sequence[float | None]) -> float | None:
        return None if None in values else mean(values)

    return {
        "overall": over_seeds([summary["score"] for summary in summaries.values()]),
        "categories": {
            name: over_seeds([s["categories"][name] for s in summaries.values() if name in s["categories"]])
            for name in names
        },
    }


def with_images(of_seed: Mapping[str, Judged]) -> dict[str, Judged]:
    """The prompts of a seed with at least one image that was judged or left out by the rule; none if no image of the seed
    was judged, since rules have no score without an answer."""
    if not any(any(one.images) or one.together for one in of_seed.values()):
        return {}
    return {
        key: value
        for key, value in of_seed.items()
        if value.left_out or any(image is not None for image in value.images)
    }


def _measures(
    benchmark: Benchmark, prompts: Sequence[Mapping[str, Any]], answered: Mapping[int, Mapping[str, Judged]]
) -> dict[str, float]:
    of_seeds = [benchmark.measures(prompts, of_seed) for of_seed in answered.values()]
    names = dict.fromkeys(name for one in of_seeds for name in one)
    values = {name: [one[name] for one in of_seeds if name in one] for name in names}
    return {name: sum(of) / len(of) for name, of in values.items()}


def with_training_noise(card: Scorecard, others: Sequence[Scorecard]) -> Scorecard:
    """The card with the deviation of the overall score over its own training run and others of the same recipe.

    Raises:
        ValueError: another card has other prompts or judges, or the same weights.
    """
    for other in others:
        if reason := not_comparable(card, other):
            raise ValueError(f"no training run to compare with: {reason}")
        if other.settings.model_digests == card.settings.model_digests:
            raise ValueError(f"both cards are of the weights {card.settings.model_digests}: a training run has its own")
    values = [card.overall.mean, *(other.overall.mean for other in others)]
    spread = stats.over_seeds(dict(enumerate(values)))
    noise = card.overall.noise.model_copy(update={"training": spread["std"], "training_runs": spread["runs"]})
    return card.model_copy(update={"overall": card.overall.model_copy(update={"noise": noise})})


def _scores(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    pooling: Pooling,
    aggregates: Mapping[str, Mapping[str, Any] | None],
) -> Scores:
    order = [category_of(prompt) for prompt in prompts]
    overall, by_category = _estimate(rows, order, pooling)
    seeds = sorted({row["seed"] for row in rows})
    of_seeds = {seed: _estimate([row for row in rows if row["seed"] == seed], order, pooling) for seed in seeds}

    def score(estimate: stats.Estimate, values: dict[int, float], name: str | None) -> CategoryScore:
        whole = name is None and pooling == "parts"
        official = {
            kind: aggregate["overall"] if name is None else aggregate["categories"].get(name)
            for kind, aggregate in aggregates.items()
            if aggregate is not None
        }
        return CategoryScore(
            **{**stats.over_seeds(values), "mean": estimate.mean},
            interval=(estimate.low, estimate.high),
            standard_error=estimate.total,
            noise=Noise(sampling=estimate.sampling, prompts=estimate.prompts),
            # Parts are several scores of one prompt; the estimate counts each.
            prompts=len({row["prompt_id"] for row in rows}) if whole else estimate.n_prompts,
            images=len(rows) if whole else estimate.n_images,
            official=official.get("official"),
            fixed=official.get("fixed"),
        )

    own = [row for row in rows if row["score"] is not None]
    perfect = [row["score"] == 1 for row in own]
    right_prompts: dict[int, bool] = {}
    for row, is_right in zip(own, perfect, strict=True):
        right_prompts[row["prompt_index"]] = right_prompts.get(row["prompt_index"], False) or is_right
    return Scores(
        overall=score(overall, {seed: o.mean for seed, (o, _) in of_seeds.items()}, None),
        tasks={
            name: score(e, {seed: c[name].mean for seed, (_, c) in of_seeds.items() if name in c}, name)
            for name, e in by_category.items()
        },
        image_accuracy=sum(perfect) / max(1, len(perfect)),
        prompt_accuracy=sum(right_prompts.values()) / max(1, len(right_prompts)),
    )


def _estimate(rows: Sequence[Row], order: Sequence[str], pooling: Pooling) -> tuple[stats.Estimate, dict]:
    units = prompt_scores(rows, pooling)
    rank = {name: i for i, name in enumerate(dict.fromkeys(order))}
    names = sorted(units, key=lambda name: (rank.get(name, len(rank)), name))
    groups = {name: [units[name][prompt] for prompt in sorted(units[name])] for name in names}
    return stats.estimate(groups, "prompts" if pooling == "prompts" else "categories")


def _not_judged(benchmark: Benchmark, judges: Mapping[str, Any]) -> list[str]:
    absent = [skill for skill in benchmark.judges if skill in benchmark.optional_judges and skill not in judges]
    return [f"no judge for {', '.join(absent)}: left out"] if absent and judges else []


def _other_words(benchmark: Benchmark, answered: Mapping[int, Mapping[str, Judged]]) -> list[str]:
    """Judges of your own may say yes in another spelling than the rule counts, and score 0."""
    yes = benchmark.vocabulary.get("vqa")
    if yes is None:
        return []
    texts = Counter(
        answer
        for of_seed in answered.values()
        for judged in of_seed.values()
        for answers in judged.images
        for key, answer in (answers or {}).items()
        if key.isdecimal()  # of a numbered question
    )
    others = {text: n for text, n in texts.items() if text.strip(" .").lower() == yes.lower()}
    if not others or yes in texts:
        return []
    most = max(others, key=lambda text: others[text])
    number = sum(others.values())
    return [f"no answer is {yes!r}, and {number} are {most!r} or the like: {benchmark.name} counts only {yes!r}"]


def _deviations(
    benchmark: Benchmark,
    config: EvalConfig,
    generation: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Deviations of this score from the benchmark's rules, listed next to it."""
    deviations = []
    if config.images_per_prompt != benchmark.images_per_prompt:
        deviations.append(f"{config.images_per_prompt} images per prompt, officially {benchmark.images_per_prompt}")
    if config.prompt_set != "official":
        deviations.append("development prompts: a score to choose by, not to report")
    if benchmark.prompt_count and len(prompts) != benchmark.prompt_count:
        deviations.append(f"{len(prompts)} prompts, officially {benchmark.prompt_count}")
    trained_on = sum(bool(prompt.get("trained_on")) for prompt in prompts)
    if trained_on:
        deviations.append(
            f"{trained_on} of {len(prompts)} captions were trained on: the corpus has too few held-out images"
        )
    if generation.get("prompt_rewriting"):
        deviations.append(f"prompts were rewritten (file {generation['prompt_rewriting']['sha256'][:12]})")
    return deviations


def _absent(rows: Sequence[Row], prompts: Sequence[Mapping[str, Any]], config: EvalConfig) -> list[str]:
    """How many images were missing or unreadable, and of which prompt and seed the first ones. Missing ones have no row."""
    present = Counter((row["seed"], row["prompt_id"]) for row in rows if row["error"] in ("", BLACK))
    lost = [
        (prompt["id"], seed, missing)
        for prompt in prompts
        for seed in config.seeds
        if (missing := expected_images(prompt, config.images_per_prompt) - present[seed, prompt["id"]]) > 0
    ]
    count = sum(missing for _, _, missing in lost)
    return (
        [f"{count} missing or unreadable images were left out, the first of prompt {lost[0][0]}, seed {lost[0][1]}"]
        if lost
        else []
    )


def _is_official(benchmark: Benchmark, skill: str, model: str) -> bool | None:
    official = benchmark.judges.get(skill)
    return None if official == "" else official == model


def _settings(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    generation: Mapping[str, Any],
    benchmark: Benchmark,
    judges: Mapping[str, Mapping[str, Any]],
) -> Settings:
    sampler = generation.get("sampler", {})
    digests = sorted((r["seed"], r["prompt_id"], r["image_index"], r["sha256"]) for r in rows)
    return Settings(
        judges=[
            JudgeRecord(role=skill, **judge, official=_is_official(benchmark, skill, judge["model"]))
            for skill, judge in sorted(judges.items())
        ],
        pipeline=sampler.get("pipeline", "unknown"),
        denoiser=sampler.get("denoiser", "unknown"),
        dtype=sampler.get("dtype", "unknown"),
        attention=sampler.get("attention", "unknown"),
        device=sampler.get("device_name", sampler.get("device", "unknown")),
        sampler=sampler.get("scheduler", "unknown"),
        sampler_config=sampler.get("scheduler_config", config.scheduler.model_dump()),
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=sampler.get("negative_prompt", config.negative_prompt or ""),
        prompt_rewriting=generation.get("prompt_rewriting"),
        image_size_px=config.image_size_px,
        seeds=list(config.seeds),
        images_per_prompt=config.images_per_prompt,
        batch_size=config.batch_size,
        prompt_set=config.prompt_set,
        prompt_set_sha256=prompt_set_digest(prompts),
        model_digests={k: str(v) for k, v in sorted(generation.get("provenance", {}).items())},
        images_sha256=digest_of(digests),
        versions={name: sampler[name] for name in ("diffusers", "torch") if name in sampler},
    )


def prompt_set_digest(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Digest of the prompts, their numbers of images and their questions, but not of rewrites."""
    return digest_of([{k: v for k, v in prompt.items() if k != "rewritten"} for prompt in prompts])


def _references(
    benchmark: Benchmark, name: str, scores: Scores, official: Mapping[str, Any] | None
) -> list[Comparison]:
    """Published scores next to what the official code would print here.

    The interval is that of our mean, moved to the official score. If the two are further apart than the interval reaches,
    as where the official score is no mean over prompts, its noise is not known.
    """
    rows = []
    for published in benchmark.published:
        score = scores.overall if published.category == "overall" else scores.tasks.get(published.category)
        ours, within = (official or {"categories": {}})["categories"].get(published.category), None
        if score is not None:
            ours = benchmark.scale * score.mean if official is None else score.official
        if score is not None and ours is not None:
            low, high = (limit * benchmark.scale for limit in score.interval)
            moved = ours - benchmark.scale * score.mean
            if name == benchmark.name and abs(moved) <= (high - low) / 2:
                within = low <= published.score - moved <= high
        rows.append(
            Comparison(
                model=published.model,
                category=published.category,
                published=published.score,
                ours=ours,
                source=published.source,
                within_noise=within,
            )
        )
    return rows
