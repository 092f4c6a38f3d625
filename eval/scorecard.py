"""From a folder of images to a scorecard with error bars: rows per image, one JSON, one page, one picture.

    DIR/images --score--> rows --scorecard--> dict --write--> scores.parquet scorecard.json scorecard.html grid.png

Everything comes from the images folder (prompts.jsonl, generation.json and the images), so that an old run can be
scored again without a GPU:  python -m eval.scorecard DIR [--out DIR2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval import stats
from eval.benchmarks.shapes import benchmark as shapes
from eval.config import EvalConfig
from eval.generate import IMAGES, PROMPTS, SETTINGS, Sampler, generate
from eval.geneval import TASKS, expected_images, judge_image, load_prompts, summarise, walk_layout

SCHEMA_VERSION = 1
Detector = Callable[[Image.Image], Mapping[str, Any]]


def evaluate(
    sampler: Sampler,
    config: EvalConfig,
    out_dir: str | Path,
    *,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    detector: Detector | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Samples, scores and writes: the whole pass. Returns the scorecard; see `generate`, `score` and `write`."""
    if prompts is None:
        prompts = benchmark_prompts(config)
    _detector(config, detector)  # before any sampling
    generate(sampler, prompts, config, out_dir, provenance=provenance, log=log)
    return rescore(out_dir, out_dir, config, detector=detector, log=log)


def benchmark_prompts(config: EvalConfig) -> list[dict[str, Any]]:
    """The prompts of a benchmark that needs no file.

    Raises:
        ValueError: the benchmark's prompts are not part of this package.
    """
    if config.benchmark != "shapes":
        raise ValueError(
            f"benchmark {config.benchmark!r} needs its prompt file: "
            "pass prompts=load_prompts('evaluation_metadata.jsonl')"
        )
    return shapes.make_prompts(config.prompts_per_task)


def rescore(
    run_dir: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
    *,
    detector: Detector | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Scores the images below `run_dir` and writes the results to `out_dir`; the configuration is the recorded one
    unless given. Returns the scorecard.

    Raises:
        ValueError: no run there, or `out_dir` is sealed.
    """
    images_dir, out_dir = Path(run_dir) / IMAGES, Path(out_dir)
    for name in (PROMPTS, SETTINGS):
        if not (images_dir / name).is_file():
            raise ValueError(f"{run_dir} is no run of eval.generate: it has no {IMAGES}/{name}")
    if (out_dir / "manifest.json").exists():
        raise ValueError(f"{out_dir} is sealed; write the new scores elsewhere (--out)")
    generation = json.loads((images_dir / SETTINGS).read_text(encoding="utf-8"))
    prompts = load_prompts(images_dir / PROMPTS)
    config = config or EvalConfig(**generation["config"])
    rows = score(images_dir, prompts, config, detector=detector, log=log)
    card = scorecard(rows, prompts, config, generation)
    write(card, rows, images_dir, out_dir)
    return card


def score(
    images_dir: str | Path,
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    *,
    detector: Detector | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Judges every image of `images_dir`/seed{n}.

    Args:
        images_dir: with a folder seed{n} in GenEval's layout for each of `config.seeds`.
        prompts: what should be there.
        config: benchmark, seeds, images per prompt, and what to do about missing images.
        detector: image -> objects for `judge_image`; the shapes benchmark has its own.

    Returns:
        one row per image: seed, prompt_index, image_index, tag, split, prompt, correct, reason, objects (JSON), file
        (relative to `images_dir`), sha256, error ("" or why the image could not be scored; then correct is None).

    Raises:
        ValueError: missing or unreadable images (unless config.missing is "official"), or no detector.
    """
    images_dir = Path(images_dir)
    detect = _detector(config, detector)
    rows: list[dict[str, Any]] = []
    total = len(config.seeds) * sum(expected_images(m, config.images_per_prompt) for m in prompts)
    last_line = time.monotonic()
    for seed in config.seeds:
        found = walk_layout(images_dir / f"seed{seed}", prompts, config.images_per_prompt, config.missing)
        for item in found:
            path, metadata = item["path"], item["metadata"]
            data = path.read_bytes()
            row = {
                "seed": seed,
                "prompt_index": int(item["folder"]),
                "image_index": int(path.name.partition(".")[0]),
                "tag": metadata["tag"],
                "split": metadata.get("split", "seen"),
                "prompt": metadata["prompt"],
                "correct": None,
                "reason": "",
                "objects": "",
                "file": path.relative_to(images_dir).as_posix(),
                "sha256": hashlib.sha256(data).hexdigest(),
                "error": "",
            }
            rows.append(row)
            try:
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                if config.missing == "error":
                    raise ValueError(f"{path} is not a readable image: {error}") from error
                row["error"] = f"unreadable: {error}"
                continue
            objects = detect(image)
            verdict = judge_image(objects, metadata)
            row |= {"correct": verdict["correct"], "reason": verdict["reason"], "objects": json.dumps(objects)}
            if time.monotonic() - last_line > 5:
                last_line = time.monotonic()
                log(f"scores: {len(rows)}/{total}")
    log(f"scores: {len(rows)}/{total}")
    return rows


def _detector(config: EvalConfig, detector: Detector | None) -> Detector:
    if detector is not None:
        return detector
    if config.benchmark != "shapes":
        raise ValueError(f"benchmark {config.benchmark!r} needs a detector: pass detector=f(image) -> objects")
    return shapes.detect


def scorecard(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
    config: EvalConfig,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The scores with their error bars, and what they are scores of.

    Returns:
        {"overall", "tasks": {tag: ...}: each {"mean", "std", "runs", "seeds", "values" (one per seed), "interval":
        [low, high]}, a task also {"prompts", "images", "correct"}; "held_out": the same for held-out prompts, or None;
        "image_accuracy", "prompt_accuracy": over seeds; "counts": {"expected", "scored", "failed"}; "missing_tasks";
        "config", "generation", "bootstrap"}

    Raises:
        ValueError: no image could be scored.
    """
    scored = [row for row in rows if row["correct"] is not None]
    expected = len(config.seeds) * sum(expected_images(m, config.images_per_prompt) for m in prompts)
    seen = [row for row in scored if row["split"] != "held_out"]
    held_out = [row for row in scored if row["split"] == "held_out"]
    if not seen:
        raise ValueError(f"none of {expected} images could be scored")
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": config.benchmark,
        **_scores(seen, config),
        "held_out": _scores(held_out, config) if held_out else None,
        "counts": {"expected": expected, "scored": len(scored), "failed": max(0, expected - len(scored))},
        "seeds": list(config.seeds),
        "bootstrap": {
            "over": "prompts, within their task",
            "samples": config.bootstrap_samples,
            "seed": 0,
            "level": 0.95,
        },
        "config": config.model_dump(mode="json"),
        "generation": dict(generation or {}),
    }


def _scores(rows: Sequence[Mapping[str, Any]], config: EvalConfig) -> dict[str, Any]:
    by_seed: dict[int, list[dict[str, Any]]] = {}
    by_prompt: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        # The index tells prompts apart, even two of the same text.
        by_seed.setdefault(row["seed"], []).append({**row, "metadata": str(row["prompt_index"])})
        right_of = by_prompt.setdefault(row["tag"], {}).setdefault(row["prompt_index"], [0, 0])
        right_of[0] += bool(row["correct"])
        right_of[1] += 1
    summaries = {seed: summarise(of_seed) for seed, of_seed in by_seed.items()}
    intervals = stats.bootstrap(
        {tag: list(counts.values()) for tag, counts in by_prompt.items()}, config.bootstrap_samples
    )

    def over(pick: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return stats.over_seeds({seed: pick(summary) for seed, summary in summaries.items()})

    tasks = {}
    for tag in sorted(by_prompt, key=lambda t: TASKS.index(t) if t in TASKS else len(TASKS)):
        values = {seed: s["tasks"][tag]["accuracy"] for seed, s in summaries.items() if tag in s["tasks"]}
        counts = list(by_prompt[tag].values())
        tasks[tag] = {
            **stats.over_seeds(values),
            "interval": intervals["tasks"][tag],
            "prompts": len(counts),
            "images": sum(n for _, n in counts),
            "correct": sum(right for right, _ in counts),
        }
    return {
        "overall": {**over(lambda s: s["overall"]), "interval": intervals["overall"]},
        "tasks": tasks,
        "missing_tasks": [tag for tag in TASKS if tag not in tasks],
        "image_accuracy": over(lambda s: s["image_accuracy"]),
        "prompt_accuracy": over(lambda s: s["prompt_accuracy"]),
    }


def write(
    card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], images_dir: str | Path, out_dir: str | Path
) -> None:
    """Writes scores.parquet (a row per image), scorecard.json, grid.png and scorecard.html into `out_dir`."""
    import pandas as pd

    from eval.scorecard_page import draw_grid, render_page

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(list(rows))
    table["correct"] = table["correct"].astype("boolean")
    table.to_parquet(out_dir / "scores.parquet", index=False)
    (out_dir / "scorecard.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    draw_grid(rows, images_dir).save(out_dir / "grid.png")
    page = render_page(card, rows, out_dir / "grid.png")
    (out_dir / "scorecard.html").write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.scorecard", description="Scores a run's images again.")
    parser.add_argument("run_dir", help="directory that holds images/")
    parser.add_argument("--out", help="where to write the scores (default: the same directory)")
    parser.add_argument(
        "--missing", choices=("error", "official"), default="error", help="what to do about missing images"
    )
    options = parser.parse_args(arguments)
    try:
        settings = Path(options.run_dir) / IMAGES / SETTINGS
        config = None
        if settings.is_file():
            recorded = json.loads(settings.read_text(encoding="utf-8"))["config"]
            config = EvalConfig(**{**recorded, "missing": options.missing})
        card = rescore(options.run_dir, options.out or options.run_dir, config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    lines = {"overall": card["overall"], **card["tasks"]}
    for name, task in ((card["held_out"] or {}).get("tasks", {})).items():
        lines[f"{name}, held out"] = task
    for name, task in lines.items():
        spread = "" if task["std"] is None else f" +- {task['std']:.3f} over {task['runs']} seeds"
        low, high = task["interval"]
        print(f"{name:<20} {task['mean']:.3f}{spread}, 95% interval over prompts {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
