"""Error bars, comparisons and choices at a given confidence level: intervals, paired tests, several candidates.

    scores of a prompt's images -> prompt -> category -> benchmark
                 |                    |
          sampling noise         prompt noise           training noise: between models of other training seeds

A score near 1 has few wrong images, in clusters, since images of one prompt fail together. A percentile
bootstrap over prompts then covers 0.5 to 0.7 of its nominal 0.95 (benchmarks/evaluation/interval_coverage.py). The
interval here is Wilson's with an effective sample size: that of the clustered variance, shrunk towards an assumed
correlation if few prompts carry information. Categories are combined without a normal assumption (Zou and Donner's MOVER).

Scores are floats in [0, 1]; right and wrong are 1 and 0.

Sources: Wilson 1927; Korn and Graubard 1998 (effective sample size, t quantiles); Kish 1965 (effective number of
clusters); Zou and Donner 2008 (MOVER); Agresti and Min 2005 (pseudo-observations for paired differences); Westfall and
Young 1993 (max-T).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

LEVEL = 0.95
# Correlation of images of one prompt: measured 0 to 0.2 on shapes, unknown for others. The assumption weighs as this
# many prompts.
PRIOR_CORRELATION, PRIOR_PROMPTS = 0.4, 2.0
FLIPS = 9999
POWER = 0.8
Pooling = Literal["categories", "prompts"]
Weight = Literal["image", "prompt"]
Grouped = Mapping[str, Sequence[Sequence[float]]]  # category -> prompts -> scores of the prompt's images


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and sample standard deviation (n - 1) of one score per seed.

    Returns:
        {"mean", "std": None for a single run, "runs": number of seeds, "seeds", "values": in the seeds' order}

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("there is no run to take a mean of")
    seeds = sorted(values)
    scores = np.array([values[s] for s in seeds], dtype=np.float64)
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "runs": len(scores),
        "seeds": seeds,
        "values": scores.tolist(),
    }


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of the mean of independent runs, such as training seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    scores = np.asarray(values, dtype=np.float64)
    half = student(level, len(scores) - 1) * scores.std(ddof=1) / math.sqrt(len(scores))
    return float(scores.mean() - half), float(scores.mean() + half)


@dataclass(frozen=True)
class Estimate:
    """A score with its error: `sampling` and `prompts` are standard errors whose squares add up to that of `total`.

    sampling: the part of noise on the same prompts; None if no prompt has two images.
    prompts: the part of other prompts of the same kind; None if `sampling` is.
    """

    mean: float
    low: float
    high: float
    total: float
    sampling: float | None
    prompts: float | None
    n_prompts: int
    n_images: int


def interval(prompts: Sequence[Sequence[float]], level: float = LEVEL, weight_by: Weight = "image") -> Estimate:
    """The mean score of a category, as an estimate over prompts of its kind.

    Args:
        prompts: for each prompt, the scores in [0, 1] of its images; prompts may have different numbers of images.
        level: nominal coverage.
        weight_by: whether each image counts once, or each prompt.

    Raises:
        ValueError: no prompts, one without images, a score outside [0, 1], or `level` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    sizes = np.array([len(scores) for scores in prompts], dtype=np.int64)
    if not len(sizes) or not sizes.all():
        raise ValueError(f"{len(sizes)} prompts, {int((sizes == 0).sum())} of them without images: nothing to estimate")
    scores = np.concatenate([np.asarray(s, dtype=np.float64) for s in prompts])
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores must be in [0, 1], and range from {scores.min():.4g} to {scores.max():.4g}")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    sums, squares = np.add.reduceat(scores, starts), np.add.reduceat(scores**2, starts)
    sampling = _sampling_error(sums, squares, sizes, sizes / sizes.sum() if weight_by == "image" else 1 / len(sizes))
    images = int(sizes.sum())
    if weight_by == "prompt":
        sums, sizes = sums / sizes * sizes.mean(), np.full(len(sizes), sizes.mean())
    return _estimate(sums, sizes, sampling, images, level)


def _estimate(sums: np.ndarray, sizes: np.ndarray, sampling: float | None, images: int, level: float) -> Estimate:
    n = len(sizes)
    p = min(max(float(sums.sum() / sizes.sum()), 0.0), 1.0)
    effective = _effective_size(p, sums, sizes)
    # The spread of few prompts is uncertain: Student's quantile instead of the normal one.
    low, high = wilson(p, effective, student(level, max(n - 1, 1)))
    total = math.sqrt(max(p * (1 - p), 1e-12) / effective)
    between = None
    if sampling is not None:
        sampling = min(sampling, total)
        between = math.sqrt(total**2 - sampling**2)
    return Estimate(p, low, high, total, sampling, between, n, images)


def _effective_size(p: float, sums: np.ndarray, sizes: np.ndarray) -> float:
    """The number of independent images that would estimate p as well as these prompts."""
    n, images = len(sizes), float(sizes.sum())
    prior = (1 + (float((sizes**2).sum()) / images - 1) * PRIOR_CORRELATION) / images
    if not 0 < p < 1 or n < 2:
        return 1 / prior
    residuals = sums - p * sizes
    clustered = n / (n - 1) * float((residuals**2).sum()) / images**2 / (p * (1 - p))
    # Only prompts with the rarer outcome show the spread: 3 failing prompts among 80 count as 3.
    information = min(_kish(sums), _kish(sizes - sums))
    weight = information / (information + PRIOR_PROMPTS)
    return 1 / (weight * clustered + (1 - weight) * prior)


def _sampling_error(
    sums: np.ndarray, squares: np.ndarray, sizes: np.ndarray, weights: np.ndarray | float
) -> float | None:
    """Standard error of the weighted mean with the prompts fixed; None if no prompt has two images."""
    repeated = sizes > 1
    if not repeated.any():
        return None
    k = sizes[repeated]
    variance = np.maximum(squares[repeated] - sums[repeated] ** 2 / k, 0) / (k - 1)
    # Prompts with one image get the mean variance of the others.
    by_prompt = np.full(len(sizes), variance.mean())
    by_prompt[repeated] = variance
    return math.sqrt(float((np.broadcast_to(weights, sizes.shape) ** 2 * by_prompt / sizes).sum()))


def _kish(weights: np.ndarray) -> float:
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share p among n, for a quantile z."""
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))


@lru_cache(maxsize=4096)
def student(level: float, freedom: float) -> float:
    """Two-sided quantile of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom))


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of categories: limits are combined by MOVER, which keeps their asymmetry near 1."""
    if not estimates:
        raise ValueError("there are no categories to take a mean of")
    if len(estimates) == 1:
        return estimates[0]
    k = len(estimates)
    mean = sum(e.mean for e in estimates) / k
    low = mean - math.sqrt(sum((e.mean - e.low) ** 2 for e in estimates)) / k
    high = mean + math.sqrt(sum((e.high - e.mean) ** 2 for e in estimates)) / k

    def combined(values: Sequence[float | None]) -> float | None:
        return None if None in values else math.sqrt(sum(v**2 for v in values)) / k

    return Estimate(
        mean,
        max(0.0, low),
        min(1.0, high),
        combined([e.total for e in estimates]),
        combined([e.sampling for e in estimates]),
        combined([e.prompts for e in estimates]),
        sum(e.n_prompts for e in estimates),
        sum(e.n_images for e in estimates),
    )


def estimate(groups: Grouped, pooling: Pooling = "categories", level: float = LEVEL) -> tuple[Estimate, dict]:
    """(overall, {category: estimate}) of a benchmark.

    Args:
        groups: the scores of each prompt's images, by category.
        pooling: "categories": overall is the plain mean of categories (GenEval); "prompts": of prompts (DPG-Bench).

    Raises:
        ValueError: see `interval`.
    """
    weight: Weight = "image" if pooling == "categories" else "prompt"
    by_category = {name: interval(prompts, level, weight) for name, prompts in groups.items()}
    if pooling == "categories":
        return pool(list(by_category.values())), by_category
    prompts = [scores for group in groups.values() for scores in group]
    return interval(prompts, level, weight), by_category


# ---- Two models on the same prompts


@dataclass(frozen=True)
class Difference:
    """B minus A on the same prompts.

    p: of the sign-flip test that A and B are equal. visible: the difference that is detected with a power of 0.8.
    verdict: "better", "worse" (the interval excludes 0), "equal" (it is within +-margin) or "cannot tell".
    """

    mean: float
    low: float
    high: float
    p: float
    error: float
    visible: float
    verdict: Literal["better", "worse", "equal", "cannot tell"]
    margin: float | None
    n_prompts: int

    def sentence(self) -> str:
        shown = f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f}, p {self.p:.3f}, {self.n_prompts} prompts)"
        if self.verdict == "cannot tell":
            return f"cannot tell: {shown}; the smallest visible difference is {self.visible:.3f}"
        if self.verdict == "equal":
            return f"equal within +-{self.margin:g}: {shown}"
        return f"{self.verdict}: {shown}"


Pairs = Mapping[str, Sequence[tuple[float, float]]]  # category -> prompts -> (mean score of A, of B)


def _weighted(differences: Mapping[str, np.ndarray], pooling: Pooling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(differences [..., n], weight of each prompt [n], category of each prompt [n]); weights sum to 1."""
    parts = [np.asarray(part, dtype=np.float64) for part in differences.values()]
    sizes = [part.shape[-1] for part in parts]
    if not parts or not all(sizes):
        raise ValueError("there is no prompt, or a category without one, to compare on")
    category = np.repeat(np.arange(len(parts)), sizes)
    share = [1 / (len(parts) * n) if pooling == "categories" else 1 / sum(sizes) for n in sizes]
    return np.concatenate(parts, axis=-1), np.repeat(share, sizes), category


def _error(d: np.ndarray, weight: np.ndarray, category: np.ndarray, pooling: Pooling) -> np.ndarray:
    """Standard error of the weighted mean difference, [...]; never 0.

    Half a pseudo-prompt of each sign is added, so that a few prompts without any difference do not prove that there is
    none.
    """
    if pooling == "prompts":
        category = np.zeros_like(category)
    variance = np.zeros(d.shape[:-1])
    for c in np.unique(category):
        part, w = d[..., category == c], weight[category == c]
        n = part.shape[-1]
        # A single prompt has no spread: its difference is used instead.
        spread = part.var(axis=-1, ddof=1) if n > 1 else part[..., 0] ** 2
        variance = variance + spread * (w**2).sum()
    pseudo = (weight**2).sum() * float(weight.max())
    return np.sqrt(variance + pseudo)


def _signs(n: int, flips: int, seed: int) -> np.ndarray:
    """[flips, n] of +-1: all combinations if there are at most `flips`, else random ones."""
    if n < 63 and 2**n <= flips + 1:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return (2 * bits - 1).astype(np.float32)
    bits = np.random.default_rng(seed).integers(0, 256, size=(flips, -(-n // 8)), dtype=np.uint8)
    return np.unpackbits(bits, axis=1, count=n).astype(np.float32) * 2 - 1


def compare(
    pairs: Pairs,
    pooling: Pooling = "categories",
    *,
    margin: float | None = None,
    level: float = LEVEL,
    flips: int = FLIPS,
    seed: int = 0,
) -> Difference:
    """B against A, prompt by prompt: a stratified sign-flip test, and the interval that agrees with it.

    If A and B were equal, the difference of each prompt could equally have the other sign. The interval contains the
    shifts that the test does not reject, and is at least as wide as that of two pseudo-prompts.

    Args:
        pairs: (mean score of A, of B) of each prompt, by category.
        pooling: how the overall score follows from prompts (see `estimate`).
        margin: differences below it have the verdict "equal".
        flips: number of random sign flips; all if there are fewer.

    Raises:
        ValueError: no prompts, or an empty category.
    """
    arrays = {name: np.asarray(values, dtype=np.float64).reshape(-1, 2) for name, values in pairs.items()}
    d, weight, category = _weighted({name: a[:, 1] - a[:, 0] for name, a in arrays.items()}, pooling)
    mean = float(d @ weight)
    error = float(_error(d, weight, category, pooling))
    signs = _signs(len(d), flips, seed)
    exact = len(signs) < flips
    fixed = signs @ (d * weight).astype(np.float32), signs @ weight.astype(np.float32)

    def p_value(shift: float) -> float:
        hits = int((np.abs(fixed[0] - shift * fixed[1]) >= abs(mean - shift) - 1e-6).sum())
        return hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)

    p = p_value(0.0)
    floor = student(level, max(len(d) - 1, 1)) * math.sqrt(float((weight**2).sum()) * float(weight.max()))
    low = max(min(_last_accepted(p_value, mean, -1, error, 1 - level), mean - floor), -1.0)
    high = min(max(_last_accepted(p_value, mean, 1, error, 1 - level), mean + floor), 1.0)
    visible = (student(level, 1e6) + student(2 * POWER - 1, 1e6)) * error
    if p <= 1 - level and (low > 0 or high < 0):
        verdict = "better" if mean > 0 else "worse"
    elif margin is not None and -margin <= low and high <= margin:
        verdict = "equal"
    else:
        verdict = "cannot tell"
    return Difference(mean, low, high, p, error, visible, verdict, margin, len(d))


def _last_accepted(p_value, mean: float, direction: int, error: float, alpha: float) -> float:
    """The shift furthest from `mean` in this direction that the test does not reject, by bisection."""
    inside, outside = 0.0, 2 * error
    while p_value(mean + direction * outside) > alpha:
        inside, outside = outside, 2 * outside
        if outside > 4:  # too few prompts to detect any difference
            return mean + direction * outside
    for _ in range(24):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if p_value(mean + direction * middle) > alpha else (inside, middle)
    return mean + direction * outside


def holm(p: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that all of them together keep the level (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


# ---- Several candidates against an incumbent


@dataclass(frozen=True)
class Choice:
    """index: of the chosen candidate; None keeps the incumbent. p: for each candidate, adjusted for their number."""

    index: int | None
    differences: list[float]
    p: list[float]
    low: list[float]  # simultaneous one-sided limits of candidate minus incumbent


def choose(
    incumbent: Mapping[str, Sequence[float]],
    candidates: Sequence[Mapping[str, Sequence[float]]],
    pooling: Pooling = "categories",
    *,
    level: float = LEVEL,
    flips: int = FLIPS,
    seed: int = 0,
) -> Choice:
    """The best candidate that beats the incumbent, by a test on the maximum over all; the incumbent if none does.

    Two tests must agree. Sign flips, the same for all candidates, keep the correlation between candidates, for any
    spread. Exchanged labels, which permute the models' scores on each prompt, are exact if all models are equal: the
    rate of wrong choices is then at most 1 - level (sign flips alone: up to 0.08, since all differences share the
    incumbent). One-sided: only improvements count.

    Args:
        incumbent, candidates: mean score of each prompt, by category; all over the same prompts in the same order.

    Raises:
        ValueError: no candidates, or they were not scored on the same prompts.
    """
    if not candidates:
        raise ValueError("there is no candidate to choose from")
    sizes = {name: len(values) for name, values in incumbent.items()}
    for i, candidate in enumerate(candidates):
        if {name: len(values) for name, values in candidate.items()} != sizes:
            raise ValueError(f"candidate {i} was scored on other prompts than the incumbent")
    differences = {
        name: np.array([np.subtract(candidate[name], incumbent[name]) for candidate in candidates]).reshape(
            len(candidates), -1
        )
        for name in incumbent
    }
    d, weight, _ = _weighted(differences, pooling)  # [K, n]
    means = d @ weight
    signs = _signs(d.shape[1], flips, seed)
    # Not divided by each candidate's own error: the largest ratio would favour underestimated errors.
    flipped = (signs @ (d * weight).T.astype(np.float32)).max(axis=1)  # [flips, K] -> [flips]
    exchanged = _exchanged(d * weight, min(flips, 1999), seed)
    p, limit = [0.0] * len(means), 0.0
    for largest, extra in ((flipped, 0 if len(signs) < flips else 1), (exchanged, 1)):
        of_test = [(int((largest >= mean - 1e-6).sum()) + extra) / (len(largest) + extra) for mean in means]
        p = [max(pair) for pair in zip(p, of_test, strict=True)]
        limit = max(limit, float(np.quantile(largest, level, method="higher")))
    best = int(np.argmax(means))
    accepted = p[best] <= 1 - level and means[best] > 0
    return Choice(best if accepted else None, means.tolist(), p, (means - limit).tolist())


def _exchanged(d: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws]: the largest candidate minus the incumbent when, on each prompt, all models' labels shift by a random number.

    Args:
        d: [K, n] weighted differences to the incumbent, whose own row is 0.
    """
    models = np.concatenate([np.zeros((1, d.shape[1])), d]).astype(np.float32)  # [K + 1, n]
    count = len(models)
    shifts = np.random.default_rng((seed, 1)).integers(0, count, size=(draws, d.shape[1]))
    totals = np.zeros((draws, count), dtype=np.float32)
    for shift in range(count):
        chosen = (shifts == shift).astype(np.float32)  # [draws, n]
        totals += np.roll(chosen @ models.T, -shift, axis=1)  # label k has the scores of model k + shift
    return totals[:, 1:].max(axis=1) - totals[:, 0]
