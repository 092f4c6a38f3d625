"""GenEval's colour judge: CLIP ViT-L/14 (OpenAI's weights), zero-shot over ten colours.

image + box (+ mask) --crop_object--> picture --CLIP--> the colour of the nearest of ten text embeddings
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eval.geneval import COLORS, crop_object
from eval.judges.base import BaseJudge, Probe, clip_pixels, device, libraries, only_image, resolve
from eval.judging.protocols import Request

if TYPE_CHECKING:
    import torch

REPOSITORY = "openai/clip-vit-large-patch14"
TEMPLATES = "a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object"


class CLIPColors:
    """The colours of objects; embeddings of each class's texts are computed once.

    Args:
        model: a `CLIPModel`.
        tokenizer: of that model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model.eval(), tokenizer
        self._classifiers: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, at: str | None = None) -> tuple[CLIPColors, dict[str, Any]]:
        """(the classifier, its part of a spec) of the Hub's weights or of a directory's.

        Raises:
            ValueError: see eval.judges.base.resolve.
        """
        import torch
        from transformers import CLIPModel, CLIPTokenizer

        weights = resolve(REPOSITORY, at)
        where = {"revision": weights.revision}
        model = CLIPModel.from_pretrained(
            weights.place, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, **where
        ).to(device())
        tokenizer = CLIPTokenizer.from_pretrained(weights.place, **where)
        spec = {
            "class": "transformers.CLIPModel",
            "weights": weights.identity,
            "dtype": "float32 (GenEval's code runs it under CUDA autocast)",
            "attention": "sdpa",
            "processor": f"open_clip's: {model.config.vision_config.image_size} px, bicubic, the middle, CLIP's mean and deviation",
            "decoding": f"largest cosine to the mean of {len(TEMPLATES)} templates of {len(COLORS)} colours",
        }
        return cls(model, tokenizer), spec

    def _classifier(self, name: str) -> torch.Tensor:
        """[colours, D]: each template's embedding is normalised, their mean again."""
        import torch

        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
            with torch.inference_mode():
                # transformers 5 returns an output object, whose pooler_output is the projected embedding
                embeddings = _unit(self._model.get_text_features(**tokens).pooler_output)
            self._classifiers[name] = _unit(embeddings.view(len(COLORS), len(TEMPLATES), -1).mean(dim=1))
        return self._classifiers[name]

    def colors(
        self,
        image: Image.Image,
        name: str,
        boxes: Sequence[Sequence[float]],
        masks: Sequence[np.ndarray] | None = None,
    ) -> list[str]:
        """One of `eval.geneval.COLORS` per box.

        Args:
            name: the class, as GenEval calls it.
            boxes: (x0, y0, x1, y1) in pixels.
            masks: [height, width] bool of the image, one per box; None keeps the background of the object.
        """
        answers = []
        for i, box in enumerate(boxes):
            picture = crop_object(image, _at_least_one_pixel(box), None if masks is None else masks[i])
            answers.append(COLORS[int(self._cosines(picture, name).argmax())])
        return answers

    def _cosines(self, picture: Image.Image, name: str) -> torch.Tensor:
        """[colours]: of a cropped object to each colour's texts."""
        import torch

        pixels = torch.from_numpy(clip_pixels(picture, self._model.config.vision_config.image_size))[None]
        with torch.inference_mode():
            features = self._model.get_image_features(pixel_values=pixels.to(self._model.device)).pooler_output
            return (_unit(features) @ self._classifier(name).T)[0]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _at_least_one_pixel(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box[:4]
    return [x0, y0, max(x1, round(x0) + 1), max(y1, round(y0) + 1)]


class CLIPColor(BaseJudge):
    """See eval.judging.protocols.Judge. It uses boxes only, for detectors without masks, unlike GenEval."""

    name = "clip-color"
    model = "ViT-L-14, openai (transformers), without masks"

    def __init__(self, at: str | None = None):
        self._colors, spec = CLIPColors.load(at)
        super().__init__({**spec, "masks": "none", "libraries": libraries("torch", "transformers", "pillow")})

    def answer_one(self, request: Request) -> list[str]:
        return self._colors.colors(only_image(request), request.options["class"], request.options["boxes"])

    def probes(self) -> list[Probe]:
        image = Image.new("RGB", (128, 64), (210, 20, 20))
        image.paste((20, 40, 210), (64, 0, 128, 64))
        options = {"class": "car", "boxes": [[0, 0, 64, 64], [64, 0, 128, 64]], "indices": [0, 1]}
        return [Probe(Request([image], "", options), ["red", "blue"])]
