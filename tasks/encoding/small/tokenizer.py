"""The tokenizer and chat format of the small text encoder.

The pipeline sends every prompt as a fixed system message of about 50 words followed by the user's text. Each text token
costs a key and a value in every block of the transformer. So here the system message is one special token, and so is the
end of a turn: `<|system|>a photo of a red circle<|im_end|>` has 8 tokens. A caption of up to 14 words fits in 16 tokens.
The reasons are in docs/decisions/tiny.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAD, UNKNOWN, START, END, SYSTEM = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", "<|system|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = (PAD, UNKNOWN, START, END, SYSTEM, *VISION)
# Roles: system (its text is ignored), user and assistant. A generation prompt adds no tokens.
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


# Scripts without spaces: each character, with its combining marks, is a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]\p{M}*"


def build_tokenizer(captions: Iterable[str], vocab_size: int, words: Sequence[str] = ()) -> Any:
    """A word-level tokenizer: lower case, split at spaces, at punctuation, and at every character of scripts without
    spaces. Its vocabulary has the most frequent words of the captions.

    Args:
        words: always in the vocabulary.

    Raises:
        ValueError: vocab_size is too small for the special tokens and `words`.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(UNSPACED), behavior="isolated"), pre_tokenizers.Whitespace()]
    )
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            counts[word] += times
    needed = list(dict.fromkeys([*SPECIAL_TOKENS, *words]))
    if vocab_size < len(needed):
        raise ValueError(f"vocab_size={vocab_size} must be at least {len(needed)}: special tokens and given words")
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = list(dict.fromkeys([*needed, *frequent]))[:vocab_size]

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
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
    """Writes `processor/`: the tokenizer and the chat template, with a class name that old and new transformers accept."""
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
