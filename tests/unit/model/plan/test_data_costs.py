"""The planner's costs of data, against counters and by hand."""

from __future__ import annotations

import pytest
import torch

from model.config import StageConfig
from model.plan.data_costs import VAE_FLOPS_PER_PIXEL, Corpus, TextEncoder, data_costs, render

STAGE = dict(name="s", capacity_factors=2.0, aspect_ratios=("1:1",))
OPTIONS = dict(gpu_flops=1e15, training_days=30.0, gpus=64, text_width=4096)


def costs(corpus=None, **changes):
    stages = [
        StageConfig(**STAGE | {"name": "small", "image_size_px": 256, "steps": 1000, "batch_size": 1000}),
        StageConfig(**STAGE | {"name": "large", "image_size_px": 1024, "steps": 10, "batch_size": 1000}),
    ]
    return data_costs(stages, corpus or Corpus(images=1e5, captions=2e5, shards=10), **OPTIONS | changes)


@pytest.mark.slow
def test_the_vaes_flops_are_those_that_pytorch_counts():
    from diffusers import AutoencoderKLQwenImage
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.encoding.vae_codec import FrameCodec

    codec = FrameCodec(AutoencoderKLQwenImage())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        codec.encode(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 32**2 == pytest.approx(VAE_FLOPS_PER_PIXEL, rel=0.01)


def test_the_text_encoders_parameters_are_those_of_its_layers():
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

    config = Qwen3VLTextConfig(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        layer = Qwen3VLTextDecoderLayer(config, 0)
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert TextEncoder(layers=1).parameters == matrices


def test_a_stage_encodes_what_it_draws_and_at_most_the_corpus():
    small, large = costs()["stages"]
    assert (small["images"], large["images"]) == (1e5, 1e4)
    assert small["bytes"] == 1e5 * 16 * 32 * 32 * 2 and large["bytes"] == 1e4 * 16 * 128 * 128 * 2
    assert large["reads"] == 10_000 and large["originals_read"] == 1e4 * 300e3


def test_stored_texts_take_their_real_tokens_and_online_ones_take_gpu_hours():
    texts = costs()["texts"]
    assert texts["stored"]["bytes"] == 2e5 * 140 * 4096 * 2
    assert texts["online"]["bytes"] == 2e5 * 140 * 4
    ratio = 1_010_000 / 2e5  # samples drawn for each caption
    assert texts["online"]["gpu_hours"] == pytest.approx(ratio * texts["stored"]["gpu_hours"])
    assert texts["online"]["memory_bytes_per_gpu"] > 0 == texts["stored"]["memory_bytes_per_gpu"]


def test_the_cheaper_way_is_named_and_depends_on_the_sizes():
    assert costs(Corpus(images=1e4, captions=1e4, shards=10))["better"] == "stored"  # drawn a hundred times
    assert costs(Corpus(images=1e9, captions=1e9, shards=10))["better"] == "online"  # most are never drawn


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="images=0 must be above 0"):
        costs(Corpus(images=0))
    with pytest.raises(ValueError, match="text_mfu=2"):
        costs(text_mfu=2)


def test_the_text_says_where_the_encoder_does_not_fit():
    planned = [{"stage": "small", "memory_bytes": {"peak": 70e9}, "usable_bytes": 72e9}]
    lines = "\n".join(render(costs(), planned, "online"))
    assert "GB of 72.00 GB usable: DOES NOT FIT" in lines and "encoding.text: online" in lines
