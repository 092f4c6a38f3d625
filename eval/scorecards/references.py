"""Published scores for comparison, each with its source. None has an error bar.

They are by the official judges: a score by another judge is not comparable to them, and the card says so.
"""

from __future__ import annotations

from typing import NamedTuple

NUCLEUS = "Nucleus-Image, arXiv 2604.12163"
QWEN = "Qwen-Image technical report, arXiv 2508.02324"
GENEVAL = "GenEval, arXiv 2310.11513"


class Published(NamedTuple):
    model: str
    score: float  # in the benchmark's own scale
    source: str
    category: str = "overall"


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "geneval": (
        Published("Nucleus-Image", 0.87, NUCLEUS),
        Published("Nucleus-Image", 0.85, NUCLEUS, "position"),
        Published("Qwen-Image", 0.87, QWEN),
        Published("Qwen-Image", 0.76, QWEN, "position"),
        Published("GPT Image 1 (high)", 0.84, QWEN),
        Published("Seedream 3.0", 0.84, QWEN),
        Published("HiDream-I1-Full", 0.83, QWEN),
        Published("FLUX.1-dev", 0.66, QWEN),
        Published("SDXL", 0.55, GENEVAL),
    ),
    "dpg": (
        Published("Nucleus-Image", 88.79, NUCLEUS),
        Published("Nucleus-Image", 93.08, NUCLEUS, "entity"),
        Published("Nucleus-Image", 92.20, NUCLEUS, "attribute"),
        Published("Nucleus-Image", 93.62, NUCLEUS, "other"),
        Published("Qwen-Image", 88.32, QWEN),
        Published("Seedream 3.0", 88.27, QWEN),
        Published("HiDream-I1-Full", 85.89, QWEN),
        Published("GPT Image 1 (high)", 85.15, QWEN),
        Published("FLUX.1-dev", 83.84, QWEN),
    ),
    "oneig": (
        Published("Nucleus-Image", 0.522, NUCLEUS),
        Published("Nucleus-Image", 0.430, NUCLEUS, "style"),
    ),
}
