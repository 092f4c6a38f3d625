"""Qwen's vision-language models as judges: Qwen2.5-VL (OneIG's alignment and text) and Qwen3-VL (GenEval 2).

image --processor--> patches, grid ; text + one placeholder per merged patch --tokenizer--> ids, mm_token_type_ids --> model

This module makes the inputs, equal to those of `Qwen2_5_VLProcessor`, whose video part needs torchvision. Without
`mm_token_type_ids` the model treats image tokens as text, and its logits silently differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image, ImageDraw, ImageFont

from eval.judges.base import BaseJudge, Probe, device, libraries, only_image, resolve
from eval.judging.protocols import Request

IMAGE = "<|image_pad|>"
USER = "<|im_start|>user\n<|vision_start|>" + IMAGE + "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
MAX_NEW_TOKENS = 128  # of OneIG's code, if a question sets none
SEED = 42  # of OneIG's code: the checkpoint samples, at a temperature at which the best token always wins


def model_inputs(image: Image.Image, prompt: str, tokenizer: Any, processor: Any) -> dict[str, Any]:
    """The model's inputs of one image and a prompt with one placeholder for it.

    Args:
        prompt: the whole conversation, as the chat template writes it.
        tokenizer, processor: of the checkpoint; the processor is a `Qwen2VLImageProcessorPil`.
    """
    vision = processor(images=[image], return_tensors="pt")
    tokens_of_image = int(vision["image_grid_thw"][0].prod()) // processor.merge_size**2
    text = tokenizer([prompt.replace(IMAGE, IMAGE * tokens_of_image, 1)], return_tensors="pt")
    kinds = (text["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).long()
    return {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "mm_token_type_ids": kinds,
        "pixel_values": vision["pixel_values"],
        "image_grid_thw": vision["image_grid_thw"],
    }


class _QwenVL(BaseJudge):
    """Answers one question at a time, so that an answer depends only on its image and question."""

    repository: ClassVar[str]
    architecture: ClassVar[str]
    template: ClassVar[str]
    decoding: ClassVar[str]

    def __init__(self, at: str | None = None):
        import torch
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        weights = resolve(self.repository, at)
        where = {"revision": weights.revision}
        model = getattr(transformers, self.architecture).from_pretrained(
            weights.place, dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True, **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights.place, **where)
        processor = Qwen2VLImageProcessorPil.from_pretrained(weights.place, **where)
        self._assemble(model.to(device()), tokenizer, processor, weights.identity)
        if not weights.official:
            self.model = f"{self.architecture} of a directory"

    def _assemble(self, model: Any, tokenizer: Any, processor: Any, identity: str) -> None:
        self._model, self._tokenizer, self._processor = model.eval(), tokenizer, processor
        super().__init__(
            {
                "class": f"transformers.{self.architecture}",
                "weights": identity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.config._attn_implementation,
                "processor": "Qwen2VLImageProcessorPil of the checkpoint, one image at a time",
                "decoding": self.decoding,
                "template": self.template,
                "libraries": libraries("torch", "transformers", "pillow"),
            }
        )

    @classmethod
    def of(cls, model: Any, tokenizer: Any, processor: Any, identity: str) -> Any:
        """The judge of a model that is loaded already."""
        judge = cls.__new__(cls)
        judge._assemble(model, tokenizer, processor, identity)
        return judge

    def _inputs(self, image: Image.Image, text: str) -> dict[str, Any]:
        inputs = model_inputs(image, self.template.format(text=text), self._tokenizer, self._processor)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}


class Qwen25VL(_QwenVL):
    """See eval.judging.protocols.Judge: OneIG's judge of alignment ("vqa") and text ("ocr"); the answer is its text,
    unchanged.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "qwen2.5-vl-7b"
    repository = "Qwen/Qwen2.5-VL-7B-Instruct"
    model = "Qwen/Qwen2.5-VL-7B-Instruct"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    template = SYSTEM + USER
    decoding = f"the checkpoint's own generation_config, seed {SEED}, at most {MAX_NEW_TOKENS} tokens or as asked"

    def answer_one(self, request: Request) -> str:
        import torch

        inputs = self._inputs(only_image(request), request.text)
        tokens = int(request.options.get("max_new_tokens", MAX_NEW_TOKENS))
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(SEED)
            ids = self._model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def probes(self) -> list[Probe]:
        ask = "Is the whole image {}?. Please answer 'Yes' or 'No' only."
        red = Image.new("RGB", (224, 224), (230, 10, 10))
        written = Image.new("RGB", (320, 128), "white")
        ImageDraw.Draw(written).text((40, 32), "OPEN", font=ImageFont.load_default(56), fill="black")
        read = "Recognize the text in the image, only reply with the text content."
        return [
            Probe(Request([red], ask.format("red")), "Yes"),
            Probe(Request([red], ask.format("blue")), "No"),
            Probe(Request([written], read), "OPEN"),
        ]


class Qwen25VLYesNo(Qwen25VL):
    """Qwen2.5-VL for DPG-Bench, whose rule scores exactly `yes`: asked for Yes or No, and answered in lower case."""

    name = "qwen2.5-vl-7b-yes-no"
    model = "Qwen/Qwen2.5-VL-7B-Instruct, asked for yes or no"
    decoding = Qwen25VL.decoding + "; \" Please answer 'Yes' or 'No' only.\" added, lower case, without a full stop"

    def answer_one(self, request: Request) -> str:
        asked = Request(request.images, f"{request.text} Please answer 'Yes' or 'No' only.", request.options)
        return super().answer_one(asked).strip().rstrip(".").lower()

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (224, 224), (230, 10, 10))
        return [Probe(Request([red], f"Is the image {c}?"), a) for c, a in (("red", "yes"), ("blue", "no"))]


class Qwen3VL(_QwenVL):
    """See eval.judging.protocols.Judge: GenEval 2's judge ("soft_tifa"). The answer is the sum of the probabilities of the first
    token of each of options["answers"], repetitions included, as the official code adds them.

    Raises:
        ValueError: the weights are not there (eval.judges.base.resolve).
    """

    name = "qwen3-vl-8b"
    repository = "Qwen/Qwen3-VL-8B-Instruct"
    model = "Qwen/Qwen3-VL-8B-Instruct"
    architecture = "Qwen3VLForConditionalGeneration"
    template = USER
    decoding = "softmax of the first token's scores"

    def answer_one(self, request: Request) -> float:
        import torch

        inputs = self._inputs(only_image(request), request.text)
        with torch.inference_mode():
            out = self._model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            probabilities = out.scores[0][0].float().softmax(dim=-1)
        first = [self._tokenizer.encode(answer)[0] for answer in request.options["answers"]]
        return float(sum(float(probabilities[token]) for token in first))

    def probes(self) -> list[Probe]:
        red = Image.new("RGB", (224, 224), (230, 10, 10))
        answers = {"answers": ["Yes", "yes", " Yes", " yes"]}
        return [
            Probe(Request([red], "Is the image red? Answer in one word.", answers), 1.0),
            Probe(Request([red], "Is the image blue? Answer in one word.", answers), 0.0),
        ]

    def comparable(self, answer: Any) -> Any:
        return float(round(answer))
