"""Images depend on (seed, prompt, image) alone, and a stopped run goes on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.config import EvalConfig
from eval.generate import diffusers_sampler, generate, image_seed

PROMPTS = [
    {"tag": "colors", "include": [], "prompt": "a photo of a red circle"},
    {"tag": "single_object", "include": [], "prompt": "a photo of a square", "images": 3},
]
CONFIG = EvalConfig(seeds=(0, 5), images_per_prompt=2, image_size_px=16, batch_size=3)
FILES = 2 * (1 + 3) * 2


class Noise:
    """A sampler whose image tells its prompt and noise seed; it can be stopped after some calls."""

    def __init__(self, calls=10**9):
        self.calls, self.batches = calls, []
        self.settings = {"name": "noise"}

    def __call__(self, prompts, seeds, height, width):
        if len(self.batches) == self.calls:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        return [self.image(p, s, height, width) for p, s in zip(prompts, seeds, strict=True)]

    def image(self, prompt, seed, height, width):
        pixels = np.random.default_rng([seed, len(prompt)]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def quiet(_):
    pass


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_layout_is_geneval_s_in_a_folder_per_seed(tmp_path):
    report = generate(Noise(), PROMPTS, CONFIG, tmp_path, log=quiet)
    files = contents(tmp_path / "images")
    assert report["expected"] == report["made"] == FILES == sum(name.endswith(".png") for name in files)
    assert "seed5/00001/samples/0005.png" in files and "seed5/00001/samples/0006.png" not in files
    assert json.loads(files["seed0/00001/metadata.jsonl"]) == PROMPTS[1]
    assert [json.loads(line) for line in files["prompts.jsonl"].splitlines()] == PROMPTS


def test_settings_and_provenance_are_recorded(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path, provenance={"merged": "abc"}, log=quiet)
    recorded = json.loads((tmp_path / "images" / "generation.json").read_text())
    assert recorded["sampler"] == {"name": "noise"} and recorded["provenance"] == {"merged": "abc"}
    assert recorded["config"]["guidance_scale"] == 8.0 and recorded["config"]["seeds"] == [0, 5]


def test_every_image_has_its_own_noise():
    seeds = {image_seed(s, p, i) for s in range(4) for p in range(30) for i in range(8)}
    assert len(seeds) == 4 * 30 * 8 and all(0 <= s < 2**63 for s in seeds)
    assert image_seed(0, 1, 2) == image_seed(0, 1, 2)


def test_a_stopped_run_goes_on_and_equals_an_unbroken_one(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path / "whole", log=quiet)
    with pytest.raises(KeyboardInterrupt):
        generate(Noise(calls=2), PROMPTS, CONFIG, tmp_path / "broken", log=quiet)
    # as after a kill between two images of a batch
    (tmp_path / "broken/images/seed0/00000/samples/0001.png").unlink()
    rest = Noise()
    report = generate(rest, PROMPTS, CONFIG, tmp_path / "broken", log=quiet)
    assert report["kept"] == 5 and report["made"] == FILES - 5
    assert rest.batches == [3, 3, 3, 3, 1]  # the first again, whole; the second was done
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    done = Noise()
    assert generate(done, PROMPTS, CONFIG, tmp_path / "broken", log=quiet)["made"] == 0 and not done.batches


def test_the_batch_size_does_not_change_the_images(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path / "a", log=quiet)
    generate(Noise(), PROMPTS, CONFIG.model_copy(update={"batch_size": 16}), tmp_path / "b", log=quiet)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {k: v for k, v in a.items() if k.endswith(".png")} == {k: v for k, v in b.items() if k.endswith(".png")}


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    generate(Noise(), PROMPTS, CONFIG, tmp_path, log=quiet)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="prompts.jsonl differs"):
        generate(Noise(), PROMPTS[:1], CONFIG, tmp_path, log=quiet)
    with pytest.raises(ValueError, match="generation.json differs"):
        generate(Noise(), PROMPTS, CONFIG.model_copy(update={"guidance_scale": 2.0}), tmp_path, log=quiet)
    assert contents(tmp_path) == before
    rescored = CONFIG.model_copy(update={"bootstrap_samples": 7})
    assert generate(Noise(), PROMPTS, rescored, tmp_path, log=quiet)["made"] == 0


def test_a_sampler_that_drops_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="returned 1 images for 3 prompts"):
        generate(lambda p, s, h, w: [Image.new("RGB", (w, h))], PROMPTS, CONFIG, tmp_path, log=quiet)


def test_seeds_must_differ():
    with pytest.raises(ValueError, match="different"):
        EvalConfig(seeds=(0, 0))


@pytest.fixture(scope="module")
def pipeline():
    """The real pipeline, transformer, VAE and scheduler; prompts become embeddings of unequal length by their hash."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        NucleusMoEImagePipeline,
        NucleusMoEImageTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = NucleusMoEImageTransformer2DModel(
        num_layers=2, num_attention_heads=2, num_key_value_heads=1, attention_head_dim=16, joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6), dense_moe_strategy="leave_first_block_dense", num_experts=2, moe_intermediate_dim=16,
        capacity_factors=2.0, out_channels=16,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = NucleusMoEImagePipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(), vae.eval(), text_encoder=None, processor=None
    )

    def encode_prompt(prompt, **_):
        embeds, mask = torch.zeros(len(prompt), 8, 24), torch.zeros(len(prompt), 8, dtype=torch.bool)
        for row, text in enumerate(prompt):
            length = 2 + len(text) % 7
            generator = torch.Generator().manual_seed(sum(text.encode()))
            embeds[row, :length] = torch.randn(length, 24, generator=generator)
            mask[row, :length] = True
        return embeds, None if mask.all() else mask

    pipe.encode_prompt = encode_prompt
    return pipe


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


TEXTS, NOISES = ["a red circle", "a square", "two blue crosses"], [11, 12, 13]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_cached_text_gives_the_same_images_in_mixed_batches_call_after_call(pipeline, guidance_scale):
    config = EvalConfig(num_inference_steps=3, guidance_scale=guidance_scale)
    plain = pixels(diffusers_sampler(pipeline, config, text_kv_cache=False)(TEXTS, NOISES, 32, 32))
    assert not pipeline.transformer.is_cache_enabled
    cached = diffusers_sampler(pipeline, config)
    assert pipeline.transformer.is_cache_enabled
    # another batch in between: nothing of it may stay
    first, other = pixels(cached(TEXTS, NOISES, 32, 32)), pixels(cached(TEXTS[::-1], NOISES, 32, 32))
    again = pixels(cached(TEXTS, NOISES, 32, 32))
    assert np.abs(first - plain).max() <= 1 and np.array_equal(first, again)
    assert np.abs(other - plain).max() > 1  # else the prompts decide nothing and this test shows nothing


def test_an_image_is_the_same_alone_and_in_a_batch(pipeline):
    sample = diffusers_sampler(pipeline, EvalConfig(num_inference_steps=3, guidance_scale=4.0))
    together = pixels(sample(TEXTS, NOISES, 32, 32))
    alone = np.concatenate([pixels(sample([t], [n], 32, 32)) for t, n in zip(TEXTS, NOISES, strict=True)])
    assert np.abs(together - alone).max() <= 1
    assert np.abs(pixels(sample(TEXTS[:1], [99], 32, 32)) - alone[:1]).max() > 1


def test_a_stochastic_schedulers_noise_is_the_images_own(pipeline, monkeypatch):
    """Drawn from the image's generator at every step: neither the batch nor the global state decides it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = EvalConfig(num_inference_steps=3, guidance_scale=4.0, scheduler={"stochastic_sampling": True})
    deterministic = pixels(diffusers_sampler(pipeline, config)(TEXTS, NOISES, 32, 32))
    monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(**config.scheduler.model_dump()))
    sample = diffusers_sampler(pipeline, config)
    together = pixels(sample(TEXTS, NOISES, 32, 32))
    alone = np.concatenate([pixels(sample([t], [n], 32, 32)) for t, n in zip(TEXTS, NOISES, strict=True)])
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together - deterministic).max() > 1


def test_the_sampler_says_how_it_samples(pipeline):
    settings = diffusers_sampler(pipeline, EvalConfig()).settings
    assert settings["pipeline"] == "NucleusMoEImagePipeline" and settings["text_kv_cache"] is True
    assert settings["scheduler"] == "FlowMatchEulerDiscreteScheduler" and json.dumps(settings)
