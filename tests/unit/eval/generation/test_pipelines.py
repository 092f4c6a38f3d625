"""Any pipeline is a sampler: its images depend on prompt and noise alone, and it states its settings."""

import json
from pathlib import Path

import foreign_pipelines
import numpy as np
import pytest
import torch

from eval import catalog
from eval.config import EvalConfig, SchedulerConfig
from eval.generation.generate import generate
from eval.generation.pipelines import diffusers_sampler, directory_digest, is_local, load_pipeline, resolve
from eval.scorecard import rescore


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
    # another batch in between, which must leave no state
    first, other = pixels(cached(TEXTS, NOISES, 32, 32)), pixels(cached(TEXTS[::-1], NOISES, 32, 32))
    again = pixels(cached(TEXTS, NOISES, 32, 32))
    assert np.abs(first - plain).max() <= 1 and np.array_equal(first, again)
    assert np.abs(other - plain).max() > 1  # otherwise the prompts have no effect, and this test shows nothing


def test_a_transformer_without_a_cache_of_texts_is_sampled_without_one(pipeline, monkeypatch):
    """The transformer of ablations, for which diffusers has no class."""
    from model.sampling.pipeline_transformer import PipelineTransformer

    monkeypatch.setattr(pipeline, "transformer", PipelineTransformer(pipeline.transformer))
    assert diffusers_sampler(pipeline, EvalConfig()).settings["text_kv_cache"] is False


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
    plain = config.model_copy(update={"scheduler": SchedulerConfig()})
    deterministic = pixels(diffusers_sampler(pipeline, plain)(TEXTS, NOISES, 32, 32))
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


def quiet(_):
    pass


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return {
        "StableDiffusionPipeline": foreign_pipelines.make_stable_diffusion(folder / "sd"),
        "LatentConsistencyModelPipeline": foreign_pipelines.make_stable_diffusion(folder / "lcm", True),
    }


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_a_foreign_pipeline_is_evaluated_and_its_images_are_its_own_in_any_batch(foreign, kind, tmp_path):
    config = EvalConfig(
        prompts_per_task=1, seeds=(0,), image_size_px=32, num_inference_steps=2, guidance_scale=3.0, batch_size=16
    )
    loaded, provenance = load_pipeline(str(foreign[kind]))
    sample = diffusers_sampler(loaded, config)
    prompts = catalog.prompts(config)
    generate(sample, prompts, config, tmp_path, provenance=provenance, log=quiet)
    card = rescore(tmp_path, tmp_path, config, log=quiet)
    assert card["settings"]["pipeline"] == kind and card["counts"]["failed"] == 0
    assert card["settings"]["model_digests"]["digest"] == directory_digest(foreign[kind])
    assert card["settings"]["sampler"] in ("DDIMScheduler", "LCMScheduler")

    together, alone = sample(TEXTS, NOISES, 32, 32), [sample([t], [n], 32, 32)[0] for t, n in zip(TEXTS, NOISES)]
    assert np.abs(pixels(together) - pixels(alone)).max() <= 1
    assert np.array_equal(pixels(together), pixels(sample(TEXTS, NOISES, 32, 32)))
    assert np.abs(pixels(together) - pixels(sample(TEXTS, [1, 2, 3], 32, 32))).max() > 1


def test_a_negative_prompt_changes_images_and_is_refused_where_it_would_be_ignored(foreign):
    plain = EvalConfig(num_inference_steps=2, guidance_scale=4.0)
    negative = plain.model_copy(update={"negative_prompt": "a red cross"})
    loaded, _ = load_pipeline(str(foreign["StableDiffusionPipeline"]))
    images = [pixels(diffusers_sampler(loaded, config)(TEXTS, NOISES, 32, 32)) for config in (plain, negative)]
    assert np.abs(images[0] - images[1]).max() > 0
    assert diffusers_sampler(loaded, negative).settings["negative_prompt"] == "a red cross"
    other, _ = load_pipeline(str(foreign["LatentConsistencyModelPipeline"]))
    with pytest.raises(ValueError, match="LatentConsistencyModelPipeline takes no negative prompt"):
        diffusers_sampler(other, negative)


def test_a_published_stochastic_scheduler_is_deterministic_unless_the_configuration_asks(pipeline, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True))
    settings = diffusers_sampler(pipeline, EvalConfig()).settings["scheduler_config"]
    assert settings["stochastic_sampling"] is False and settings["shift"] == 2.0
    asked = EvalConfig(scheduler={"stochastic_sampling": True})
    assert diffusers_sampler(pipeline, asked).settings["scheduler_config"]["stochastic_sampling"] is True


def test_stochastic_sampling_is_refused_of_a_scheduler_that_cannot(foreign):
    loaded, _ = load_pipeline(str(foreign["StableDiffusionPipeline"]))
    with pytest.raises(ValueError, match="DDIMScheduler has no stochastic_sampling"):
        diffusers_sampler(loaded, EvalConfig(scheduler={"stochastic_sampling": True}))


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("./nowhere", None, "no model_index.json"),
        ("Qwen/Qwen-Image", None, "needs its revision"),
        ("Qwen/Qwen-Image", "main", "needs its revision"),
        ("pipeline", None, "neither a directory"),
        ("https://example.com/x", None, "neither a directory"),
        ("../../x\n", None, "no model_index.json"),
    ],
)
def test_what_names_no_fixed_weights_is_refused_before_loading(model, revision, message):
    for call in (load_pipeline, resolve):
        with pytest.raises(ValueError, match=message):
            call(model, revision=revision)


def test_a_folder_in_the_working_directory_does_not_stand_in_for_a_hub_id(foreign, tmp_path, monkeypatch):
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen-Image").symlink_to(foreign["StableDiffusionPipeline"])
    monkeypatch.chdir(tmp_path)
    assert not is_local("Qwen/Qwen-Image") and is_local("./Qwen/Qwen-Image")
    with pytest.raises(ValueError, match="needs its revision"):
        load_pipeline("Qwen/Qwen-Image")


def test_a_directory_has_no_revision_and_weights_that_are_pickles_are_not_read(foreign, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="has no revision"):
        load_pipeline(str(foreign["StableDiffusionPipeline"]), revision="a" * 40)
    shutil.copytree(foreign["StableDiffusionPipeline"], tmp_path / "copy")
    (weights,) = (tmp_path / "copy" / "unet").glob("*.safetensors")
    torch.save({"x": 1}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="diffusers cannot load"):
        load_pipeline(str(tmp_path / "copy"))


def test_a_changed_file_changes_the_digest(foreign, tmp_path):
    import shutil

    shutil.copytree(foreign["StableDiffusionPipeline"], tmp_path / "copy")
    assert resolve(str(tmp_path / "copy")) == resolve(str(foreign["StableDiffusionPipeline"]))
    (tmp_path / "copy" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert resolve(str(tmp_path / "copy")) != resolve(str(foreign["StableDiffusionPipeline"]))
