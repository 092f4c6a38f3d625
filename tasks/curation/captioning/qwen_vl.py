"""Qwen3-VL through transformers: batches of images and prompts, on a GPU or a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from model.names import COMMIT
from tasks.curation.captioning.base import Answer, Captioner, Request
from tasks.curation.captioning.checks import check_language
from tasks.curation.config import CaptionerConfig

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check(config: CaptionerConfig) -> None:
    """
    Raises:
        ValueError: no weights, or weights of the Hub that are not pinned to a commit.
    """
    if not config.model.startswith(("./", "/")):
        if not _REPOSITORY.fullmatch(config.model):
            raise ValueError(
                f"curation.captioner.model={config.model!r} must be ORG/NAME on the Hub, such as "
                "Qwen/Qwen3-VL-8B-Instruct, or a directory that begins with ./ or /"
            )
        if not COMMIT.fullmatch(config.revision):
            raise ValueError(
                f"curation.captioner.revision={config.revision!r} must be a commit of {config.model}: 40 hexadecimal digits"
            )
    check_language(config.language)


class QwenVL(Captioner):
    """See base.Captioner. Requests of one batch have the same token limit, so that none waits for a longer one."""

    def __init__(self, config: CaptionerConfig, parts: tuple[Any, Any, Any] | None = None) -> None:
        """
        Args:
            parts: loaded model, tokenizer and image processor; None loads those of the recipe.
        """
        super().__init__(config)
        self._parts = parts
        self.window = 4 * config.batch_size

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        ordered = sorted(requests, key=lambda request: (request.max_tokens, request.attempt, len(request.prompt)))
        start = 0
        while start < len(ordered):
            first, stop = ordered[start], start
            while stop < min(len(ordered), start + self.config.batch_size) and (
                (ordered[stop].max_tokens, ordered[stop].attempt) == (first.max_tokens, first.attempt)
            ):
                stop += 1
            batch = ordered[start:stop]
            yield from zip(batch, self._generate(batch), strict=True)
            start = stop

    def _load(self) -> tuple[Any, Any, Any]:
        if self._parts is None:
            import torch
            import transformers
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            from eval.judges.base import device, resolve

            weights = resolve(self.config.model, self.config.revision or self.config.model)
            where = {"revision": weights.revision}
            model = getattr(transformers, ARCHITECTURE).from_pretrained(
                weights.place,
                dtype=getattr(torch, self.config.dtype),
                attn_implementation="sdpa",
                use_safetensors=True,
                **where,
            )
            chosen = device() if self.config.device == "auto" else self.config.device
            tokenizer = transformers.AutoTokenizer.from_pretrained(weights.place, **where)
            processor = Qwen2VLImageProcessorPil.from_pretrained(weights.place, **where)
            self._parts = model.to(chosen).eval(), tokenizer, processor
        return self._parts

    def _generate(self, batch: Sequence[Request]) -> list[Answer]:
        import torch

        model, tokenizer, _ = self._load()
        inputs = self._inputs(batch)
        # Attempts after a bad answer must differ, so only the first may be greedy.
        temperature = self.config.temperature if batch[0].attempt == 1 else max(self.config.temperature, 0.7)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(batch[0].seed)
            out = model.generate(**inputs, max_new_tokens=batch[0].max_tokens, **sampling)
        end = model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        answers = []
        for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
            stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            text = tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers.append(Answer(text, "stop" if stop < len(ids) else "length"))
        return answers

    def _inputs(self, batch: Sequence[Request]) -> dict[str, torch.Tensor]:
        """The model's inputs, texts padded on the left: generation continues the last token."""
        import torch

        from eval.judges.qwen_vl import USER, model_inputs

        model, tokenizer, processor = self._load()
        single = [model_inputs(r.image, USER.format(text=r.prompt), tokenizer, processor) for r in batch]
        longest = max(one["input_ids"].shape[1] for one in single)
        fill = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "mm_token_type_ids": 0}
        inputs = {
            name: torch.cat(
                [torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0), value=value) for one in single]
            )
            for name, value in fill.items()
        }
        inputs["pixel_values"] = torch.cat([torch.as_tensor(one["pixel_values"]) for one in single]).to(model.dtype)
        inputs["image_grid_thw"] = torch.cat([torch.as_tensor(one["image_grid_thw"]) for one in single])
        return {name: tensor.to(model.device) for name, tensor in inputs.items()}

    def close(self) -> None:
        self._parts = None
