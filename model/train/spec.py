"""NucleusTransformer behind torchtitan's model protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model.config import TransformerConfig
from model.train.parallel.parallelize import fill_from_whole, gathered, parallelize
from model.transformer import Block, NucleusTransformer, TextKV

from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec


class NucleusModel(NucleusTransformer, BaseModel):
    """NucleusTransformer with the methods of torchtitan's protocol. Parameter names are diffusers'."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        transformer: TransformerConfig

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Does nothing: the model does not depend on the job's configuration."""

        def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and training FLOPs per image token (6 per active weight, plus attention over seq_len)."""
            total, active = count_parameters(model, self.transformer)
            attention = 12 * self.transformer.num_layers * self.transformer.width * seq_len
            return total, 6 * active + attention

        def to_dict(self) -> dict[str, Any]:
            return {"transformer": self.transformer.model_dump(mode="json")}

    def __init__(self, config: Config):
        NucleusTransformer.__init__(self, config.transformer)

    def init_weights(self, **_: Any) -> None:
        NucleusTransformer.init_weights(self, on_whole=fill_from_whole)

    def text_kv(self, *args: Any, **kwargs: Any) -> TextKV:
        with gathered(self):
            return NucleusTransformer.text_kv(self, *args, **kwargs)

    def block_text_kv(self, block: Block, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with gathered(block):  # one block at a time, as in a forward: all weights may not fit on a device
            return NucleusTransformer.block_text_kv(self, block, *args)

    def verify_module_protocol(self) -> None:
        """Does nothing: submodules are plain torch modules without torchtitan's sharding configurations."""


def count_parameters(model: torch.nn.Module, config: TransformerConfig) -> tuple[int, int]:
    """(all parameters, active parameters of an average token: each expert processes capacity factor / E of the tokens)."""
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        share = 1.0
        if ".experts." in name:
            layer = int(name.split("transformer_blocks.")[1].split(".")[0])
            share = config.capacity_factor(layer) / config.num_experts
        active += share * parameter.numel()
    return total, round(active)


def model_spec(transformer: TransformerConfig, flavor: str) -> ModelSpec:
    return ModelSpec(
        name="nucleus_image",
        flavor=flavor,
        model=NucleusModel.Config(transformer=transformer),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
