"""Frozen text encoders, and the one way in which prompts become states of them, as the pipeline computes them.

Padding is on the right. The pipeline gives text positions by place in the sequence: padding on the left (what
language models use to generate) would move a text when it is batched with a longer one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.constants import PIPELINE_TEXT_STATE

if TYPE_CHECKING:
    import torch

PAD_MULTIPLE = 8  # NucleusMoEImagePipeline.encode_prompt


def hide_bars() -> None:
    """Turns off the progress bars of transformers, which time milliseconds of reading and writing weights; the bars
    of the Hub's downloads, and this project's own, stay."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **(kwargs | {"disable": True})))


def load_text_encoder(directory: str | Path, dtype: Any = None) -> Any:
    """What a `text_encoder/` directory holds, frozen as it is; `dtype` as of transformers (None: float32)."""
    from transformers import Qwen3VLForConditionalGeneration

    hide_bars()
    return Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()


def load_processor(directory: str | Path) -> Any:
    """What a `processor/` directory holds: a Qwen3VLProcessor, or where torchvision is missing its tokenizer alone.

    transformers needs torchvision for the processor's video half, which no text uses; both format and tokenize
    texts alike.
    """
    from transformers import AutoTokenizer, Qwen3VLProcessor
    from transformers.utils import is_torchvision_available

    whole = (Path(directory) / "preprocessor_config.json").is_file()
    return (Qwen3VLProcessor if whole and is_torchvision_available() else AutoTokenizer).from_pretrained(directory)


def format_prompts(processor: Any, texts: Sequence[str]) -> list[str]:
    """Chat-formatted prompts, as `NucleusMoEImagePipeline._format_prompt` makes them.

    A template that puts the user's text in as it is renders once, for all texts.
    """
    from diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image import DEFAULT_SYSTEM_PROMPT

    def render(text: str) -> str:
        messages = [
            {"role": "system", "content": DEFAULT_SYSTEM_PROMPT},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    before, found, after = render("\ue000").partition("\ue000")  # a private character: no template holds it
    probe = " A \n b "
    if found and render(probe) == before + probe + after and render("") == before + after:
        return [before + text + after for text in texts]
    return [render(text) for text in texts]


def state_layer(layers: int, hidden_state_index: int) -> int:
    """How many of a text encoder's layers lead to a hidden state, counted from the end as transformers does.

    Raises:
        ValueError: there is no such state.
    """
    wanted = layers + 1 + hidden_state_index  # hidden_states holds the embeddings and each layer's output
    if not 0 <= wanted < layers:
        raise ValueError(
            f"hidden_state_index={hidden_state_index} of a text encoder of {layers} layers: "
            f"valid are {-layers - 1} to -2 (-1, behind the final norm, is not supported)"
        )
    return wanted


@contextlib.contextmanager
def first_layers(text_encoder: Any, count: int) -> Iterator[None]:
    """Within the block the language model ends after `count` layers, without its final norm: at hidden state `count`."""
    import torch

    model = text_encoder.model.language_model
    layers, norm = model.layers, model.norm
    model.layers, model.norm = torch.nn.ModuleList(layers[:count]), torch.nn.Identity()
    try:
        yield
    finally:
        model.layers, model.norm = layers, norm


def encode_text(
    text_encoder: Any,
    processor: Any,
    texts: Sequence[str],
    max_tokens: int = 1024,
    hidden_state_index: int = PIPELINE_TEXT_STATE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `NucleusMoEImagePipeline.encode_prompt` gives for these prompts in one batch.

    Layers above the wanted hidden state are not run: with 10 layers and index -8 that saves seven of ten.

    Returns:
        embeddings [n, T, D], T a multiple of 8 (unless cut at max_tokens), and mask [n, T], or None if all is true.

    Raises:
        ValueError: the index reaches below the embeddings.
    """
    import torch

    wanted = state_layer(text_encoder.config.text_config.num_hidden_layers, hidden_state_index)
    inputs = processor(
        text=format_prompts(processor, texts),
        padding="longest",
        pad_to_multiple_of=PAD_MULTIPLE,
        max_length=max_tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    with torch.inference_mode(), first_layers(text_encoder, wanted):
        embeds = text_encoder.model(**inputs, use_cache=False).last_hidden_state
    mask = inputs.attention_mask
    return embeds.to(text_encoder.dtype), None if mask.all() else mask
