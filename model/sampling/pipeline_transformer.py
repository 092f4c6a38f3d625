"""NucleusTransformer in the place of diffusers' transformer in its own pipeline: for ablations, which that lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.config import TransformerConfig
from model.transformer import NucleusTransformer


class PipelineTransformer(nn.Module):
    """What `NucleusMoEImagePipeline` asks of its transformer, answered by ours. Text keys and values are not cached."""

    is_cache_enabled = False

    def __init__(self, transformer: NucleusTransformer):
        super().__init__()
        self.transformer = transformer

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def forward(self, *, attention_kwargs: Any = None, return_dict: bool = False, **inputs: Any) -> tuple[torch.Tensor]:
        """`inputs` are those of NucleusTransformer, which diffusers' class names alike."""
        assert not attention_kwargs and not return_dict
        return (self.transformer(**inputs),)
