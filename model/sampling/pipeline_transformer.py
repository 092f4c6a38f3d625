"""NucleusTransformer as the transformer of diffusers' pipeline, for ablations that diffusers' class does not support."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.config import TransformerConfig
from model.transformer import NucleusTransformer


class PipelineTransformer(nn.Module):
    """Wraps NucleusTransformer in the interface that `NucleusMoEImagePipeline` expects. Does not cache text K/V."""

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
        """`inputs` are the arguments of NucleusTransformer, which have the names of diffusers' class."""
        assert not attention_kwargs and not return_dict
        return (self.transformer(**inputs),)
