"""A small judge for DPG-Bench's questions: BLIP, fine-tuned on VQA v2. A score by it is `dpg[blip-vqa]`.

The official judge is mPLUG (eval.judges.mplug).
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from eval.judges.base import BaseJudge, Probe, device, libraries, only_image, resolve
from eval.judging.protocols import Request

REPOSITORY = "Salesforce/blip-vqa-base"
MAX_NEW_TOKENS = 10


class BlipVQA(BaseJudge):
    """See eval.judging.protocols.Judge ("vqa"): the answer is the model's text, for a question in lower case.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "blip-vqa"
    model = REPOSITORY

    def __init__(self, at: str | None = None):
        import torch
        from transformers import AutoTokenizer, BlipForQuestionAnswering
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        weights = resolve(REPOSITORY, at)
        where = {"revision": weights.revision}
        model = BlipForQuestionAnswering.from_pretrained(
            weights.place, dtype=torch.float32, use_safetensors=True, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.place, **where)
        processor = BlipImageProcessorPil.from_pretrained(weights.place, **where)
        self._assemble(model.to(device()), tokenizer, processor, weights.identity)

    def _assemble(self, model: Any, tokenizer: Any, processor: Any, identity: str) -> None:
        self._model, self._tokenizer, self._processor = model.eval(), tokenizer, processor
        super().__init__(
            {
                "class": "transformers.BlipForQuestionAnswering",
                "weights": identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.config._attn_implementation,
                "processor": "BlipImageProcessorPil of the checkpoint",
                "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens; the question in lower case",
                "libraries": libraries("torch", "transformers", "pillow"),
            }
        )

    @classmethod
    def of(cls, model: Any, tokenizer: Any, processor: Any, identity: str) -> BlipVQA:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, tokenizer, processor, identity)
        return judge

    def answer_one(self, request: Request) -> str:
        import torch

        where = self._model.device
        text = self._tokenizer([request.text.lower()], return_tensors="pt")
        pixels = self._processor(images=[only_image(request)], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            ids = self._model.generate(
                pixel_values=pixels.to(where, self._model.dtype),
                input_ids=text["input_ids"].to(where),
                attention_mask=text["attention_mask"].to(where),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
        return self._tokenizer.decode(ids[0], skip_special_tokens=True).strip()

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (384, 384), (230, 10, 10))
        return [Probe(Request([red], f"Is the image {c}?"), a) for c, a in (("red", "yes"), ("blue", "no"))]
