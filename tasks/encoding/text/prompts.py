"""Encodes prompts with the frozen text encoder, and computes their common prefix only once.

    prompt = prefix (chat format and system message, the same for all) + text + end of the turn

In a causal encoder the states of the prefix do not depend on the text. So its keys and values are cached, and only the rest
of a prompt runs through the model. The states equal those of full prompts up to rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.files import file_sha256
from model.constants import PAD_MULTIPLE
from model.data.files import DTYPES, TextMeta
from tasks.encoding.config import EncodingConfig
from tasks.encoding.text.chat import format_prompts, load_processor, load_text_encoder, state_layer

if TYPE_CHECKING:
    import torch

# Different first characters: the common prefix of these prompts' tokens is the common prefix of all prompts.
PROBES = ("", "a", " a", "A.", "\n", "\t", "1", "-", "'s", "é", "一", "א")


class Prompt(NamedTuple):
    """The tokens after the prefix. `special`: the text itself contains special tokens of the chat format."""

    ids: list[int]
    special: bool


class PromptEncoder:
    """Tokenizes and encodes prompts. Loads the model onto `device` when states are first requested."""

    def __init__(self, components_dir: str | Path, config: EncodingConfig, device: Any = None):
        self._dir, self.config, self._device = Path(components_dir), config, device
        self.processor = load_processor(self._dir / "processor")
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if self.tokenizer.padding_side != "right":
            side = self.tokenizer.padding_side
            raise ValueError(
                f"the processor pads on the {side}: a text's position would depend on its batch; set padding_side to right"
            )
        probes = self._tokenize(PROBES)
        shortest = min(map(len, probes)) - 1  # at least one token must follow the prefix
        same = next((i for i in range(shortest) if len({ids[i] for ids in probes}) > 1), shortest)
        self.prefix_ids = probes[0][:same]
        unknown = self.tokenizer.unk_token_id
        self._special = {i for i in self.tokenizer.all_special_ids if i != unknown}
        self.empty_ids = probes[0][same:]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files of the text encoder and the processor."""
        digest = hashlib.sha256()
        for part in ("text_encoder", "processor"):
            for path in sorted((self._dir / part).iterdir()):
                digest.update(f"{part}/{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def meta(self) -> TextMeta:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._dir / "text_encoder")
        return TextMeta(
            form="states" if self.config.text == "stored" else "tokens",
            text_dim=config.text_config.hidden_size,
            dtype=self.config.dtype,
            prefix_tokens=len(self.prefix_ids),
            max_tokens=self.config.max_text_tokens,
            hidden_state_index=self.config.hidden_state_index,
        )

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """The tokens after the prefix in the prompt of each text.

        Raises:
            ValueError: the tokenizer merges the beginning of a text with the prefix.
        """
        size, prompts = len(self.prefix_ids), []
        plain = sum(i in self._special for i in self.empty_ids)
        for text, ids in zip(texts, self._tokenize(texts), strict=True):
            if ids[:size] != self.prefix_ids or len(ids) == size:
                raise ValueError(f"the tokens of {text!r} do not begin with the common prefix of all prompts")
            prompts.append(Prompt(ids[size:], sum(i in self._special for i in ids[size:]) != plain))
        return prompts

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(format_prompts(self.processor, texts))["input_ids"] if len(texts) else []

    @cached_property
    def _model(self) -> Any:
        import torch

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = load_text_encoder(self._dir / "text_encoder", dtype="auto")
        model = encoder.model.language_model
        layers = state_layer(encoder.config.text_config.num_hidden_layers, self.config.hidden_state_index)
        # Layers above the hidden state, the final norm and the vision tower are dropped.
        model.layers, model.norm = torch.nn.ModuleList(model.layers[:layers]), torch.nn.Identity()
        self._embed = model.embed_tokens  # stays on the host: it is large, and a batch reads few of its rows
        model.embed_tokens = torch.nn.Identity()
        return model.to(device).requires_grad_(False)

    @cached_property
    def _prefix(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """States [P, D] of the prefix, and its keys and values in each layer."""
        import torch

        model = self._model
        if not self.prefix_ids:
            return torch.zeros(0, model.config.hidden_size, dtype=model.dtype, device=model.device), []
        with torch.no_grad():
            out = model(inputs_embeds=self._embeddings(torch.tensor([self.prefix_ids])), use_cache=True)
        layers = out.past_key_values.layers[: len(model.layers)]
        return out.last_hidden_state[0], [(layer.keys, layer.values) for layer in layers]

    def prefix_states(self) -> torch.Tensor:
        """States [P, D] of the prefix, on the device."""
        with _plain(self._model.device):
            return self._prefix[0]

    def _embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        return self._embed(ids).to(self._model.device)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """States [n, L, D] on the device for the tokens after the prefix, ids [n, L] on the host. Padding on the right does
        not change the states before it, as the encoder is causal."""
        import torch
        from transformers import DynamicCache

        with _plain(self._model.device), torch.no_grad():
            cache = DynamicCache()
            for i, (keys, values) in enumerate(self._prefix[1]):
                cache.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), i)
            past = cache if self._prefix[1] else None
            embeds = self._embeddings(ids)
            out = self._model(inputs_embeds=embeds, past_key_values=past, use_cache=past is not None)
        return out.last_hidden_state

    def encode(self, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """States [L, D] of each list of token ids, on the host. Batches texts of similar length."""
        import torch

        out: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.config.text_batch_size):
            batch = order[start : start + self.config.text_batch_size]
            length = -(-len(texts[batch[-1]]) // PAD_MULTIPLE) * PAD_MULTIPLE
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            for row, i in zip(ids, batch, strict=True):
                row[: len(texts[i])] = torch.tensor(texts[i])
            for i, states in zip(batch, self.states(ids).cpu(), strict=True):
                out[i] = states[: len(texts[i])]
        return out


class OnlineText:
    """Encodes texts during training: ids [B, T - P] on the host and mask [B, T] or None on `device` -> states [B, T, D]
    float32 on `device`, equal to stored states up to rounding.

    States are rounded to the type in which they would be stored. Padding is zero.
    """

    def __init__(self, components_dir: str | Path, meta: TextMeta):
        self._dir = components_dir
        self._config = EncodingConfig(
            dtype=meta.dtype, max_text_tokens=meta.max_tokens, hidden_state_index=meta.hidden_state_index, text="online"
        )
        self._encoder: PromptEncoder | None = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        import torch

        if self._encoder is None:
            self._encoder = PromptEncoder(self._dir, self._config, device)
        prefix = self._encoder.prefix_states()
        states = torch.cat([prefix.expand(len(ids), -1, -1), self._encoder.states(ids)], dim=1)
        states = states.to(DTYPES[self._config.dtype]).float()
        return states if mask is None else states.masked_fill(~mask[..., None], 0.0)


def _plain(device: Any) -> contextlib.AbstractContextManager:
    """Disables autocast: the encoder computes in its own types, independent of the training's."""
    import torch

    return torch.autocast(device.type, enabled=False)
