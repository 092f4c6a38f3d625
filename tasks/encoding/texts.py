"""One shard's captions -> a texts part: the states, or only the tokens, of each distinct caption.

    selection -> captions.parquet, texts.parquet, text/*.safetensors (model/data/files.py), ledger.parquet, report.json

A caption is encoded whole or not at all: what is longer than the encoder's limit, counted in its own tokens, is left
out, and so is what has special tokens of the chat format, which would end the user's turn. A record that had captions and
keeps none is left out with them. Records without any caption are trained with the empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.data.files import TextPartWriter, write_prefix
from tasks.curation.ledger import CAPTION_TOO_LONG
from tasks.encoding.ledger import CAPTION_SPECIAL_TOKEN, Notes
from tasks.encoding.prompts import Prompt, PromptEncoder

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

CHUNK = 1024  # texts whose states are in memory together
COLUMNS = ["key", "record_id", "row", "locator", "captions", "tier"]  # of a selection, which decide the part


def encode_texts(selection: pa.Table, shard: str, encoder: PromptEncoder, out_dir: str | Path) -> int:
    """Fills `out_dir` with the texts of one shard; returns the number of records that it is trained with.

    Args:
        selection: COLUMNS of the shard's records of the train split.
    """
    out_dir, notes = Path(out_dir), Notes(shard)
    train = selection.select(COLUMNS).to_pylist()
    distinct = list(dict.fromkeys(text for row in train for text in row["captions"]))
    prompts = dict(zip(distinct, encoder.prompts(distinct), strict=True))
    reasons = {text: reason for text, prompt in prompts.items() if (reason := _refused(prompt, encoder))}
    fit = [text for text in distinct if text not in reasons]
    place = {text: i for i, text in enumerate(fit)}
    encoded = 0
    with TextPartWriter(out_dir, encoder.meta) as writer:
        for tokens in _encoded([prompts[text].ids for text in fit], encoder):
            writer.add_text(tokens)
        for row in train:
            kept = [text for text in row["captions"] if text in place]
            lost = [text for text in row["captions"] if text not in place]
            if lost and not kept:
                notes.reject(row, *reasons[lost[0]])
                continue
            for text in lost:
                rule, detail = reasons[text]
                notes.remark(row, rule, f"one of {len(row['captions'])} captions: {detail}")
            writer.add_captions(row["row"], row["tier"], [place[text] for text in kept])
            encoded += 1
    tokens = sum(len(prompts[text].ids) for text in fit)
    notes.write(out_dir, encoded=encoded, texts=len(fit), tokens=tokens)
    return encoded


def write_prefix_part(encoder: PromptEncoder, out_dir: str | Path) -> int:
    """Fills `out_dir` with what all prompts begin with, and the empty prompt."""
    import torch

    if encoder.meta.form == "states":
        prefix, (empty,) = encoder.prefix_states(), encoder.encode([encoder.empty_ids])
    else:
        prefix, empty = torch.tensor(encoder.prefix_ids, dtype=torch.long), torch.tensor(encoder.empty_ids)
    write_prefix(out_dir, encoder.meta, prefix, empty)
    return 1


def _refused(prompt: Prompt, encoder: PromptEncoder) -> tuple[str, str] | None:
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
