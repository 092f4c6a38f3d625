"""Loads frozen text encoders, and encodes prompts as NucleusMoEImagePipeline does.

Padding is on the right. The pipeline derives text positions from the index in the sequence: with padding on the left
(the default for generation with language models), a text's positions would depend on the longest text of its batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.constants import PAD_MULTIPLE, PIPELINE_TEXT_STATE

if TYPE_CHECKING:
    import torch


def hide_bars() -> None:
    """Turns off transformers' progress bars for loading and saving weights. Bars of Hub downloads stay on."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **(kwargs | {"disable": True})))


def load_text_encoder(directory: str | Path, dtype: Any = None) -> Any:
    """The text encoder in a `text_encoder/` directory, in eval mode. `dtype` as in transformers (None: float32)."""
    from transformers import Qwen3VLForConditionalGeneration

    hide_bars()
    return Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()


def load_processor(directory: str | Path) -> Any:
    """The processor in a `processor/` directory: a Qwen3VLProcessor, or only its tokenizer without torchvision.

    transformers requires torchvision for the processor's video part, which texts do not use. Both format and tokenize
    texts in the same way.
    """
    from transformers import AutoTokenizer, Qwen3VLProcessor
    from transformers.utils import is_torchvision_available

    complete = (Path(directory) / "preprocessor_config.json").is_file()
    return (Qwen3VLProcessor if complete and is_torchvision_available() else AutoTokenizer).from_pretrained(directory)


def format_prompts(processor: Any, texts: Sequence[str]) -> list[str]:
    """Chat-formatted prompts, as `NucleusMoEImagePipeline._format_prompt` makes them.

    If the template inserts the user's text unchanged, it is rendered only once.
    """
    from diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image import DEFAULT_SYSTEM_PROMPT

    def render(text: str) -> str:
        messages = [
            {"role": "system", "content": DEFAULT_SYSTEM_PROMPT},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    marker = "\ue000"  # a private-use character, which no template contains
    before, separator, after = render(marker).partition(marker)
    probe = " A \n b "
    if separator and render(probe) == before + probe + after and render("") == before + after:
        return [before + text + after for text in texts]
    return [render(text) for text in texts]


def state_layer(layers: int, hidden_state_index: int) -> int:
    """The number of layers that compute hidden state `hidden_state_index` (counted from the end, as in transformers).

    Raises:
        ValueError: there is no such state.
    """
    count = layers + 1 + hidden_state_index  # hidden_states has the embeddings and each layer's output
    if not 0 <= count < layers:
        raise ValueError(
            f"hidden_state_index={hidden_state_index} of a text encoder of {layers} layers: "
            f"valid are {-layers - 1} to -2 (-1, after the final norm, is not supported)"
        )
    return count


@contextlib.contextmanager
def first_layers(text_encoder: Any, count: int) -> Iterator[None]:
    """Truncates the language model to its first `count` layers, without final norm, inside the `with` block."""
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
    """The result of `NucleusMoEImagePipeline.encode_prompt` for these prompts in one batch.

    Layers above the hidden state do not run: with 10 layers and index -8 that saves seven of ten.

    Returns:
        embeddings [n, T, D], T a multiple of 8 (unless truncated at max_tokens), and mask [n, T], or None if all is true.

    Raises:
        ValueError: the index is out of range.
    """
    import torch

    layers = state_layer(text_encoder.config.text_config.num_hidden_layers, hidden_state_index)
    inputs = processor(
        text=format_prompts(processor, texts),
        padding="longest",
        pad_to_multiple_of=PAD_MULTIPLE,
        max_length=max_tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    with torch.inference_mode(), first_layers(text_encoder, layers):
        embeds = text_encoder.model(**inputs, use_cache=False).last_hidden_state
    mask = inputs.attention_mask
    return embeds.to(text_encoder.dtype), None if mask.all() else mask
