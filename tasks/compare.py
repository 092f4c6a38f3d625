"""Compares recipes, with error bars over training seeds: `python -m tasks.compare SCORECARD... [--out DIR]`.

    pyflyte run workflows/ablate.py ablate --recipe RECIPE --overrides train.seed=SEED     for each recipe and seed
    python -m tasks.compare .nucleus/artifacts/scorecard/* --out compared/

The lineage of a scorecard leads to its training, whose settings are in the manifests. Trainings that differ only in their
seed are runs of one variant, named by the settings that distinguish it. Each variant is compared with the first one, on
their common seeds: runs with the same seed share data, order and noise. Writes comparison.json and comparison.png.
`pyflyte run workflows/study.py study` runs the trainings as well (tasks/study).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.config import stored_settings
from eval.files import read_json_lines
from eval.scorecards.card import scored_by
from eval.stats import mean_interval, over_seeds
from tasks.trace import Node, walk

FINAL = 0.1  # the final loss is the mean over this last fraction of the last stage's steps without guidance
# Settings in the manifests of checkpoints that do not change the result of training.
HOW = {"seed", "keep_checkpoints", "sample_every_steps", "sample_prompts"}


@dataclass
class Run:
    """One training and its scores. `settings`: dotted keys that determine the training, without seed and layout."""

    scorecard: Path | str
    seed: int
    settings: dict[str, Any]
    scores: dict[str, float]  # "overall", tasks, "held_out"
    losses: list[tuple[int, float]]  # `losses_before_guidance` of the last stage
    score: str = ""  # the score's full name: geneval, geneval[judge]
    measures: dict[str, float] = field(default_factory=dict)  # other values to compare, such as routing stability

    @property
    def last_step(self) -> int | None:
        """Of `losses`; None if every step has guidance."""
        return self.losses[-1][0] if self.losses else None

    @property
    def final_loss(self) -> float:
        begin = (1 - FINAL) * self.losses[-1][0]
        last = [loss for step, loss in self.losses if step > begin]
        return sum(last) / len(last)


@dataclass
class Variant:
    """Trainings that differ only in their seed."""

    name: str
    runs: dict[int, Run] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Score -> mean, standard deviation and interval over training seeds (see `over_runs`)."""
        values = {seed: _values(run) for seed, run in self.runs.items()}
        return {
            score: over_runs({seed: run_values[score] for seed, run_values in values.items()})
            for score in next(iter(values.values()))
            if all(score in run_values for run_values in values.values())
        }


def over_runs(values: Mapping[int, float]) -> dict[str, Any]:
    """`eval.stats.over_seeds`, plus Student's 95% interval of the mean over training seeds (None for one seed)."""
    summary = over_seeds(values)
    return {**summary, "interval": mean_interval(summary["values"])}


def read_run(scorecard: Path, home: Path | None = None) -> Run:
    """Reads a scorecard and the settings of its training.

    Raises:
        ValueError: it is not a scorecard of one trained model, or one of its parents is missing.
    """
    nodes = walk(scorecard, home, check=False)
    root = next(iter(nodes.values()))
    if root.manifest.kind != "scorecard":
        raise ValueError(f"{scorecard} is a {root.manifest.kind}, not a scorecard")
    merged = [node for node in nodes.values() if node.manifest.kind == "merged"]
    stages = [node for node in nodes.values() if node.manifest.kind == "checkpoints"]  # the last stage first
    if len(merged) != 1 or not stages:
        raise ValueError(
            f"{scorecard} has {len(merged)} merged models and {len(stages)} trained stages, not one training"
        )
    last, first = stages[0], stages[-1]
    card = json.loads((scorecard / "scorecard.json").read_text())
    lines = [row for _, row in read_json_lines(last.path / "metrics.jsonl")]
    return Run(
        scorecard,
        first.manifest.config["train"]["seed"],
        {
            **_settings(merged[0], stages),
            **_flat("eval", stored_settings(card["config"])),
            **_flat("eval", scored_by(card)),
        },
        scores_of(card),
        losses_before_guidance(lines, last.manifest.config["stage"]),
        card["name"],
    )


def losses_before_guidance(lines: Iterable[Mapping[str, Any]], stage: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, loss) of a stage's metrics. The target of a step with guidance contains the model's own predictions, so that its loss
    cannot be compared between models; these steps are left out.

    Args:
        lines: of metrics.jsonl.
        stage: the stage's configuration as JSON.
    """
    guidance = stage.get("guidance")
    last = stage["steps"] - (guidance["steps"] if guidance else 0)
    return [(line["step"], line["loss"]) for line in lines if line["step"] <= last]


def scores_of(card: Mapping[str, Any]) -> dict[str, float]:
    """ "overall", each task, and "held_out" if there is one, of a scorecard as JSON."""
    scores = {"overall": card["overall"]["mean"], **{task: value["mean"] for task, value in card["tasks"].items()}}
    if card["held_out"]:
        scores["held_out"] = card["held_out"]["overall"]["mean"]
    return scores


def _settings(merged: Node, stages: list[Node]) -> dict[str, Any]:
    settings = {**_flat("model", merged.manifest.config["model"]), **_flat("merge", merged.manifest.config["merge"])}
    for node in stages:
        stage = node.manifest.config["stage"]
        train = {key: value for key, value in node.manifest.config["train"].items() if key not in HOW}
        settings |= {**_flat(f"stage {stage['name']}", stage), **_flat("train", train)}
    data = [parent.digest[:12] for node in stages for parent in node.manifest.parents if parent.kind == "latents"]
    return {**settings, "latents": data}


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(f"{key}.{part}", inner).items()}
    return {key: value}


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Groups runs by their settings, in the given order.

    Raises:
        ValueError: two runs of one variant have the same seed, or runs were scored with different settings.
    """
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if len({_text(run, key) for run in runs}) > 1]
    if scored := [key for key in differing if key.startswith("eval.")]:
        values = " and ".join(sorted({_text(run, scored[0]) for run in runs}))
        raise ValueError(f"the scorecards cannot be compared: {scored[0]} is {values}")
    grouped: dict[tuple[str, ...], Variant] = {}
    for run in runs:
        names = tuple(f"{key.rpartition('.')[2]}={_text(run, key)}" for key in differing)
        variant = grouped.setdefault(names, Variant(", ".join(names) or "all runs"))
        if run.seed in variant.runs:
            both = f"{variant.runs[run.seed].scorecard} and {run.scorecard}"
            raise ValueError(f"{both} both have train.seed={run.seed} and {variant.name}: give only one of them")
        variant.runs[run.seed] = run
    return list(grouped.values())


def _text(run: Run, key: str) -> str:
    value = run.settings.get(key)
    return value if isinstance(value, str) else json.dumps(value)


def _values(run: Run) -> dict[str, float]:
    losses = {"final_loss": run.final_loss} if run.losses else {}
    return {**run.scores, **losses, **run.measures}


def compare(compared: Sequence[Variant]) -> dict[str, Any]:
    """{"score": its name, "variants": {name: {score: `over_runs`}}, "differences": {name: {score: `over_runs` of this variant minus the first,
    on the seeds that both have}}}. A final loss is subtracted only from one of the same steps."""
    base = compared[0]
    differences: dict[str, Any] = {}
    for variant in compared[1:]:
        common = sorted(base.runs.keys() & variant.runs.keys())
        if common:
            first, other = ({seed: _values(v.runs[seed]) for seed in common} for v in (base, variant))
            if any(base.runs[seed].last_step != variant.runs[seed].last_step for seed in common):
                for values in other.values():
                    values.pop(
                        "final_loss", None
                    )  # its means are over other steps, which says nothing about the variant
            differences[variant.name] = {
                score: _paired({seed: other[seed][score] - first[seed][score] for seed in common})
                for score in first[common[0]]
                if all(score in values[seed] for values in (first, other) for seed in common)
            }
    return {
        "score": next(iter(base.runs.values())).score,
        "variants": {variant.name: variant.summary() for variant in compared},
        "differences": differences,
    }


def _paired(differences: Mapping[int, float]) -> dict[str, Any]:
    """`over_runs`, plus a verdict: "higher" or "lower" if the interval excludes 0, else "cannot tell"; None for one seed.
    The interval covers the noise of training, including that of the machine."""
    values = over_runs(differences)
    interval = values["interval"]
    verdict = None
    if interval is not None:
        verdict = "higher" if interval[0] > 0 else "lower" if interval[1] < 0 else "cannot tell"
    return {**values, "verdict": verdict}


def render(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown: a table of means (with standard deviations over training seeds), and one of differences."""
    lines = [f"Score: {result['score']}", "", *_table(result["variants"], "variant, training seeds", "{:.3f}")]
    if result["differences"]:
        base = next(iter(result["variants"]))
        lines += ["", *_table(result["differences"], f"minus {base}, common seeds", "{:+.3f}")]
        for name, scores in result["differences"].items():
            if (overall := scores["overall"])["verdict"] is not None:
                low, high = overall["interval"]
                lines.append(
                    f"\n{name}: {result['score']} overall {overall['verdict']}, 95% interval over {overall['runs']} training seeds "
                    f"{low:+.3f} to {high:+.3f}"
                )
    return "\n".join(lines)


def _table(rows: Mapping[str, Mapping[str, Any]], title: str, form: str) -> list[str]:
    columns = list(dict.fromkeys(score for row in rows.values() for score in row))
    lines = [f"| {title} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        cells = [_cell(scores[column], form) if column in scores else "" for column in columns]
        lines.append(f"| {name}, {next(iter(scores.values()))['runs']} | {' | '.join(cells)} |")
    return lines


def _cell(value: Mapping[str, Any], form: str) -> str:
    return form.format(value["mean"]) + ("" if value["std"] is None else f" ({value['std']:.3f})")


def draw(compared: Sequence[Variant], path: Path) -> None:
    """Plots the last stage's loss by step and the scores: the mean of each variant over seeds, and its single runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    scores = list(next(iter(compared[0].runs.values())).scores)
    for place, variant in enumerate(compared):
        curves = [_smooth([loss for _, loss in run.losses]) for run in variant.runs.values()]
        steps = [step for step, _ in next(iter(variant.runs.values())).losses]
        spread = [(min(at), sum(at) / len(at), max(at)) for at in zip(*curves)]
        low, mean, high = zip(*spread) if spread else ((), (), ())
        (line,) = left.plot(steps[: len(mean)], mean, label=f"{variant.name} (seeds: {len(variant.runs)})")
        left.fill_between(steps[: len(mean)], low, high, color=line.get_color(), alpha=0.2)
        summary, width = variant.summary(), 0.8 / len(compared)
        positions = [i + (place - (len(compared) - 1) / 2) * width for i in range(len(scores))]
        right.bar(positions, [summary[score]["mean"] for score in scores], width, color=line.get_color(), alpha=0.5)
        for x, score in zip(positions, scores):
            values = summary[score]["values"]
            right.plot([x] * len(values), values, ".", color=line.get_color())
    left.set(xlabel="step of the last stage, before guidance", ylabel="training loss, running mean")
    if any(run.losses for variant in compared for run in variant.runs.values()):
        left.set_yscale("log")  # matplotlib refuses it without a value
    score = next(iter(compared[0].runs.values())).score
    right.set(ylabel=f"{score}, one dot per training seed", ylim=(0, 1.02))
    right.set_xticks(range(len(scores)), scores, rotation=20)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize="small", loc="outside lower left")  # names may be long
    figure.savefig(path, dpi=110)


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with one line on stderr if the scorecards cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m tasks.compare", description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("scorecards", type=Path, nargs="+", help="scorecard artifacts; the first is the base")
    parser.add_argument("--out", type=Path, help="folder for comparison.json and comparison.png")
    parser.add_argument("--home", type=Path, help="folder to search for parents that were moved")
    args = parser.parse_args(arguments)
    try:
        compared = variants([read_run(path, args.home) for path in args.scorecards])
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    result = compare(compared)
    print(render(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(compared, args.out / "comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
