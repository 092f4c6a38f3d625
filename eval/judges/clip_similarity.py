"""Similarity of an image and its caption: the cosine of CLIP ViT-L/14's embeddings, at least 0 (CLIP score)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from eval.judges.base import BaseJudge, Probe, device, libraries, only_image, resolve
from eval.judges.clip_color import REPOSITORY
from eval.judging.protocols import Request


class CLIPSimilarity(BaseJudge):
    """See eval.judging.protocols.Judge ("similarity"): a number in [0, 1]. Captions are cut at CLIP's 77 tokens.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "clip-similarity"
    model = "ViT-L-14, openai (transformers), cosine"

    def __init__(self, at: str | None = None):
        import torch
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        weights = resolve(REPOSITORY, at)
        where = {"revision": weights.revision}
        model = CLIPModel.from_pretrained(weights.place, dtype=torch.float32, use_safetensors=True, **where)
        tokenizer = CLIPTokenizer.from_pretrained(weights.place, **where)
        processor = CLIPImageProcessorPil.from_pretrained(weights.place, **where)
        self._assemble(model.to(device()), tokenizer, processor, weights.identity)

    def _assemble(self, model: Any, tokenizer: Any, processor: Any, identity: str) -> None:
        self._model, self._tokenizer, self._processor = model.eval(), tokenizer, processor
        super().__init__(
            {
                "class": "transformers.CLIPModel",
                "weights": identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.config._attn_implementation,
                "processor": "CLIPImageProcessorPil of the checkpoint",
                "decoding": "cosine of the projected embeddings, at least 0",
                "libraries": libraries("torch", "transformers", "pillow"),
            }
        )

    @classmethod
    def of(cls, model: Any, tokenizer: Any, processor: Any, identity: str) -> CLIPSimilarity:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, tokenizer, processor, identity)
        return judge

    def answer_one(self, request: Request) -> float:
        import torch

        where = self._model.device
        pixels = self._processor(images=[only_image(request)], return_tensors="pt")["pixel_values"]
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([request.text], truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            image = self._model.get_image_features(pixel_values=pixels.to(where, self._model.dtype)).pooler_output
            text = self._model.get_text_features(**tokens.to(where)).pooler_output
            cosine = torch.nn.functional.cosine_similarity(image.float(), text.float())
        return max(0.0, float(cosine))

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (224, 224), (230, 10, 10))
        return [Probe(Request([red], "a red square")), Probe(Request([red], "a blue car"))]
