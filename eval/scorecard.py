"""From a folder of images to a scorecard with error bars.

    DIR/images --judging--> DIR/judged --score_rows--> rows --scorecard--> card --write--> scores.parquet scorecard.json
                                                                                           scorecard.html grid.png

Everything comes from the images and the answers about them, so that an old run can be scored again without a GPU:
python -m eval.cli score DIR [--out DIR2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import catalog, stats
from eval.answers import Answers
from eval.card import (
    SCHEMA_VERSION,
    CategoryScore,
    Comparison,
    Counts,
    Interval,
    JudgeRecord,
    Noise,
    Scorecard,
    Scores,
    Settings,
    dumps,
    load,
    not_comparable,
)
from eval.config import EvalConfig
from eval.generate import IMAGES, PROMPTS, SETTINGS, Sampler, generate, read_prompts, replacing
from eval.judging import (
    INDEX,
    Row,
    expected_count,
    index_images,
    judge_images,
    read_judge,
    read_rows,
    score_rows,
    write_judge,
    write_rows,
)
from eval.protocols import Benchmark, Judge, category_of, digest_of, score_name
from eval.references import PUBLISHED

__all__ = ["SCHEMA_VERSION", "benchmark_prompts", "evaluate", "judge_run", "main", "rescore", "scorecard", "write"]
JUDGED = "judged"
SCORES, CARD, PAGE, GRID = "scores.parquet", "scorecard.json", "scorecard.html", "grid.png"
Log = Callable[[str], None]


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    out_dir: str | Path,
    *,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Samples, judges, scores and writes. Returns the scorecard; see `generate`, `judge_run` and `rescore`."""
    if prompts is None:
        prompts = benchmark_prompts(config)
    judge = judge or default_judge(config)  # before any sampling
    generate(sampler, prompts, config, out_dir, provenance=provenance, log=log)
    return rescore(out_dir, out_dir, config, judge=judge, log=log)


def benchmark_prompts(config: EvalConfig) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: the benchmark needs a prompt file, or has no development prompts.
    """
    return catalog.benchmark(config.benchmark).prompts(config)


def default_judge(config: EvalConfig) -> Judge:
    """The judge that the configuration names, else the benchmark's own.

    Raises:
        ValueError: the benchmark has none, and none is named.
    """
    name = config.judge or catalog.benchmark(config.benchmark).default_judge
    if name is None:
        raise ValueError(f"benchmark {config.benchmark!r} needs a judge: set judge to one of {', '.join(sorted(catalog.JUDGES))}")  # fmt: skip
    return catalog.judge(name)


def read_run(run_dir: str | Path) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """(images folder, prompts, how they were sampled) of a run.

    Raises:
        ValueError: there is no run.
    """
    images_dir = Path(run_dir) / IMAGES
    for name in (PROMPTS, SETTINGS):
        if not (images_dir / name).is_file():
            raise ValueError(f"{run_dir} is no run of eval.generate: it has no {IMAGES}/{name}")
    try:
        generation = json.loads((images_dir / SETTINGS).read_text(encoding="utf-8"))
        EvalConfig(**generation["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{images_dir / SETTINGS} is not readable: {error}") from error
    return images_dir, read_prompts(images_dir / PROMPTS), generation


def judge_run(
    run_dir: str | Path,
    out_dir: str | Path,
    judge: Judge,
    config: EvalConfig | None = None,
    *,
    shard: int = 0,
    shards: int = 1,
    log: Log = print,
) -> dict[str, int]:
    """Answers of a judge about a run's images, in `out_dir`: images.parquet, judge.json and answers.parquet.

    Raises:
        ValueError: missing images, or the judge fails (see `judge_images`); what it answered is kept.
    """
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark, out_dir = catalog.benchmark(config.benchmark), check_out_dir(out_dir)
    rows = index_images(images_dir, prompts, config)
    write_rows(rows, out_dir / INDEX)
    write_judge(judge, out_dir)
    with Answers(out_dir, write=True) as answers:
        report = judge_images(
            rows, images_dir, prompts, benchmark, judge, answers,
            batch_size=config.judge_batch_size, shard=shard, shards=shards, log=log,
        )  # fmt: skip
        answers.seal()
    return report


def rescore(
    run_dir: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
    *,
    judge: Judge | None = None,
    judged: str | Path | None = None,
    training_runs: Sequence[str | Path] = (),
    log: Log = print,
) -> dict[str, Any]:
    """Scores a run and writes the results to `out_dir`. Returns the scorecard as a dict.

    Args:
        config: the recorded one unless given.
        judge: asked about what has no answer yet.
        judged: a folder of `judge_run` whose answers are complete: then no judge, and no image, is needed.
        training_runs: scorecards of the same recipe at other training seeds, for the noise of training.

    Raises:
        ValueError: no run there, `out_dir` is sealed or a file, images are missing, or the answers are incomplete.
    """
    out_dir = check_out_dir(out_dir)
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark = catalog.benchmark(config.benchmark)
    if judged is None:
        judged = out_dir / JUDGED
        judge_run(run_dir, judged, judge or default_judge(config), config, log=log)
    judged = Path(judged)
    record = read_judge(judged)
    rows = score_rows(read_rows(judged / INDEX), prompts, benchmark, Answers(judged), record["revision"])
    card = scorecard(rows, prompts, config, generation, judges=[record])
    if training_runs:
        card = with_training_noise(card, [load(path) for path in training_runs])
    write(card, rows, images_dir, out_dir)
    return card.model_dump(mode="json")


def check_out_dir(out_dir: str | Path) -> Path:
    """
    Raises:
        ValueError: `out_dir` is a file, or a sealed directory.
    """
    out_dir = Path(out_dir)
    for part in (out_dir, *out_dir.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{part} is a file, and results need a directory (--out)")
    if (out_dir / "manifest.json").exists():
        raise ValueError(f"{out_dir} is sealed; write the new scores elsewhere (--out)")
    return out_dir


def scorecard(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    generation: Mapping[str, Any] | None = None,
    judges: Sequence[Mapping[str, Any]] = (),
) -> Scorecard:
    """The scores with their error bars, and everything that they depend on.

    Args:
        rows: of `score_rows`.
        prompts: all that the run should have, with ids.
        generation: content of generation.json.
        judges: {"name", "revision", "spec"} of each.

    Raises:
        ValueError: no image could be scored.
    """
    benchmark = catalog.benchmark(config.benchmark)
    scored = [row for row in rows if row["score"] is not None]
    expected = expected_count(prompts, config)
    seen = [row for row in scored if row["split"] != "held_out"]
    held_out = [row for row in scored if row["split"] == "held_out"]
    if not seen:
        raise ValueError(f"none of {expected} images could be scored")
    aggregates = benchmark.summarise(seen, prompts)
    main_scores = _scores(seen, prompts, benchmark, aggregates)
    name = score_name(benchmark, [judge["name"] for judge in judges])
    wanted = dict.fromkeys(category_of(p) for p in prompts if p.get("split") != "held_out")
    generation = dict(generation or {})
    return Scorecard(
        name=name,
        benchmark=benchmark.name,
        scale=benchmark.scale,
        pooling=benchmark.pooling,
        overall=main_scores.overall,
        tasks=main_scores.tasks,
        image_accuracy=main_scores.image_accuracy,
        prompt_accuracy=main_scores.prompt_accuracy,
        held_out=_scores(held_out, prompts, benchmark, {}) if held_out else None,
        official=aggregates.get("official"),
        fixed=aggregates.get("fixed"),
        missing_tasks=[tag for tag in wanted if tag not in main_scores.tasks],
        counts=Counts(
            expected=expected,
            generated=len(rows),
            scored=len(scored),
            failed=max(0, expected - len(scored)),
        ),
        deviations=_deviations(config, generation, expected - len(scored)),
        seeds=list(config.seeds),
        interval=Interval(),
        settings=_settings(rows, prompts, config, generation, benchmark, judges),
        references=_references(benchmark, name, main_scores),
        # What scoring no longer reads, or only for verdicts, is no part of how these scores came about.
        config=config.model_dump(mode="json", exclude={"bootstrap_samples"}),
        generation=generation,
    )


def with_training_noise(card: Scorecard, others: Sequence[Scorecard]) -> Scorecard:
    """The card with the deviation of the overall score over its own training run and others of the same recipe.

    Raises:
        ValueError: another card is of other prompts or judges, or of the same weights.
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


def _grouped(rows: Sequence[Row], category_order: Mapping[str, int]) -> dict[str, dict[int, list[float]]]:
    """category -> prompt index -> scores of its images."""
    groups: dict[str, dict[int, list[float]]] = {}
    keys = ("category", "prompt_index", "seed", "image_index")
    ranked = sorted(
        rows, key=lambda row: (category_order.get(row["category"], len(category_order)), *map(row.get, keys))
    )
    for row in ranked:
        groups.setdefault(row["category"], {}).setdefault(row["prompt_index"], []).append(row["score"])
    return groups


def _scores(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    benchmark: Benchmark,
    aggregates: Mapping[str, Mapping[str, Any]],
) -> Scores:
    order = {name: i for i, name in enumerate(dict.fromkeys(category_of(p) for p in prompts))}
    groups = {name: list(prompts.values()) for name, prompts in _grouped(rows, order).items()}
    overall, by_category = stats.estimate(groups, benchmark.pooling)
    of_seeds: dict[int, tuple[stats.Estimate, dict[str, stats.Estimate]]] = {}
    for seed in sorted({row["seed"] for row in rows}):
        mine = _grouped([row for row in rows if row["seed"] == seed], order)
        of_seeds[seed] = stats.estimate({n: list(p.values()) for n, p in mine.items()}, benchmark.pooling)

    def score(estimate: stats.Estimate, values: dict[int, float], name: str | None) -> CategoryScore:
        official = {
            kind: aggregate["overall"] if name is None else aggregate["categories"].get(name)
            for kind, aggregate in aggregates.items()
        }
        return CategoryScore(
            **{**stats.over_seeds(values), "mean": estimate.mean},
            interval=(estimate.low, estimate.high),
            standard_error=estimate.total,
            noise=Noise(sampling=estimate.sampling, prompts=estimate.prompts),
            prompts=estimate.n_prompts,
            images=estimate.n_images,
            official=official.get("official"),
            fixed=official.get("fixed"),
        )

    perfect = [row["score"] == 1 for row in rows]
    right_prompts: dict[int, bool] = {}
    for row, is_right in zip(rows, perfect, strict=True):
        right_prompts[row["prompt_index"]] = right_prompts.get(row["prompt_index"], False) or is_right
    return Scores(
        overall=score(overall, {seed: o.mean for seed, (o, _) in of_seeds.items()}, None),
        tasks={
            name: score(e, {seed: c[name].mean for seed, (_, c) in of_seeds.items() if name in c}, name)
            for name, e in by_category.items()
        },
        image_accuracy=sum(perfect) / len(perfect),
        prompt_accuracy=sum(right_prompts.values()) / len(right_prompts),
    )


def _deviations(config: EvalConfig, generation: Mapping[str, Any], failed: int) -> list[str]:
    """What keeps this score from being the benchmark's: named beside it."""
    found = []
    if config.prompt_set != "official":
        found.append("development prompts: a score to choose by, not to report")
    if config.prompts_per_task is not None:
        found.append(f"at most {config.prompts_per_task} prompts per category")
    if generation.get("prompt_rewriting"):
        found.append(f"prompts were rewritten (file {generation['prompt_rewriting']['sha256'][:12]})")
    if failed > 0:
        found.append(f"{failed} missing or unreadable images were left out")
    return found


def _settings(
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    generation: Mapping[str, Any],
    benchmark: Benchmark,
    judges: Sequence[Mapping[str, Any]],
) -> Settings:
    sampler = generation.get("sampler", {})
    digests = sorted((r["seed"], r["prompt_id"], r["image_index"], r["sha256"]) for r in rows)
    return Settings(
        judges=[JudgeRecord(**judge, official=judge["name"] in benchmark.official_judges) for judge in judges],
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
    """Of which prompts, how many images each and what is asked about them, not of how a model was given them."""
    return digest_of([{k: v for k, v in prompt.items() if k != "rewritten"} for prompt in prompts])


def _references(benchmark: Benchmark, name: str, scores: Scores) -> list[Comparison]:
    found = []
    for published in PUBLISHED.get(benchmark.name, ()):
        ours = scores.overall if published.category == "overall" else scores.tasks.get(published.category)
        within = None
        if ours is not None and name == benchmark.name:
            low, high = (limit * benchmark.scale for limit in ours.interval)
            within = low <= published.score <= high
        found.append(
            Comparison(
                model=published.model,
                category=published.category,
                published=published.score,
                ours=None if ours is None else ours.mean * benchmark.scale,
                source=published.source,
                within_noise=within,
            )
        )
    return found


def write(card: Scorecard, rows: Sequence[Row], images_dir: str | Path, out_dir: str | Path) -> None:
    """Writes scores.parquet (a row per image), grid.png, scorecard.html and, last, scorecard.json into `out_dir`.

    Each file appears whole or not at all, and a scorecard.json beside the others is of the same scores.
    """
    from eval.scorecard_page import draw_grid, render_page

    images_dir, out_dir = Path(images_dir), check_out_dir(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".scorecard-") as folder:
        temporary = Path(folder)
        write_rows(rows, temporary / SCORES)
        draw_grid(rows, images_dir).save(temporary / GRID, format="PNG")
        page = render_page(card, rows, images_dir, temporary / GRID)
        (temporary / PAGE).write_text(page, encoding="utf-8")
        (out_dir / CARD).unlink(missing_ok=True)
        for name in (SCORES, GRID, PAGE):
            with replacing(out_dir / name) as target:
                shutil.copyfile(temporary / name, target)
        with replacing(out_dir / CARD) as target:
            target.write_text(dumps(card), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m eval.scorecard DIR`: see also `python -m eval.cli score`."""
    parser = argparse.ArgumentParser(prog="python -m eval.scorecard", description="Scores a run's images again.")
    parser.add_argument("run_dir", help="directory that has images/")
    parser.add_argument("--out", help="where to write the scores (default: the same directory)")
    parser.add_argument("--missing", choices=("error", "official"), default="error", help="what to do about missing images")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        _, _, generation = read_run(options.run_dir)
        config = EvalConfig(**{**generation["config"], "missing": options.missing})
        card = rescore(options.run_dir, options.out or options.run_dir, config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print("\n".join(lines(card)))


def lines(card: Mapping[str, Any]) -> list[str]:
    """The scores as lines of text: the name, the categories, the overall score with its noises."""
    scale = card["scale"]
    found = [card["name"]]
    rows = {**card["tasks"], "overall": card["overall"]}
    if card["held_out"]:
        rows |= {f"{name}, held out": task for name, task in card["held_out"]["tasks"].items()}
    for name, score in rows.items():
        low, high = (scale * limit for limit in score["interval"])
        spread = "" if score["std"] is None else f" +- {scale * score['std']:.3f} over {score['runs']} seeds"
        found.append(f"{name:<24} {scale * score['mean']:.3f}{spread}, 95% interval over prompts {low:.3f} to {high:.3f}")  # fmt: skip
    found += [f"note: {deviation}" for deviation in card["deviations"]]
    return found


if __name__ == "__main__":
    main()
