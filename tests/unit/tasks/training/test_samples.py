"""Sample grids encode their prompts as the captions were encoded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import model.sampling.sampler
from model.stages import training_stages
from tasks.encoding.config import TinyTextEncoderConfig, TinyVAEConfig
from tasks.recipe import load_recipe
from tasks.training import samples

CPU = torch.device("cpu")
PROMPTS = '["a photo of a red circle left of a blue square and a green star", "a photo of a cat"]'


@pytest.fixture
def components(tmp_path):
    """An untrained VAE and text encoder."""
    from tasks.encoding.small.text_encoder import build_text_encoder
    from tasks.encoding.small.tokenizer import build_tokenizer, save_processor
    from tasks.encoding.small.vae import build_vae

    tokenizer = build_tokenizer(["a photo of a cat"], 128)
    save_processor(tokenizer, tmp_path / "processor")
    text = TinyTextEncoderConfig(hidden_size=48, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    build_text_encoder(text, tokenizer, 0).save_pretrained(tmp_path / "text_encoder")
    build_vae(TinyVAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2)), 0).save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.mark.parametrize(("max_text_tokens", "tokens"), [(8, 8), (1024, 24)])
def test_prompts_are_cut_where_the_captions_were(components, tmp_path, monkeypatch, max_text_tokens, tokens):
    seen = []

    def sample(transformer, text, mask, negative, negative_mask, noise, *_):
        seen.append(text.shape[1])
        return noise

    monkeypatch.setattr(model.sampling.sampler, "sample_latents", sample)
    recipe = load_recipe("smoke", [f"train.sample_prompts={PROMPTS}", "train.sample_every_steps=1"])
    stage = training_stages(recipe.model, recipe.train)[0]
    samples.sampler(components, max_text_tokens, stage)(torch.nn.Linear(1, 1), 1, tmp_path / "grid.png")
    assert seen == [tokens]
    side = stage.stage.image_size_px
    assert Image.open(tmp_path / "grid.png").size == (samples.IMAGES_PER_PROMPT * side, 2 * side)


def test_grids_of_steps_that_train_guidance_in_are_drawn_without_it(components, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(model.sampling.sampler, "sample_latents", lambda *args: seen.append(args[-1]) or args[5])
    stage_keys = ["train.stages[0].guidance={steps: 1, scale: 3}"]
    recipe = load_recipe("smoke", [f"train.sample_prompts={PROMPTS}", "train.sample_every_steps=1", *stage_keys])
    stage = training_stages(recipe.model, recipe.train)[0]
    write = samples.sampler(components, 8, stage)
    for step in (stage.stage.steps - 1, stage.stage.steps):
        write(torch.nn.Linear(1, 1), step, tmp_path / "grid.png")
    assert seen == [samples.GUIDANCE, 1.0]


def test_a_single_process_sends_nothing_and_keeps_its_random_state(monkeypatch):
    """A group of gloo has threads that would slow down the rest of the training."""
    monkeypatch.setattr(dist, "broadcast", None)
    monkeypatch.setattr(dist, "broadcast_object_list", None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = torch.get_rng_state()
        assert samples.on_rank_0(lambda: torch.rand(3).shape, CPU) == (3,)
        assert torch.equal(torch.get_rng_state(), before)
        with pytest.raises(OSError, match="disk"):
            samples.on_rank_0(full_disk, CPU)
    finally:
        dist.destroy_process_group()


def full_disk():
    raise OSError("the disk is full")


def test_what_is_left_to_the_first_rank_is_computed_in_its_own_type():
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert samples.on_rank_0(lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, CPU) == torch.float32
