"""Evaluation without Flyte: `python -m eval.cli ls | generate | judge | score | compare | select | show`.

    python -m eval.cli generate --model ./pipeline --benchmark shapes --set image_size_px=64 --out run
    python -m eval.cli judge run
    python -m eval.cli score run
    python -m eval.cli compare old_run run

Every step resumes after an interruption. The steps may run on different machines: judging needs the images, scoring
only the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from eval import catalog
from eval.benchmarks import registry
from eval.config import EvalConfig
from eval.judges.registry import JUDGES
from eval.names import hint

RUN_TIMES = "timing.json"  # next to images/, not part of any score


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.cli", description=__doc__.splitlines()[0].split(":")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    sub = command("ls", _ls, "Lists benchmarks and judges.")
    sub.add_argument("name", nargs="?", help="a benchmark or judge, to see more of it")

    sub = command("generate", _generate, "Samples a benchmark's images from a diffusers pipeline.")
    sub.add_argument("--model", required=True, help="a directory (./NAME or /PATH), or a Hub id OWNER/NAME")
    sub.add_argument("--revision", help="commit of a Hub id (40 hexadecimal digits)")
    sub.add_argument("--dtype", help="such as bfloat16 (default: bfloat16 on a GPU, float32 on a CPU)")
    sub.add_argument("--device", help="default: a GPU where there is one")
    sub.add_argument("--out", required=True, type=Path, help="the run's directory; an unfinished run is resumed")
    sub.add_argument("--layout", choices=("geneval", "dpg", "oneig"), help="also write the images as the official code reads them")  # fmt: skip
    _config_options(sub)
    _shard_option(sub)

    sub = command("judge", _judge, "Asks a judge about a run's images.")
    sub.add_argument("run", type=Path)
    sub.add_argument("--judge", action="append", default=[], metavar="[SKILL=]NAME", help="who answers: for one skill of the benchmark, or for all that it fits")  # fmt: skip
    sub.add_argument("--out", type=Path, help="where the answers go (default: RUN/judged)")
    sub.add_argument("--missing", choices=("error", "official"), help="what to do about missing images")
    _shard_option(sub)

    sub = command("score", _score, "Scores a run from its answers; asks the default judge where there are none.")
    sub.add_argument("run", type=Path)
    sub.add_argument("--judged", type=Path, action="append", default=[], help="answers of `judge`; again for each shard (default: RUN/judged)")  # fmt: skip
    sub.add_argument("--out", type=Path, help="where the scorecard goes (default: RUN)")
    sub.add_argument("--missing", choices=("error", "official"), help="what to do about missing images")
    sub.add_argument("--training-runs", nargs="+", type=Path, default=[], metavar="CARD", help="scorecards of other training seeds")  # fmt: skip

    sub = command("compare", _compare, "Says whether B is better than A, worse, equal, or that one cannot tell.")
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    sub.add_argument("--margin", type=float, help="differences below it do not matter")
    sub.add_argument("--json", action="store_true")

    sub = command("select", _select, "Picks the candidate that beats the incumbent, on development prompts.")
    sub.add_argument("incumbent", type=Path)
    sub.add_argument("candidates", type=Path, nargs="+")
    sub.add_argument("--allow-official", action="store_true", help="choose on official prompts all the same")
    sub.add_argument("--json", action="store_true")

    sub = command("show", _show, "Prints a scorecard and opens its page.")
    sub.add_argument("path", type=Path)
    sub.add_argument("--no-open", action="store_true")
    return parser


def _config_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--benchmark")
    sub.add_argument("--config", type=Path, help="a recipe (its `eval` section), or a YAML file of such keys")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as guidance_scale=4")
    sub.add_argument("--limit", type=int, help="prompts per category")


def _shard_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--shard", default="0/1", help="I/N: the I-th of N parts, counted from 0")


def read_config(options: argparse.Namespace) -> EvalConfig:
    """
    Raises:
        ValueError: an unknown key or a value that is not valid; names it.
    """
    values: dict[str, Any] = {}
    if options.config is not None:
        if not options.config.is_file():
            raise ValueError(f"{options.config} is not a file")
        try:
            content = yaml.safe_load(options.config.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{options.config} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{options.config} is not a mapping of keys")
        catalog.refuse_code(content.get("eval", content), str(options.config))
        values |= content.get("eval", content)
    for item in options.set:
        key, separator, text = item.partition("=")
        if not separator:
            raise ValueError(f"--set {item!r} must look like guidance_scale=4")
        here = values
        *path, last = key.strip().split(".")
        for step in path:
            here = here.setdefault(step, {})
        here[last] = yaml.safe_load(text)
    if options.benchmark is not None:
        values["benchmark"] = options.benchmark
    if options.limit is not None:
        values["prompts_per_task"] = options.limit
    try:
        return EvalConfig(**values)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    texts = []
    for item in error.errors():
        key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"there is no such key; {hint(key, EvalConfig.model_fields)}".rstrip("; ")
        texts.append(f"{key}: {message}")
    return "; ".join(texts)


def _shard(options: argparse.Namespace) -> tuple[int, int]:
    index, _, count = options.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {options.shard!r} must be I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def _ls(options: argparse.Namespace) -> None:
    if options.name in JUDGES:
        entry = JUDGES[options.name]
        print(f"judge {options.name}: {entry.description}; answers as {', '.join(entry.skills)}")
    elif options.name is not None:
        benchmark = catalog.benchmark(options.name)
        print(f"benchmark {benchmark.name}, {benchmark.version}")
        print(f"  prompts          {benchmark.data or 'made by this package'}")
        print(f"  images           {benchmark.images_per_prompt} per prompt, {'grids' if benchmark.grid else 'files'}")
        print(f"  tasks            {', '.join(benchmark.tasks)}")
        of = {"parts": "the prompts' named subscores"}.get(benchmark.pooling, benchmark.pooling)
        print(f"  overall          mean of {of}")
        for skill, model in benchmark.judges.items():
            fitting = catalog.fitting(benchmark, skill)
            print(f"  judge {skill:<10} officially {model or 'none'}; here {', '.join(fitting) or 'none'}")
    else:
        print("benchmarks")
        for name in registry.BENCHMARKS:
            print(f"  {name:<20} {catalog.benchmark(name).version}")
        print("judges")
        for name, entry in sorted(JUDGES.items()):
            print(f"  {name:<20} {', '.join(entry.skills)}: {entry.description}")


def _generate(options: argparse.Namespace) -> None:
    from eval.generation.generate import IMAGES, copy_references, generate
    from eval.generation.pipelines import diffusers_sampler, load_pipeline
    from eval.official.layouts import export
    from eval.scorecard import check_out_dir

    config, (shard, shards) = read_config(options), _shard(options)
    out = check_out_dir(options.out)
    prompts = catalog.prompts(config)  # before the weights are loaded
    if config.prompts_file is not None:
        copy_references(prompts, Path(config.prompts_file).parent, out / IMAGES)
    pipeline, provenance = load_pipeline(
        options.model, revision=options.revision, dtype=options.dtype, device=options.device
    )
    begin = time.time()
    report = generate(
        diffusers_sampler(pipeline, config), prompts, config, out, shard=shard, shards=shards, provenance=provenance
    )
    name = RUN_TIMES if shards == 1 else f"timing-{shard}-of-{shards}.json"
    (out / name).write_text(json.dumps({**report, "began": begin, "ended": time.time()}, indent=1) + "\n")
    if options.layout and shards == 1:
        for seed in config.seeds:
            export(out / IMAGES, out / f"{options.layout}-seed{seed}", options.layout, seed=seed)
    print(f"{report['made']} images made, {report['kept']} existed: {out / IMAGES}")


def _judge(options: argparse.Namespace) -> None:
    from eval.scorecard import JUDGED, judge_run

    config = _recorded(options)
    named = catalog.named_judges(options.judge, [config.benchmark])[config.benchmark]
    judges = {**config.judges, **named}
    config = EvalConfig(**config.model_dump(exclude={"judges"}), judges=judges)
    shard, shards = _shard(options)
    out = options.out or options.run / JUDGED
    report = judge_run(options.run, out, catalog.load_judges(config), config, shard=shard, shards=shards)
    print(f"{report['asked']} questions asked: {out}")


def _recorded(options: argparse.Namespace) -> EvalConfig:
    from eval.scorecard import read_run

    values = read_run(options.run)[2]["config"]
    return EvalConfig(**values | ({"missing": options.missing} if options.missing else {}))


def _score(options: argparse.Namespace) -> None:
    from eval.judging.run import JUDGES as JUDGED_BY
    from eval.scorecard import CARD, JUDGED, OFFICIAL, PAGE, lines, rescore

    config, out = _recorded(options), options.out or options.run
    judged = options.judged
    if not judged and (options.run / JUDGED / JUDGED_BY).is_file():
        judged = [options.run / JUDGED]
    card = rescore(options.run, out, config, judged=judged or None, training_runs=options.training_runs)
    files = [out / name for name in (CARD, PAGE, OFFICIAL)]
    print("\n".join([*lines(card), *(str(path) for path in files if path.exists())]))


def _compare(options: argparse.Namespace) -> None:
    from eval.scorecards.compare import compare_runs, lines

    comparison = compare_runs(options.a, options.b, options.margin)
    print(comparison.model_dump_json(indent=1) if options.json else "\n".join(lines(comparison)))


def _select(options: argparse.Namespace) -> None:
    from eval.scorecards.select_candidate import lines, select_candidate

    selection = select_candidate(options.incumbent, options.candidates, allow_official=options.allow_official)
    if options.json:
        print(selection.model_dump_json(indent=1))
        return
    print("\n".join([f"{selection.name}: {selection.sentence}", *lines(selection)]))
    print(f"chosen: {selection.chosen}")


def _show(options: argparse.Namespace) -> None:
    from eval.scorecard import PAGE, lines
    from eval.scorecards import card as cards

    card = cards.load(options.path)
    print("\n".join(lines(card.model_dump(mode="json"))))
    page = (options.path if options.path.is_dir() else options.path.parent) / PAGE
    if page.is_file():
        print(page)
        if not options.no_open:
            webbrowser.open(page.resolve().as_uri())


if __name__ == "__main__":
    sys.exit(main())
