"""What scoring one image costs, for `tasks.curation.plan`: measured processor time of scorers on a CPU, and FLOPs of
published encoders from their shapes."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.curation.scorers import Chosen

# Milliseconds of a core: `python benchmarks/curation/scorers.py` on an AMD EPYC core (2026-11-30), 512 x 384 px. PP-OCR's
# is that with a line of text. The head's is assumed: a few small products.
CPU_MS = {
    "classical": 0.1,
    "proxy": 1.3,
    "open-nsfw": 51.6,
    "pp-ocr": 505.4,
    "brisque": 19.2,
    "blazeface": 16.0,
    "efficientnet-lite": 41.6,
    "conse": 67.3,
    "aesthetic-head": 0.1,
}


@dataclass(frozen=True)
class Tower:
    """A transformer encoder over `tokens` tokens."""

    layers: int
    width: int
    hidden: int  # of the feed-forward layers
    tokens: int

    @property
    def flops(self) -> float:
        """Of matrix products and attention, without embedding and pooling."""
        products = 2 * self.tokens * (4 * self.width**2 + 2 * self.width * self.hidden)
        return self.layers * (products + 4 * self.tokens**2 * self.width)


VIT_BASE = Tower(12, 768, 3072, 197)  # 224 px in patches of 16, and a class token
# From the models' config.json.
IMAGES = {
    "google/siglip2-so400m-patch16-384": Tower(27, 1152, 4304, 576),
    "openai/clip-vit-large-patch14": Tower(24, 1024, 4096, 257),
    "Falconsai/nsfw_image_detection": VIT_BASE,
    "amrul-hzz/watermark_detector": VIT_BASE,
}
TEXTS = {"google/siglip2-so400m-patch16-384": Tower(27, 1152, 4304, 64)}  # padded to 64 tokens


def flops(one: Chosen, captions: float) -> float | None:
    """FLOPs of an image with so many captions, for a scorer with weights of the Hub; None if its model is not known."""
    encoder = one.choice.encoder or one.choice
    if "captions" in one.spec.needs:
        tower = TEXTS.get(encoder.repo_id or "")
        return None if tower is None else captions * tower.flops
    tower = IMAGES.get(encoder.repo_id or "")
    return None if tower is None else tower.flops
