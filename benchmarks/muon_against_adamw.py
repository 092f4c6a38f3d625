"""Muon with AdamW against AdamW alone, on the last stage of a recipe from scratch, at equal steps.

    python benchmarks/muon_against_adamw.py --latents .nucleus/artifacts/latents/DIGEST --texts .nucleus/artifacts/texts/DIGEST [--steps 400] [--seeds 0 1 2]
    python benchmarks/muon_against_adamw.py --draw docs/images/muon_against_adamw.png

AdamW alone is train.optim.matrices=adamw (recipes/ablations/adamw_alone.yaml): the same model, data, order, noise and
initial weights for the same seed. Each is run at several learning rates, as one rate does not fit both; in Muon's runs
AdamW keeps the recipe's rate for the other parameters. Trains with the real trainer on the latents of a `make
reproduce` (the last stage's resolution). Compares the loss on 512 training samples at timesteps of the training
distribution, the same for every run: it measures optimisation, not generalisation. Each line of
muon_against_adamw.jsonl is a finished run, which a later start does not repeat. Prints command, machine, mean and
spread over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BATCHES, BATCH, HELD_SEED = 4, 128, 2**31  # of the compared samples: a seed that no training uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--latents", type=Path, help="a latents artifact of the last stage")
    parser.add_argument("--texts", type=Path, help="the texts artifact of the same corpus")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--muon-rates", type=float, nargs="*", help="default: the recipe's")
    parser.add_argument("--adamw-rates", type=float, nargs="*", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--every", type=int, default=25, help="steps between losses")
    parser.add_argument("--results", type=Path, default=Path("muon_against_adamw.jsonl"))
    parser.add_argument("--draw", help="draw the results file instead of training")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, read(args.results))
    elif args.latents is None or args.texts is None:
        parser.error("give --latents and --texts, or --draw")
    else:
        from measure import print_run

        print_run()
        measure(args)
    table(read(args.results))


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def measure(args: argparse.Namespace) -> None:
    from model.stages import training_stages
    from tasks.encoding.open_latents import open_latents
    from tasks.manifest import load_manifest
    from tasks.recipe import load_recipe

    recipe = load_recipe(args.recipe)
    latents = load_manifest(args.latents)
    index = open_latents(args.latents, args.texts)
    size_px = recipe.train.stages[-1].image_size_px
    if latents.config["stage"]["image_size_px"] != size_px:
        raise SystemExit(f"{args.latents} is of {latents.config['stage']['image_size_px']} px, not {size_px}")
    muon_rates = args.muon_rates if args.muon_rates is not None else [recipe.train.optim.muon_lr]
    variants = {f"Muon {rate:g}": [f"train.optim.muon_lr={rate}"] for rate in muon_rates}
    variants |= {
        f"AdamW {rate:g}": ["train.optim.matrices=adamw", f"train.optim.adamw_lr={rate}"] for rate in args.adamw_rates
    }
    last = len(recipe.train.stages) - 1
    common = [
        f"train.stages[{last}].steps={args.steps}",
        f"train.sample_every_steps={args.every}",
        f"train.checkpoint_every_steps={args.steps}",
    ]
    for seed in args.seeds:
        for variant, overrides in variants.items():
            changed = load_recipe(args.recipe, [*common, f"train.seed={seed}", *overrides])
            section = training_stages(changed.model, changed.train)[last]
            settings = json.dumps([section.model_dump(mode="json"), latents.digest, BATCHES, BATCH], sort_keys=True)
            key = hashlib.sha256(settings.encode()).hexdigest()[:12]
            if any(row["key"] == key for row in read(args.results)):
                print(f"{variant}, seed {seed}: done before", flush=True)
                continue
            row = {"key": key, "variant": variant, "seed": seed, "steps": args.steps, **train(section, index)}
            with open(args.results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{variant}, seed {seed}: loss {row['curve'][-1][1]:.4f}, {row['seconds']:.0f} s", flush=True)


def train(section: Any, latents: Path) -> dict[str, Any]:
    """One run: [[step, loss], ...] and the seconds of training, scoring left out."""
    import time

    from model.train.run import train_stage

    compared, curve, paused = Compared(latents, section.train.timesteps, section.model.patch_size), [], 0.0

    def score(model: Any, step: int, path: Path) -> None:
        nonlocal paused
        begin = time.perf_counter()
        curve.append([step, compared.loss(model)])
        paused += time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        report = train_stage(latents, section, None, Path(scratch) / "work", out, score)
    return {"curve": curve, "seconds": round(report["train_s"] - paused, 1)}


class Compared:
    """The samples, noises and timesteps on which every run is measured."""

    def __init__(self, latents: Path, timesteps: Any, patch: int):
        import torch

        from model import flow
        from model.data.latents import LatentDataset
        from model.data.order import SampleOrder, read_batch

        dataset = LatentDataset(latents)
        order = SampleOrder(dataset, BATCH, HELD_SEED)
        self.batches = []
        for step in range(BATCHES):
            batch = read_batch(dataset, order.batch(step))
            rows, columns = (side // patch for side in batch.latents.shape[-2:])
            clean, noise = (flow.pack_latents(tensor, patch) for tensor in (batch.latents, batch.noise))
            generator = torch.Generator().manual_seed(batch.plan.timestep_seed)
            t = flow.sample_timesteps(BATCH, rows * columns, generator, timesteps)
            inputs = {
                "hidden_states": flow.interpolate(clean, noise, t),
                "img_shapes": (1, rows, columns),
                "encoder_hidden_states": batch.text,
                "encoder_hidden_states_mask": batch.mask,
                "timestep": t,
            }
            self.batches.append((inputs, flow.velocity_target(clean, noise)))

    def loss(self, model: Any) -> float:
        """Mean squared error of the velocity."""
        from model.losses import flow_matching_loss

        return statistics.fmean(
            flow_matching_loss(model(**inputs), target)[0].item() for inputs, target in self.batches
        )


def by_variant(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant with the most steps in the results."""
    steps = max(row["steps"] for row in rows)
    result: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["variant"].split()[0] != "Muon", float(row["variant"].split()[1]))):
        if row["steps"] == steps:
            result.setdefault(row["variant"], []).append(row)
    return result


def table(rows: list[dict[str, Any]]) -> None:
    """Mean, standard deviation and range of the last loss over seeds, and seconds of a run."""
    for variant, runs in by_variant(rows).items() if rows else ():
        losses = [run["curve"][-1][1] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        seconds = statistics.median(run["seconds"] for run in runs)
        print(
            f"{variant:14} {runs[0]['steps']} steps, {len(runs)} seeds: loss {statistics.fmean(losses):.4f} "
            f"(std {spread:.4f}, {min(losses):.4f} to {max(losses):.4f}), {seconds:.0f} s a run"
        )


def draw(target: str, rows: list[dict[str, Any]]) -> None:
    """Loss against steps, a line per variant: the mean over seeds, and their range as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise SystemExit("there are no results to draw")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for variant, runs in by_variant(rows).items():
        steps = [step for step, _ in runs[0]["curve"]]
        of_steps = list(zip(*([loss for _, loss in run["curve"]] for run in runs)))
        (line,) = axis.plot(steps, list(map(statistics.fmean, of_steps)), label=f"{variant} ({len(runs)} seeds)")
        axis.fill_between(steps, list(map(min, of_steps)), list(map(max, of_steps)), color=line.get_color(), alpha=0.2)
    axis.set(xlabel="step", ylabel="loss (velocity MSE) on the same 512 samples", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
