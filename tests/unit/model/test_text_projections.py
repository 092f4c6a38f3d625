"""A block's two projections of the text: one product of their weights in fp32, separate products in bf16."""

import pytest
import torch
from small_model import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import TransformerConfig
from model.layers.rope import rope_tables
from model.transformer import Block

CONFIG = TransformerConfig(**SMALL | {"num_key_value_heads": 2, "dense_moe_strategy": "all_moe"})


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if str(function) in ("aten.mm.default", "aten.addmm.default"):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("autocast, fused", [(False, True), (True, False)])
def test_weights_are_multiplied_with_each_other_only_where_products_run_in_fp32(autocast, fused):
    """One GPU trains under autocast, where the text is fp32 and its products are not."""
    block = Block(CONFIG, 0)
    rows, text_dim = 400, CONFIG.joint_attention_dim
    text = torch.randn(1, rows, text_dim)
    _, table = rope_tables(CONFIG.axes_dims_rope, (1, 2, 2), rows, torch.device("cpu"))
    with Products() as products, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        key, value = block.text_kv(text, torch.ones(text_dim), table)
    kv = 2 * CONFIG.kv_heads * CONFIG.attention_head_dim
    assert ((kv, text_dim) in products.shapes) == fused, products.shapes
    assert key.shape == value.shape == (1, rows, CONFIG.kv_heads, CONFIG.attention_head_dim)
