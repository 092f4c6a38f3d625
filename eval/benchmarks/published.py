"""Published scores for comparison, each with its source (`Benchmark.published`). None has an error bar.

They are by the official judges: a score by another judge is not comparable to them, and the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval.benchmarks.base import Published

NUCLEUS = "Nucleus-Image, arXiv 2604.12163"
QWEN = "Qwen-Image technical report, arXiv 2508.02324"


def printed_in(source: str, scores: Mapping[str, float | Mapping[str, float]]) -> tuple[Published, ...]:
    """The scores that one source prints.

    Args:
        scores: {model: overall score, or {category: score}}, in the benchmark's own scale.
    """
    return tuple(
        Published(model, score, source, category)
        for model, of_model in scores.items()
        for category, score in (of_model if isinstance(of_model, Mapping) else {"overall": of_model}).items()
    )
