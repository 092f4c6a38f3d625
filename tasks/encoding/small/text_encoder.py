"""A small `Qwen3VLForConditionalGeneration`, trained as a language model of the corpus's captions.

The pipeline reads hidden state -8: with 10 layers, the output of the third. The language model is trained to predict from
this state as well as from the last one (early exit through the tied head), so that the state carries content. Sequences are
chats of two captions of one image, so that predicting the second caption requires the content of the first.

This alone encodes colours too weakly: a language model need not store `blue` in the state of `square` (9% of that state's
variance was due to its own colour, 60% to the other object's). So each early state must also predict its own word and the
four before it, through added noise. Then 32% of a second noun's variance is due to its own colour, 26% to its shape, 31% to
the relation before it and 2% to the other object's colour, which a diffusion model learns in minutes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.constants import PAD_MULTIPLE, PIPELINE_TEXT_STATE
from model.logs import get_logger
from tasks.encoding.config import TinyTextEncoderConfig
from tasks.encoding.small.tokenizer import END, SYSTEM, VISION
from tasks.encoding.text.chat import first_layers

logger = get_logger(__name__)

if TYPE_CHECKING:
    import torch

FULL_EVERY = 4  # every fourth step runs all layers; the others stop at the early exit
WARMUP_STEPS = 50
WORDS_BACK = 4  # in `a circle left of a red square`, the state of square also predicts red and left
STATE_NOISE = 0.5  # standard deviation; states have unit RMS
MUON_DECAY = 0.1


def build_text_encoder(config: TinyTextEncoderConfig, tokenizer: Any, seed: int) -> Any:
    """An untrained model, with the smallest valid vision tower. Its weights are a function of the seed."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    head_dim = config.hidden_size // config.num_attention_heads
    third = head_dim // 2 // 3
    vision_start, vision_end, image_pad, video_pad = tokenizer.convert_tokens_to_ids(list(VISION))
    model_config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.convert_tokens_to_ids(SYSTEM),
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": config.hidden_size,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [],
        },
        image_token_id=image_pad,
        video_token_id=video_pad,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(model_config)


def train_text_encoder(
    caption_sets: Sequence[Sequence[str]],
    tokenizer: Any,
    config: TinyTextEncoderConfig,
    seed: int = 0,
    state_path: Path | None = None,
) -> tuple[Any, dict[str, float]]:
    """Trains on the captions of images (`caption_sets`: one sequence of captions per image). Resumes from `state_path` if
    an attempt was killed, with the same final weights.

    Returns:
        the model (fp32, frozen), and the last losses in nats per token: next token at the early exit and at the last layer,
        and the words so far.
    """
    import torch

    from model.optim import Muon
    from tasks.encoding.small.training_state import TrainingState

    model = build_text_encoder(config, tokenizer, seed)
    early = config.num_hidden_layers + 1 + PIPELINE_TEXT_STATE
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Heads that predict a token's own word and those before it; used only in training.
        backwards = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, len(tokenizer), bias=False) for _ in range(WORDS_BACK + 1)
        )
    ids = _tokenized(caption_sets, tokenizer)
    system, pad = tokenizer.convert_tokens_to_ids(SYSTEM), tokenizer.pad_token_id
    rng = np.random.default_rng(seed)
    trained = [p for name, p in model.named_parameters() if ".visual." not in name]
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in inside] + list(backwards.parameters())
    optimizers = (
        (config.muon_lr, Muon(matrices, lr=config.muon_lr, weight_decay=MUON_DECAY)),
        (config.lr, torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)),
    )
    losses = {"early": math.nan, "words_so_far": math.nan, "last": math.nan}
    state = TrainingState(state_path, [*matrices, *others], [optimizer for _, optimizer in optimizers], generator, rng)
    done, saved = state.load()
    losses |= saved
    started = time.monotonic()
    model.train()
    for step in range(done, config.steps):
        tokens = _batch(ids, config.batch_size, system, pad, rng)
        full = step % FULL_EVERY == FULL_EVERY - 1
        scale = min(1.0, (step + 1) / WARMUP_STEPS, 2.0 * (1.0 - step / config.steps))
        for parameter in (*matrices, *others):
            parameter.grad = None
        loss, named = _early_loss(model, backwards, early, tokens, pad, generator)
        losses |= {"early": float(loss.detach()), "words_so_far": float(named.detach())}
        (loss + named).backward()
        if full:
            loss = _cross_entropy(model(input_ids=tokens, use_cache=False).logits[:, :-1], tokens[:, 1:], pad)
            losses["last"] = float(loss.detach())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for lr, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
        if (step + 1) % max(1, config.steps // 20) == 0:
            logger.info(
                f"text encoder {step + 1}/{config.steps} steps, {time.monotonic() - started:.0f} s: "
                f"{losses['early']:.3f} nats per token at the early exit, {losses['last']:.3f} at the last layer, "
                f"{losses['words_so_far']:.3f} for the words so far"
            )
        state.save(step + 1, losses, last=step + 1 == config.steps)
    model.requires_grad_(False).eval()
    return model, losses


def _early_loss(
    model: Any,
    backwards: torch.nn.ModuleList,
    early: int,
    tokens: torch.Tensor,
    pad: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies at the early exit: of the next token, and of the words so far (mean over the heads).

    The state is normalised to unit RMS, as in the transformer, and noise is added, so that information must take a large
    share of the variance instead of small directions that only a long training would pick up.
    """
    import torch

    with first_layers(model, early):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    state = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
    state = state + STATE_NOISE * torch.randn(state.shape, generator=generator)
    ahead = _cross_entropy(model.lm_head(state[:, :-1]), tokens[:, 1:], pad)
    named = torch.zeros(())
    for back, head in enumerate(backwards):
        targets = tokens[:, : tokens.shape[1] - back].masked_fill(tokens[:, back:] == pad, pad)  # no loss at padding
        named = named + _cross_entropy(head(state[:, back:]), targets, pad) / len(backwards)
    return ahead, named


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """Mean over tokens [B, T] that are not padding. The causal model needs no mask, as padding is on the right."""
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=pad)


def _tokenized(caption_sets: Sequence[Sequence[str]], tokenizer: Any) -> list[list[list[int]]]:
    """Token ids of every caption, grouped by image; each distinct text is tokenized once."""
    texts = list(dict.fromkeys(text for captions in caption_sets for text in captions))
    known = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    end = tokenizer.convert_tokens_to_ids(END)
    return [[known[text] + [end] for text in captions] for captions in caption_sets if len(captions)]


def _batch(
    ids: list[list[list[int]]], batch_size: int, system: int, pad: int, rng: np.random.Generator
) -> torch.Tensor:
    """`<|system|>` caption `<|im_end|>` other caption `<|im_end|>`, right-padded: [batch_size, T].

    Draws four times as many chats, sorts them by length and takes a contiguous slice, which keeps padding small.
    """
    import torch

    drawn = []
    for i in rng.integers(len(ids), size=4 * batch_size):
        captions = ids[i]
        first = rng.integers(len(captions))
        second = (first + rng.integers(1, len(captions))) % len(captions) if len(captions) > 1 else first
        drawn.append([system, *captions[first], *captions[second]])
    drawn.sort(key=len)
    start = int(rng.integers(4)) * batch_size
    chosen = drawn[start : start + batch_size]
    length = -(-max(map(len, chosen)) // PAD_MULTIPLE) * PAD_MULTIPLE + 1
    out = torch.full((batch_size, length), pad, dtype=torch.long)
    for row, tokens in zip(out, chosen, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return out
