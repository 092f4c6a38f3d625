import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, NucleusMoEImagePipeline
from diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image import calculate_shift

from model import flow
from model.config import TimestepConfig


def test_shift_is_the_pipelines_line():
    assert flow.timestep_shift(256) == pytest.approx(0.5)
    assert flow.timestep_shift(4096) == pytest.approx(1.15)
    for tokens in (16, 1024, 5000):
        assert flow.timestep_shift(tokens) == pytest.approx(calculate_shift(tokens))


def test_timesteps_follow_the_shifted_law_and_a_share_is_uniform():
    def share_above(limit, num_tokens, config):
        t = flow.sample_timesteps(200_000, num_tokens, torch.Generator().manual_seed(0), config)
        assert t.shape == (200_000,) and t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
        return (t > limit).double().mean().item()

    for num_tokens in (16, 4096):
        mu = flow.timestep_shift(num_tokens)
        for limit in (0.2, 0.5, 0.9):
            logit = math.log(limit / (1 - limit))
            normal = 0.5 * math.erfc((logit - mu) / math.sqrt(2))
            actual = share_above(limit, num_tokens, TimestepConfig(uniform_fraction=0.0))
            assert actual == pytest.approx(normal, abs=0.005)
            expected = 0.9 * normal + 0.1 * (1 - limit)
            assert share_above(limit, num_tokens, TimestepConfig()) == pytest.approx(expected, abs=0.005)


def test_shifted_law_equals_the_schedulers_dynamic_shift():
    n = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shifted = scheduler.time_shift(0.8, 1.0, torch.sigmoid(n))
    assert torch.allclose(shifted, torch.sigmoid(0.8 + n))


def test_timesteps_depend_only_on_the_generator():
    draw = lambda: flow.sample_timesteps(8, 64, torch.Generator().manual_seed(7))  # noqa: E731
    first = draw()
    torch.manual_seed(99)
    assert torch.equal(first, draw())


def test_path_target_and_clean_prediction_agree():
    clean, noise = torch.randn(2, 3, 16, 8, dtype=torch.float64).unbind(0)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy = flow.interpolate(clean, noise, t)
    assert torch.equal(noisy[0], clean[0]) and torch.equal(noisy[2], noise[2])
    assert torch.allclose(noisy[1], 0.7 * clean[1] + 0.3 * noise[1])
    velocity = flow.velocity_target(clean, noise)
    assert torch.equal(velocity, clean - noise)
    assert torch.allclose(flow.predict_clean(noisy, velocity, t), clean)


@pytest.mark.parametrize("height,width", [(4, 4), (6, 10)])
def test_packing_equals_the_pipelines(height, width):
    latents = torch.randn(2, 16, height, width)
    tokens = flow.pack_latents(latents)
    assert torch.equal(tokens, NucleusMoEImagePipeline._pack_latents(latents, 2, 16, height, width, 2))
    unpacked = flow.unpack_latents(tokens, height // 2, width // 2)
    assert torch.equal(unpacked, latents)
    assert torch.equal(unpacked, NucleusMoEImagePipeline._unpack_latents(tokens, 8 * height, 8 * width, 2, 8)[:, :, 0])


def test_impossible_packings_are_refused():
    with pytest.raises(ValueError, match="3 x 4"):
        flow.pack_latents(torch.zeros(1, 16, 3, 4))
    with pytest.raises(ValueError, match="2 x 3 patches are not 4 tokens"):
        flow.unpack_latents(torch.zeros(1, 4, 64), 2, 3)
