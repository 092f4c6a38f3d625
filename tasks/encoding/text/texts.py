"""Encodes one shard's captions into a texts part: the states, or only the tokens, of each distinct caption.

    selection -> captions.parquet, texts.parquet, text/*.safetensors (model/data/files.py), ledger.parquet, report.json

Captions are never truncated. A caption is rejected if it exceeds the encoder's token limit, or if it contains special
tokens of the chat format, which could end the user's turn. A record whose captions are all rejected is rejected too.
Records without captions are trained with the empty prompt. The reasons are in docs/decisions/encoding.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.data.files import TextPartWriter, write_prefix
from tasks.curation.decisions.rules import CAPTION_TOO_LONG
from tasks.encoding.ledger import CAPTION_SPECIAL_TOKEN, Notes
from tasks.encoding.text.prompts import Prompt, PromptEncoder

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

CHUNK = 1024  # texts whose states are in memory at a time
COLUMNS = [
    "key",
    "record_id",
    "row",
    "locator",
    "captions",
    "tier",
    "bucket",
]  # columns of a selection that the part depends on


def encode_texts(selection: pa.Table, shard: str, encoder: PromptEncoder, out_dir: str | Path) -> int:
    """Writes the texts of one shard to `out_dir`; returns the number of records that are not rejected.

    Args:
        selection: COLUMNS of the shard's records of the train split.
    """
    out_dir, notes = Path(out_dir), Notes(shard)
    train = selection.select(COLUMNS).to_pylist()
    distinct = list(dict.fromkeys(text for row in train for text in row["captions"]))
    prompts = dict(zip(distinct, encoder.prompts(distinct), strict=True))
    reasons = {text: reason for text, prompt in prompts.items() if (reason := _reason_to_reject(prompt, encoder))}
    accepted = [text for text in distinct if text not in reasons]
    place = {text: i for i, text in enumerate(accepted)}
    encoded = 0
    with TextPartWriter(out_dir, encoder.meta) as writer:
        for tokens in _encoded([prompts[text].ids for text in accepted], encoder):
            writer.add_text(tokens)
        for row in train:
            kept = [text for text in row["captions"] if text in place]
            rejected = [text for text in row["captions"] if text not in place]
            if rejected and not kept:
                notes.reject(row, *reasons[rejected[0]])
                continue
            for text in rejected:
                rule, detail = reasons[text]
                notes.remark(row, rule, f"one of {len(row['captions'])} captions: {detail}")
            writer.add_captions(row["row"], row["tier"], [place[text] for text in kept], row["bucket"])
            encoded += 1
    tokens = sum(len(prompts[text].ids) for text in accepted)
    notes.write(out_dir, encoded=encoded, texts=len(accepted), tokens=tokens)
    return encoded


def write_prefix_part(encoder: PromptEncoder, out_dir: str | Path) -> int:
    """Writes the common prefix of all prompts and the empty prompt to `out_dir`; returns 1, the number of texts."""
    import torch

    if encoder.meta.form == "states":
        prefix, (empty,) = encoder.prefix_states(), encoder.encode([encoder.empty_ids])
    else:
        prefix, empty = torch.tensor(encoder.prefix_ids, dtype=torch.long), torch.tensor(encoder.empty_ids)
    write_prefix(out_dir, encoder.meta, prefix, empty)
    return 1


def _reason_to_reject(prompt: Prompt, encoder: PromptEncoder) -> tuple[str, str] | None:
    """(rule, detail) for a caption that cannot be encoded, else None."""
    size, limit = len(encoder.prefix_ids) + len(prompt.ids), encoder.config.max_text_tokens
    if prompt.special:
        return CAPTION_SPECIAL_TOKEN, "it has a special token of the text encoder's chat format"
    if size > limit:
        return CAPTION_TOO_LONG, f"{size} tokens with the system message, over encoding.max_text_tokens={limit}"
    return None


def _encoded(texts: list[list[int]], encoder: PromptEncoder) -> Iterator[torch.Tensor]:
    import torch

    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        if encoder.meta.form == "states":
            yield from encoder.encode(chunk)
        else:
            yield from (torch.tensor(ids) for ids in chunk)
