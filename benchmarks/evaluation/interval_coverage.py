"""Coverage of the intervals, level and power of the comparisons, by simulation.

    python benchmarks/evaluation/interval_coverage.py
    --runs N    simulated benchmarks per line (default 2000)
    --equals    only the share of wrong choices among 16 candidates that all equal the incumbent

Each prompt has its own chance of a right image, drawn from a beta distribution, so that two images of a prompt
correlate. The percentile bootstrap over prompts is given for comparison: most error bars in this field use it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np

from eval import stats

GENEVAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
ACCURACY = {"single_object": 0.99, "two_object": 0.95, "counting": 0.80, "colors": 0.92, "position": 0.85, "color_attr": 0.75}  # fmt: skip
LAYOUTS = ((0.99, 80, 4), (0.95, 4, 36), (0.99, 22, 6), (0.87, 100, 4), (0.97, 94, 4), (0.80, 80, 4), (0.9, 12, 12), (0.99, 22, 2))  # fmt: skip
CORRELATIONS = (0.0, 0.2, 0.4)


def chances(rng: np.random.Generator, p: float, n: int, correlation: float) -> np.ndarray:
    """Each prompt's chance of a right image, mean p; two images of a prompt correlate by `correlation`."""
    if not correlation:
        return np.full(n, p)
    k = (1 - correlation) / correlation
    return rng.beta(p * k, (1 - p) * k, size=n)


def images(rng: np.random.Generator, p: float, n: int, m: int, correlation: float, continuous: bool) -> np.ndarray:
    """[n, m] scores of mean p: right or wrong, or anywhere between."""
    q = chances(rng, p, n, correlation)
    if not continuous:
        return (rng.random((n, m)) < q[:, None]).astype(float)
    return rng.beta(np.maximum(3 * q, 1e-9)[:, None], np.maximum(3 * (1 - q), 1e-9)[:, None], size=(n, m))


def coverage(p, n, m, correlation, *, continuous=False, runs=2000, seed=0) -> tuple[float, float, float]:
    """(share of intervals that contain p, share of intervals of zero width, mean width)"""
    rng = np.random.default_rng(seed)
    hits, widths = 0, []
    for _ in range(runs):
        e = stats.interval(images(rng, p, n, m, correlation, continuous))
        hits += e.low <= p <= e.high
        widths.append(e.high - e.low)
    return hits / runs, float(np.mean(np.array(widths) <= 0)), float(np.mean(widths))


def bootstrap_coverage(p, n, m, correlation, *, runs=400, draws=400, seed=0) -> float:
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(runs):
        means = images(rng, p, n, m, correlation, False).mean(axis=1)
        low, high = np.percentile(means[rng.integers(n, size=(draws, n))].mean(axis=1), (2.5, 97.5))
        hits += low <= p <= high
    return hits / runs


def mix_coverage(correlation, *, runs=500, seed=0) -> float:
    """Coverage of the mean of GenEval's six categories."""
    rng = np.random.default_rng(seed)
    true, hits = float(np.mean(list(ACCURACY.values()))), 0
    for _ in range(runs):
        groups = {name: images(rng, ACCURACY[name], n, 4, correlation, False) for name, n in GENEVAL.items()}
        overall, _ = stats.estimate(groups)
        hits += overall.low <= true <= overall.high
    return hits / runs


def verdicts(sizes: Mapping[str, int], p, m, correlation, gain=0.0, *, runs=300, flips=999, seed=0) -> dict[str, float]:
    """Share of each verdict on two models of which one is `gain` better."""
    rng = np.random.default_rng(seed)
    counts = {"better": 0, "worse": 0, "equal": 0, "cannot tell": 0}
    for run in range(runs):
        pairs = {}
        for name, n in sizes.items():
            q = chances(rng, p[name], n, correlation)
            a, b = rng.binomial(m, q) / m, rng.binomial(m, np.clip(q + gain, 0, 1)) / m
            pairs[name] = np.stack([a, b], axis=1)
        counts[stats.compare(pairs, flips=flips, seed=run).verdict] += 1
    return {verdict: count / runs for verdict, count in counts.items()}


def choices(k: int, correlation, gain=0.0, *, runs=300, flips=999, seed=0) -> tuple[float, float]:
    """(share of runs in which the one better candidate is chosen, share in which another one is) of k candidates."""
    rng = np.random.default_rng(seed)
    right = wrong = 0
    for run in range(runs):
        models = [{} for _ in range(k + 1)]
        for name, n in GENEVAL.items():
            q = chances(rng, ACCURACY[name], n, correlation)
            for i, model in enumerate(models):
                model[name] = rng.binomial(4, np.clip(q + gain * (i == 1), 0, 1)) / 4
        chosen = stats.choose(models[0], models[1:], flips=flips, seed=run).index
        right += chosen == 0 and gain > 0
        wrong += chosen is not None and not (chosen == 0 and gain > 0)
    return right / runs, wrong / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--equals", action="store_true", help="only wrong choices among equal candidates")
    options = parser.parse_args()
    runs = options.runs
    if options.equals:
        print(f"wrong choices among 16 equal candidates, GenEval's 553 prompts x 4, {runs} runs (95% Wilson interval):")
        for c in CORRELATIONS:
            _, wrong = choices(16, c, runs=runs)
            low, high = stats.wilson(wrong, runs, 1.96)
            print(f"  correlation {c}: {wrong:.4f} ({low:.4f} to {high:.4f})", flush=True)
        return
    print("coverage of nominal 0.95 intervals (mean width), by correlation inside a prompt; all without a zero width:")
    print(f"{'score, prompts x images':<26}{'':>2}" + "".join(f"{c:>16}" for c in CORRELATIONS) + f"{'continuous 0.2':>16}{'bootstrap 0.4':>16}")  # fmt: skip
    for p, n, m in LAYOUTS:
        cells = []
        for correlation, continuous in [*((c, False) for c in CORRELATIONS), (0.2, True)]:
            covered, flat, width = coverage(p, n, m, correlation, continuous=continuous, runs=runs)
            assert not flat, f"{flat:.3f} of the intervals at {p}, {n} x {m} have no width"
            cells.append(f"{covered:>9.3f} ({width:.2f})")
        boot = bootstrap_coverage(p, n, m, 0.4, runs=min(runs, 600))
        print(f"{p} {n} x {m}".ljust(28) + "".join(f"{cell:>16}" for cell in cells) + f"{boot:>16.3f}", flush=True)
    mixed = "".join(f"{mix_coverage(c, runs=max(runs // 4, 1)):>16.3f}" for c in CORRELATIONS)
    print(f"{'mean of GenEval, 553 x 4':<28}{mixed}")
    print("\nverdicts on two models, GenEval's 553 prompts x 4:")
    for gain in (0.0, 0.01, 0.02, 0.04):
        for c in CORRELATIONS:
            shares = verdicts(GENEVAL, ACCURACY, 4, c, gain, runs=max(runs // 4, 1))
            print(
                f"  gain {gain}, correlation {c}: " + ", ".join(f"{v} {s:.3f}" for v, s in shares.items()), flush=True
            )
    print("\n16 candidates against the incumbent (right choice, wrong choice):")
    for gain in (0.0, 0.02, 0.04):
        for c in CORRELATIONS:
            right, wrong = choices(16, c, gain, runs=max(runs // 4, 1))
            print(f"  one is better by {gain}, correlation {c}: {right:.3f}, {wrong:.3f}", flush=True)


if __name__ == "__main__":
    main()
