"""From a folder of images to a scorecard with error bars.

    DIR/images --judging--> DIR/judged --score_rows--> rows --scorecard--> card --write--> scores.parquet scorecard.json
                                                                                           scorecard.html grid.png

Everything comes from the images and the answers about them, so that an old run can be scored again without a GPU:
python -m eval.cli score DIR [--out DIR2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import catalog, flow_loss, stats
from eval.answers import Answers
from eval.benchmarks.base import Benchmark, Judged, Mode
from eval.card import (
    CategoryScore,
    Comparison,
    Counts,
    Interval,
    JudgeRecord,
    Noise,
    Pooling,
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
    judged_prompts,
    prompt_scores,
    read_judges,
    read_rows,
    score_rows,
    write_judges,
    write_rows,
)
from eval.protocols import Judge, category_of, digest_of, score_name
from eval.references import PUBLISHED

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
    judges: Mapping[str, Judge] | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Samples, judges, scores and writes. Returns the scorecard; see `generate`, `judge_run` and `rescore`."""
    if prompts is None:
        prompts = catalog.prompts(config)
    judges = judges or catalog.load_judges(config)  # before any sampling
    generate(sampler, prompts, config, out_dir, provenance=provenance, log=log)
    return rescore(out_dir, out_dir, config, judges=judges, log=log)


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
    judges: Mapping[str, Judge],
    config: EvalConfig | None = None,
    *,
    shard: int = 0,
    shards: int = 1,
    log: Log = print,
) -> dict[str, int]:
    """Answers of judges about a run's images, in `out_dir`: images.parquet, judges.json and answers.parquet.

    Raises:
        ValueError: missing images, or a judge fails (see `judge_images`); what it answered is kept.
    """
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark, out_dir = catalog.benchmark(config.benchmark), check_out_dir(out_dir)
    rows = index_images(images_dir, prompts, config)
    write_rows(rows, out_dir / INDEX)
    write_judges(judges, out_dir)
    with Answers(out_dir, write=True) as answers:
        report = judge_images(
            rows, images_dir, prompts, benchmark, judges, answers,
            batch_size=config.judge_batch_size, shard=shard, shards=shards, log=log,
        )  # fmt: skip
        answers.seal()
    return report


def rescore(
    run_dir: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    judged: str | Path | None = None,
    training_runs: Sequence[str | Path] = (),
    log: Log = print,
) -> dict[str, Any]:
    """Scores a run and writes the results to `out_dir`. Returns the scorecard as a dict.

    Args:
        config: the recorded one unless given.
        judges: {role: judge}, asked about what has no answer yet.
        judged: a folder of `judge_run` whose answers are complete: then no judge, and no image, is needed.
        training_runs: scorecards of the same recipe at other training seeds, for the noise of training.

    Raises:
        ValueError: no run there, `out_dir` is sealed or a file, images are missing, or the answers are incomplete or
            older than an image.
    """
    out_dir = check_out_dir(out_dir)
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark = catalog.benchmark(config.benchmark)
    if judged is None:
        judged = out_dir / JUDGED
        judge_run(run_dir, judged, judges or catalog.load_judges(config), config, log=log)
    judged = Path(judged)
    record, rows = read_judges(judged), read_rows(judged / INDEX)
    _refuse_stale(rows, images_dir, judged / INDEX)
    revisions = {role: judge["revision"] for role, judge in record.items()}
    answered = judged_prompts(rows, prompts, config, benchmark, Answers(judged), revisions)
    rows = score_rows(rows, prompts, benchmark, answered)
    card = scorecard(rows, prompts, config, generation, judges=record, answered=answered)
    card = card.model_copy(update={"flow_loss": flow_loss.read(images_dir, prompts, config.seeds)})
    if training_runs:
        card = with_training_noise(card, [load(path) for path in training_runs])
    write(card, rows, images_dir, out_dir)
    return card.model_dump(mode="json")


def _refuse_stale(rows: Sequence[Row], images_dir: Path, index: Path) -> None:
    """Images that are newer than their index are compared with it; images that are gone need not be."""
    written = index.stat().st_mtime_ns
    for row in rows:
        path = images_dir / row["file"]
        is_newer = path.is_file() and path.stat().st_mtime_ns > written
        if is_newer and hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} changed since it was judged; judge the run again")


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
    judges: Mapping[str, Mapping[str, Any]] | None = None,
    answered: Mapping[int, Mapping[str, Judged]] | None = None,
) -> Scorecard:
    """The scores with their error bars, and everything that they depend on.

    Args:
        rows: of `score_rows`.
        prompts: all that the run should have, with ids.
        generation: content of generation.json.
        judges: {role: {"name", "model", "revision", "spec"}}.
        answered: of `judged_prompts`, for the official aggregates.

    Raises:
        ValueError: no image could be scored.
    """
    benchmark = catalog.benchmark(config.benchmark)
    pooling = catalog.POOLING.get(benchmark.name, "prompts")
    scored = [row for row in rows if row["score"] is not None]
    expected = expected_count(prompts, config)
    seen = [row for row in scored if row["split"] != "held_out"]
    held_out = [row for row in scored if row["split"] == "held_out"]
    if not seen:
        raise ValueError(f"none of {expected} images could be scored")
    aggregates = {mode: official_scores(benchmark, prompts, answered or {}, mode) for mode in ("official", "fixed")}
    main_scores = _scores(seen, prompts, pooling, aggregates)
    name = score_name(benchmark, judges or {})
    wanted = dict.fromkeys(category_of(p) for p in prompts if p.get("split") != "held_out")
    present = {row["category"] for row in seen}
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
            failed=max(0, expected - len(scored)),
        ),
        deviations=[
            *_not_judged(benchmark, judges or {}),
            *_deviations(benchmark, config, generation, prompts, expected - len(scored)),
        ],
        seeds=list(config.seeds),
        interval=Interval(),
        settings=_settings(rows, prompts, config, generation, benchmark, judges or {}),
        references=_references(benchmark, name, main_scores),
        measures=_measures(benchmark, prompts, answered or {}),
        config=config.model_dump(mode="json", exclude={"bootstrap_samples"}),
        generation=generation,
    )


def official_scores(
    benchmark: Benchmark,
    prompts: Sequence[Mapping[str, Any]],
    answered: Mapping[int, Mapping[str, Judged]],
    mode: Mode,
) -> dict[str, Any] | None:
    """What the official code would say ("official"), or would without its bugs ("fixed"): the mean over the seeds of the
    benchmark's own summary, {"overall", "categories"}. None where nothing was answered."""
    summaries = []
    for of_seed in answered.values():
        judged = {key: value for key, value in of_seed.items() if any(image is not None for image in value.images)}
        if judged:
            summaries.append(benchmark.summarise(prompts, judged, mode))
    if not summaries:
        return None
    names = dict.fromkeys(name for summary in summaries for name in summary["categories"])

    def mean(values: Sequence[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    return {
        "overall": mean([summary["score"] for summary in summaries]),
        "categories": {name: mean([summary["categories"].get(name) for summary in summaries]) for name in names},
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
            # Parts are several scores of one prompt, which the estimate counts as so many.
            prompts=len({row["prompt_id"] for row in rows}) if whole else estimate.n_prompts,
            images=len(rows) if whole else estimate.n_images,
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


def _estimate(rows: Sequence[Row], order: Sequence[str], pooling: Pooling) -> tuple[stats.Estimate, dict]:
    units = prompt_scores(rows, pooling)
    rank = {name: i for i, name in enumerate(dict.fromkeys(order))}
    names = sorted(units, key=lambda name: (rank.get(name, len(rank)), name))
    groups = {name: [units[name][prompt] for prompt in sorted(units[name])] for name in names}
    return stats.estimate(groups, "prompts" if pooling == "prompts" else "categories")


def _not_judged(benchmark: Benchmark, judges: Mapping[str, Any]) -> list[str]:
    absent = [role for role in benchmark.judges if role in benchmark.optional_judges and role not in judges]
    return [f"no judge for {', '.join(absent)}: left out"] if absent and judges else []


def _deviations(
    benchmark: Benchmark,
    config: EvalConfig,
    generation: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    failed: int,
) -> list[str]:
    """What keeps this score from being the benchmark's: named beside it."""
    found = []
    if config.images_per_prompt != benchmark.images_per_prompt:
        found.append(f"{config.images_per_prompt} images per prompt, officially {benchmark.images_per_prompt}")
    if config.prompt_set != "official":
        found.append("development prompts: a score to choose by, not to report")
    if benchmark.prompt_count and len(prompts) != benchmark.prompt_count:
        found.append(f"{len(prompts)} prompts, officially {benchmark.prompt_count}")
    trained_on = sum(bool(prompt.get("trained_on")) for prompt in prompts)
    if trained_on:
        found.append(f"{trained_on} of {len(prompts)} captions were trained on: the corpus has too few held-out images")
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
    judges: Mapping[str, Mapping[str, Any]],
) -> Settings:
    sampler = generation.get("sampler", {})
    digests = sorted((r["seed"], r["prompt_id"], r["image_index"], r["sha256"]) for r in rows)
    return Settings(
        judges=[
            JudgeRecord(role=role, **judge, official=benchmark.judges.get(role) in ("", judge["model"]))
            for role, judge in sorted(judges.items())
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
    found += [f"{name.replace('_', ' '):<24} {value:.4g}" for name, value in card.get("measures", {}).items()]
    found += [f"flow loss at t = {row['timestep']:g}      {row['loss']:.4f}" for row in card.get("flow_loss", [])]
    found += [f"note: {deviation}" for deviation in card["deviations"]]
    return found


if __name__ == "__main__":
    main()
