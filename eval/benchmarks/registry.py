"""The benchmarks by name, each imported when it is loaded."""

from __future__ import annotations

import pkgutil

from eval.benchmarks.base import Benchmark
from eval.names import hint

BENCHMARKS = {
    "shapes": "eval.benchmarks.shapes.benchmark:BENCHMARK",
    "captions": "eval.benchmarks.captions:BENCHMARK",
    "geneval": "eval.benchmarks.geneval:BENCHMARK",
    "geneval2": "eval.benchmarks.geneval2:BENCHMARK",
    "dpg": "eval.benchmarks.dpg:BENCHMARK",
    "oneig": "eval.benchmarks.oneig:ENGLISH",
    "oneig-zh": "eval.benchmarks.oneig:CHINESE",
    "oneig-text": "eval.benchmarks.oneig:ENGLISH_TEXT",
    "oneig-text-zh": "eval.benchmarks.oneig:CHINESE_TEXT",
}


def load(name: str) -> Benchmark:
    """The benchmark of a name in `BENCHMARKS`, or of a "module:object" or "module:class" of your own.

    Raises:
        ValueError: there is none (says what could have been meant), or it is no complete `Benchmark`.
    """
    target = BENCHMARKS.get(name, name if ":" in name else None)
    if target is None:
        raise ValueError(
            f"there is no benchmark {name!r}; {hint(name, BENCHMARKS)}It must be one of {', '.join(BENCHMARKS)}, or "
            "module:object"
        )
    try:
        loaded = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        if name in BENCHMARKS:
            raise
        raise ValueError(f"benchmark {name!r} cannot be imported: {error}") from error
    benchmark = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(benchmark, Benchmark):
        raise ValueError(
            f"benchmark {name!r} is a {type(benchmark).__name__}, not a subclass of eval.benchmarks.base.Benchmark"
        )
    own = type(benchmark)
    if absent := [name for name in ("name", "judges") if not hasattr(benchmark, name)]:
        raise ValueError(f"{own.__name__} must set {' and '.join(absent)}")
    if own.score_image is Benchmark.score_image and own.score is Benchmark.score:
        raise ValueError(f"{own.__name__} must have score_image (or score)")
    if benchmark.pooling == "parts" and own.summarise is Benchmark.summarise:
        raise ValueError(f"{own.__name__} has pooling='parts', for which it must have its own summarise")
    return benchmark
