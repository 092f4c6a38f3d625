"""The small text encoder's tokenizer and chat format, and the one way in which texts become embeddings.

The pipeline sends every prompt as a fixed system message of some 50 words and the user's text. Each text token is
a key and a value in every block of the transformer, so here the system message is ONE special token and a turn ends
with one more: `<|system|>a photo of a red circle<|im_end|>` is 8 tokens. A caption of up to 14 words fits in 16.

Padding is on the right. The pipeline gives text positions by place in the sequence: padding on the left (what
language models use to generate) would move a text when it is batched with a longer one.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PAD, UNKNOWN, START, END, SYSTEM = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", "<|system|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END, SYSTEM, *VISION)
PAD_MULTIPLE = 8  # NucleusMoEImagePipeline.encode_prompt
# Roles: system (any text: this encoder knows only one), user and assistant. A generation prompt adds nothing.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}<|system|>"
    "{%- else -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{ part.text }}"
    "{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}<|im_end|>"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def benchmark_words() -> list[str]:
    """Every word that a prompt of the shapes benchmark can hold: the tokenizer must know them all."""
    from eval.benchmarks.shapes import vocabulary

    texts = [*vocabulary.SHAPES, *vocabulary.PLURALS.values(), *vocabulary.COLORS, *vocabulary.BACKGROUNDS]
    texts += [*vocabulary.RELATIONS, *vocabulary.NUMBERS.values(), "a photo of and"]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def build_tokenizer(captions: Iterable[str], vocab_size: int) -> Any:
    """A word-level tokenizer: lower case, split at spaces and punctuation; the captions' most frequent words.

    Raises:
        ValueError: vocab_size does not hold the special tokens and the benchmark's words.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            counts[word] += times
    needed = [*SPECIAL_TOKENS, *benchmark_words()]
    if vocab_size < len(needed):
        raise ValueError(f"vocab_size={vocab_size} must be at least {len(needed)}: special tokens and benchmark words")
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    words = list(dict.fromkeys([*needed, *frequent]))[:vocab_size]

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START, SYSTEM, *VISION],
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(tokenizer: Any, directory: str | Path) -> None:
    """Writes `processor/`: the tokenizer and the chat template, under a class name that old and new releases know."""
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


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


def text_lengths(processor: Any, texts: Sequence[str], max_tokens: int) -> list[int]:
    """Tokens of each chat-formatted text, cut at max_tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = format_prompts(processor, texts)
    return [min(len(tokens), max_tokens) for tokens in tokenizer(prompts)["input_ids"]]


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
    text_encoder: Any, processor: Any, texts: Sequence[str], max_tokens: int = 1024, hidden_state_index: int = -8
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `NucleusMoEImagePipeline.encode_prompt` gives for these prompts in one batch.

    Layers above the wanted hidden state are not run: with 10 layers and index -8 that saves seven of ten.

    Returns:
        embeddings [n, T, D], T a multiple of 8 (unless cut at max_tokens), and mask [n, T], or None if all is true.

    Raises:
        ValueError: the index reaches below the embeddings.
    """
    import torch

    layers = text_encoder.config.text_config.num_hidden_layers
    wanted = layers + 1 + hidden_state_index  # hidden_states holds the embeddings and each layer's output
    if not 0 <= wanted < layers:
        raise ValueError(
            f"hidden_state_index={hidden_state_index} of a text encoder of {layers} layers: "
            f"valid are {-layers - 1} to -2 (-1, behind the final norm, is not supported)"
        )
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
