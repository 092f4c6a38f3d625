"""Published scores for comparison, each with its source. None has an error bar.

They are by the official judges: a score by another judge is not comparable to them, and the card says so.
"""

from __future__ import annotations

from typing import NamedTuple

NUCLEUS = "Nucleus-Image, arXiv 2604.12163"
QWEN = "Qwen-Image technical report, arXiv 2508.02324"
GENEVAL = "GenEval, arXiv 2310.11513"
GENEVAL2 = "GenEval 2, arXiv 2512.16853, table 4, by way of two works that quote it"


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
    # Soft-TIFA GM. No figure of Nucleus-Image is published.
    "geneval2": (Published("Gemini 2.5 Flash Image", 44.6, GENEVAL2),),
    "oneig": (
        Published("Nucleus-Image", 0.522, NUCLEUS),
        Published("Nucleus-Image", 0.430, NUCLEUS, "style"),
        Published("Qwen-Image", 0.539, QWEN),
        Published("Qwen-Image", 0.418, QWEN, "style"),
        Published("GPT Image 1 (high)", 0.533, QWEN),
        Published("GPT Image 1 (high)", 0.462, QWEN, "style"),
        Published("Seedream 3.0", 0.530, QWEN),
        Published("Imagen 4", 0.515, QWEN),
        Published("HiDream-I1-Full", 0.477, QWEN),
        Published("SD3.5 Large", 0.462, QWEN),
        Published("FLUX.1-dev", 0.434, QWEN),
        Published("SDXL", 0.316, QWEN),
    ),
    "oneig-zh": (
        Published("Qwen-Image", 0.548, QWEN),
        Published("Seedream 3.0", 0.528, QWEN),
        Published("GPT Image 1 (high)", 0.474, QWEN),
        Published("HiDream-I1-Full", 0.337, QWEN),
    ),
    "oneig-text": (
        Published("Qwen-Image", 0.891, QWEN),
        Published("Seedream 3.0", 0.865, QWEN),
        Published("GPT Image 1 (high)", 0.857, QWEN),
        Published("HiDream-I1-Full", 0.707, QWEN),
        Published("FLUX.1-dev", 0.523, QWEN),
        Published("SDXL", 0.029, QWEN),
    ),
    "oneig-text-zh": (
        Published("Qwen-Image", 0.963, QWEN),
        Published("Seedream 3.0", 0.928, QWEN),
        Published("GPT Image 1 (high)", 0.650, QWEN),
        Published("HiDream-I1-Full", 0.205, QWEN),
    ),
}
