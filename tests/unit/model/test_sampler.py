"""Samples equal those of diffusers' NucleusMoEImagePipeline with the same weights, text and noise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, NucleusMoEImagePipeline, TextKVCacheConfig
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel
from small_model import SMALL

from model.sampling.sampler import guide, sample_latents, sigmas
from model.transformer import NucleusTransformer

CONFIG = SMALL | {"in_channels": 64, "out_channels": 16, "num_key_value_heads": 4}
ROWS, COLUMNS, BATCH = 3, 4, 2


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    reference = NucleusMoEImageTransformer2DModel(**CONFIG).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3 if parameter.dim() == 1 else 0.7 * parameter.shape[-1] ** -0.5)
    ours = NucleusTransformer.from_config(CONFIG)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(BATCH, 8, 24, generator=generator)
    negative = torch.randn(BATCH, 5, 24, generator=generator)
    mask = torch.ones(BATCH, 8, dtype=torch.bool)
    mask[1, 6:] = False
    negative_mask = torch.ones(BATCH, 5, dtype=torch.bool)
    noise = torch.randn(BATCH, ROWS * COLUMNS, 64, generator=generator)
    return text, mask, negative, negative_mask, noise


def pipeline_latents(transformer, texts, steps, guidance, **scheduler):
    text, mask, negative, negative_mask, noise = texts
    pipe = NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=None,
        text_encoder=None,
        processor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        latents=noise,
        height=ROWS * 16,
        width=COLUMNS * 16,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("cached", [False, True])
def test_latents_equal_the_pipelines(models, texts, guidance, cached):
    reference, ours = models
    if cached:
        reference.enable_cache(TextKVCacheConfig())
    try:
        expected = pipeline_latents(reference, texts, 6, guidance)
    finally:
        if cached:
            reference.disable_cache()
    text, mask, negative, negative_mask, noise = texts
    actual = sample_latents(ours, text, mask, negative, negative_mask, noise, (1, ROWS, COLUMNS), 6, guidance)
    assert actual.shape == noise.shape
    assert (actual - expected).norm() / expected.norm() < 1e-4
    assert (actual - noise).norm() / noise.norm() > 0.1


def test_stochastic_latents_equal_the_pipelines(models, texts):
    reference, ours = models
    torch.manual_seed(7)  # the pipeline leaves the scheduler to the global state
    expected = pipeline_latents(reference, texts, 6, 4.0, shift=2.0, stochastic_sampling=True)
    text, mask, negative, negative_mask, noise = texts
    arguments = (text, mask, negative, negative_mask, noise, (1, ROWS, COLUMNS), 6, 4.0)
    actual = sample_latents(ours, *arguments, shift=2.0, step_noise=torch.Generator().manual_seed(7))
    assert (actual - expected).norm() / expected.norm() < 1e-4
    other = sample_latents(ours, *arguments, shift=2.0, step_noise=torch.Generator().manual_seed(8))
    assert (actual - other).norm() / expected.norm() > 0.01


def test_one_batched_forward_equals_two(models, texts):
    _, ours = models
    text, mask, negative, negative_mask, noise = texts
    latents = noise
    schedule = sigmas(3)
    with torch.no_grad():
        for now, after in zip(schedule, schedule[1:]):
            both = [
                ours(latents, (1, ROWS, COLUMNS), embeds, embeds_mask, torch.full((BATCH,), now))
                for embeds, embeds_mask in ((text, mask), (negative, negative_mask))
            ]
            latents = latents + (now - after) * guide(*both, 5.0)
    result = sample_latents(ours, text, mask, negative, negative_mask, noise, (1, ROWS, COLUMNS), 3, 5.0)
    assert torch.allclose(result, latents, atol=1e-4)


def test_one_negative_serves_the_whole_batch_and_steps_are_reported(models, texts):
    _, ours = models
    text, mask, negative, _, noise = texts
    one = negative[:1]
    seen = []
    result = sample_latents(
        ours, text, mask, one, None, noise, (1, ROWS, COLUMNS), 3, 5.0, on_step=lambda i, x: seen.append((i, x.shape))
    )
    each = sample_latents(ours, text, mask, one.expand(BATCH, -1, -1), None, noise, (1, ROWS, COLUMNS), 3, 5.0)
    assert torch.equal(result, each)
    assert seen == [(i, noise.shape) for i in range(3)]


def test_guidance_keeps_each_tokens_conditional_norm():
    conditional, negative = torch.randn(2, 3, 5, 64).unbind(0)
    guided = guide(conditional, negative, 7.0)
    assert torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(guide(conditional, negative, 1.0), conditional, atol=1e-5)


def test_bad_calls_are_refused(models, texts):
    _, ours = models
    text, mask, negative, negative_mask, noise = texts
    with pytest.raises(ValueError, match="steps=0"):
        sample_latents(ours, text, mask, negative, negative_mask, noise, (1, ROWS, COLUMNS), 0, 4.0)
    with pytest.raises(ValueError, match="guidance=4.0"):
        sample_latents(ours, text, mask, None, None, noise, (1, ROWS, COLUMNS), 2, 4.0)
