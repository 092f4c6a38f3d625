"""Makes a scorecard with error bars from a folder of images.

    DIR/images --judging--> DIR/judged --score_rows--> rows --scorecard--> card --write--> scores.parquet scorecard.json
                                                                                           scorecard.html grid.png
                                                                                           official/seed0/...

It needs only the images and the answers about them, so that an old run can be scored again without a GPU:
python -m eval.cli score DIR [--out DIR2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eval import catalog
from eval.benchmarks import flow_loss
from eval.benchmarks.base import Benchmark, Judged
from eval.config import EvalConfig, stored_settings
from eval.files import file_sha256, replacing, write_bytes
from eval.generation.generate import IMAGES, PROMPTS, SETTINGS, Sampler, generate, read_prompts
from eval.judging.answers import Answers, Key, SharedAnswers
from eval.judging.protocols import Judge
from eval.judging.run import (
    INDEX,
    Row,
    index_images,
    judge_images,
    judged_prompts,
    read_judges,
    read_rows,
    score_rows,
    write_judges,
    write_rows,
)
from eval.scorecards.card import Scorecard, dumps, load
from eval.scorecards.make_card import scorecard, with_images, with_training_noise

JUDGED, OFFICIAL = "judged", "official"
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
    """(images folder, prompts, sampling settings) of a run.

    Raises:
        ValueError: there is no run.
    """
    images_dir = Path(run_dir) / IMAGES
    for name in (PROMPTS, SETTINGS):
        if not (images_dir / name).is_file():
            raise ValueError(f"{run_dir} is not a run of eval.generation.generate: it has no {IMAGES}/{name}")
    try:
        generation = json.loads((images_dir / SETTINGS).read_text(encoding="utf-8"))
        generation["config"] = stored_settings(generation["config"])
        EvalConfig(**generation["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    shared: SharedAnswers | None = None,
    log: Log = print,
) -> dict[str, int]:
    """Judges a run's images and writes to `out_dir`: images.parquet, judges.json and answers.parquet.

    Args:
        shared: answers of other runs, see `judge_images`. What is written is the same with and without them.

    Raises:
        ValueError: missing images, a judge that does not fit (`catalog.check_fits`), or one that fails (see
            `judge_images`); its answers so far are kept.
    """
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark, out_dir = catalog.benchmark(config.benchmark), check_out_dir(out_dir)
    for skill, judge in judges.items():
        catalog.check_fits(benchmark, skill, judge.name)
    rows = index_images(images_dir, prompts, config, benchmark.jpeg_tiles)
    write_rows(rows, out_dir / INDEX)
    write_judges(judges, out_dir)
    with Answers(out_dir, write=True) as answers:
        report = judge_images(
            rows, images_dir, prompts, benchmark, judges, answers,
            batch_size=config.judge_batch_size, shard=shard, shards=shards, shared=shared, log=log,
        )  # fmt: skip
        answers.seal()
    return report


def rescore(
    run_dir: str | Path,
    out_dir: str | Path,
    config: EvalConfig | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    judged: str | Path | Sequence[str | Path] | None = None,
    training_runs: Sequence[str | Path] = (),
    log: Log = print,
) -> dict[str, Any]:
    """Scores a run and writes the results to `out_dir`. Returns the scorecard as a dict.

    Args:
        config: the recorded one unless given.
        judges: {skill: judge}, asked only questions without an answer.
        judged: a folder of `judge_run`, or several (one for each shard), with complete answers: then neither judges nor images
            are needed.
        training_runs: scorecards of the same recipe at other training seeds, for the noise of training.

    Raises:
        ValueError: no run there, `out_dir` is sealed or a file, images are missing, or the answers are incomplete or
            older than an image, or folders of answers are of different runs or judges.
    """
    out_dir = check_out_dir(out_dir)
    images_dir, prompts, generation = read_run(run_dir)
    config = config or EvalConfig(**generation["config"])
    benchmark = catalog.benchmark(config.benchmark)
    if judged is None:
        judged = out_dir / JUDGED
        judge_run(run_dir, judged, judges or catalog.load_judges(config), config, log=log)
    folders = [Path(judged)] if isinstance(judged, (str, Path)) else [Path(folder) for folder in judged]
    record, rows, answers = read_judged(folders)
    for skill, judge in record.items():
        catalog.check_fits(benchmark, skill, judge["name"])
    _refuse_stale(rows, images_dir)
    revisions = {skill: judge["revision"] for skill, judge in record.items()}
    answered = judged_prompts(rows, prompts, config, benchmark, answers, revisions)
    rows = score_rows(rows, prompts, benchmark, answered)
    card = scorecard(rows, prompts, config, generation, judges=record, answered=answered)
    card = card.model_copy(update={"flow_loss": flow_loss.read(images_dir, prompts, config.seeds)})
    if training_runs:
        card = with_training_noise(card, [load(path) for path in training_runs])
    official = official_files(benchmark, prompts, answered, config.image_size_px, card.name)
    write(card, rows, images_dir, out_dir, official)
    return card.model_dump(mode="json")


def read_judged(folders: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], list[Row], Mapping[Key, Any]]:
    """(judges, index of the images, answers) of folders of `judge_run`, each of a shard or of other skills.

    Raises:
        ValueError: none, or they are of different images, or a skill was judged by different judges.
    """
    if not folders:
        raise ValueError("no folder of answers: judge the run first")
    record: dict[str, dict[str, Any]] = {}
    first: list[Row] | None = None
    answers: dict[Key, Any] = {}
    for folder in folders:
        of_folder, rows = read_judges(folder), read_rows(folder / INDEX)
        if first is None:
            first = rows
        elif rows != first:
            raise ValueError(f"{folder} and {folders[0]} are answers about different images: judge one run for both")
        for skill, judge in of_folder.items():
            if record.setdefault(skill, judge) != judge:
                raise ValueError(
                    f"{skill} was judged by {record[skill]['name']} at {record[skill]['revision'][:12]}, and in {folder} by "
                    f"{judge['name']} at {judge['revision'][:12]}"
                )
        read = Answers(folder)
        for key in read:
            answers.setdefault(key, read[key])
    assert first is not None
    return record, first, answers


def official_files(
    benchmark: Benchmark,
    prompts: Sequence[Mapping[str, Any]],
    answered: Mapping[int, Mapping[str, Judged]],
    image_size_px: int,
    name: str,
) -> dict[str, str]:
    """{"seed0/NAME": text} of the official code's result files for each sampling seed.

    Args:
        name: of the score; if judges are not official, files that name the model name the score too.
    """
    files = {}
    label = "model" if name == benchmark.name else f"model ({name})"
    for seed, of_seed in answered.items():
        if judged := with_images(of_seed):
            of_code = benchmark.official_files(prompts, judged, image_size_px, label)
            files |= {f"seed{seed}/{name}": text for name, text in of_code.items()}
    return files


def _refuse_stale(rows: Sequence[Row], images_dir: Path) -> None:
    """Compares images with the digests of those that were judged; missing images are ignored."""
    for row in rows:
        path = images_dir / row["file"]
        if path.is_file() and file_sha256(path) != row["sha256"]:
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


def write(
    card: Scorecard,
    rows: Sequence[Row],
    images_dir: str | Path,
    out_dir: str | Path,
    official: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes scores.parquet (a row per image), official/, grid.png, scorecard.html with failures/ and, last, scorecard.json
    into `out_dir`.

    Each file is written atomically, and an existing scorecard.json belongs to the other files.
    """
    from eval.scorecards.scorecard_page import FAILURES, draw_grid, failure_pages, render_page

    images_dir, out_dir = Path(images_dir), check_out_dir(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".scorecard-") as folder:
        temporary = Path(folder)
        write_rows(rows, temporary / SCORES)
        draw_grid(rows, images_dir).save(temporary / GRID, format="PNG")
        page = render_page(card, rows, images_dir, temporary / GRID)
        (temporary / PAGE).write_text(page, encoding="utf-8")
        for name, content in official.items():
            write_bytes(temporary / OFFICIAL / name, content.encode())
        for name, page in failure_pages(card, rows, images_dir):
            write_bytes(temporary / name, page.encode())
        (out_dir / CARD).unlink(missing_ok=True)
        for folder_name in (OFFICIAL, FAILURES):
            shutil.rmtree(out_dir / folder_name, ignore_errors=True)
            if (temporary / folder_name).is_dir():
                (temporary / folder_name).rename(out_dir / folder_name)
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
    """The scores as lines of text: the name, the categories, the overall score with its standard errors."""
    scale = card["scale"]
    lines = [card["name"]]
    rows = {**card["tasks"], "overall": card["overall"]}
    if card["held_out"]:
        rows |= {f"{name}, held out": task for name, task in card["held_out"]["tasks"].items()}
    for name, score in rows.items():
        low, high = (scale * limit for limit in score["interval"])
        spread = "" if score["std"] is None else f" +- {scale * score['std']:.3f} over {score['runs']} seeds"
        lines.append(f"{name:<24} {scale * score['mean']:.3f}{spread}, 95% interval over prompts {low:.3f} to {high:.3f}")  # fmt: skip
    lines += [f"{name.replace('_', ' '):<24} {value:.4g}" for name, value in card.get("measures", {}).items()]
    lines += [f"flow loss at t = {row['timestep']:g}      {row['loss']:.4f}" for row in card.get("flow_loss", [])]
    lines += [f"note: {deviation}" for deviation in card["deviations"]]
    return lines


if __name__ == "__main__":
    main()
