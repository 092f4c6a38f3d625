"""Held-out captions of a corpus become prompts with their real images, and the flow loss is measured on these."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from selected import scenes, select

from eval.benchmarks.flow_loss import FILE, TIMESTEPS
from eval.config import EvalConfig
from eval.generation.generate import plan_batches
from tasks.evaluation import flow_loss
from tasks.evaluation.prompts import read_prompts, write_held_out, write_prompts


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A curated directory of 60 scenes in two shards, every seventh held out."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    examples = scenes(120)
    return select(tmp_path / "source", [examples[:60], examples[60:]], tmp_path / "curated"), examples


def test_prompts_are_only_the_first_captions_of_held_out_images(corpus, tmp_path):
    curated, examples = corpus
    config = EvalConfig(benchmark="captions", image_size_px=32, images_per_prompt=1)
    assert write_prompts(config, tmp_path, curated) == {"prompts": 18}
    prompts = read_prompts(tmp_path)
    held_out = {captions[0] for _, captions, _, split in examples if split == "val"}
    assert {prompt["prompt"] for prompt in prompts} <= held_out and not any("trained_on" in p for p in prompts)
    for prompt in prompts:
        path = tmp_path / prompt["reference"]["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == prompt["reference"]["sha256"]
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "RGB"


def test_the_prompts_to_choose_by_are_others_than_those_to_report(corpus, tmp_path):
    curated, _ = corpus
    official, development = (
        write_held_out(curated, tmp_path, 8, 16, development=development) for development in (False, True)
    )
    assert len(official) == len(development) == 8
    assert not {p["id"] for p in official} & {p["id"] for p in development}
    assert official == write_held_out(curated, tmp_path, 8, 16)


def test_a_corpus_with_too_few_held_out_images_says_which_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    examples = [(image, captions, tier, "train") for image, captions, tier, _ in scenes(20)]
    curated = select(tmp_path / "source", [[(*examples[0][:3], "val"), *examples[1:]]], tmp_path / "curated")
    prompts = write_held_out(curated, tmp_path, 256, 16)
    assert len(prompts) == 16 and sum("trained_on" in prompt for prompt in prompts) == 15


def test_captions_without_a_corpus_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs held-out captions: a curated corpus"):
        write_prompts(EvalConfig(benchmark="captions"), tmp_path)


def test_an_image_of_a_file_of_captions_must_be_next_to_it(tmp_path):
    (tmp_path / "given").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    rows = [{"prompt": str(i), "reference": {"file": "../secret.png", "sha256": ""}} for i in range(2)]
    (tmp_path / "given" / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvalConfig(benchmark="captions", image_size_px=16, prompts_file=str(tmp_path / "given" / "c.jsonl"))
    with pytest.raises(ValueError, match="'../secret.png' is not a file next to it"):
        write_prompts(config, tmp_path)


class NucleusMoEImagePipeline:
    """Stands in for diffusers' class: a latent of one colour, and a transformer that predicts `share` of the
    velocity."""

    def __init__(self, share: float):
        self.share, self.seen = share, []
        config = SimpleNamespace(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
        latent = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.full((1, 4, 1, 4, 4), 2.5)))
        self.vae = SimpleNamespace(
            config=config, device=torch.device("cpu"), dtype=torch.float32, encode=lambda _: latent
        )
        self.transformer = self
        self.config, self.device, self.dtype = SimpleNamespace(patch_size=2), torch.device("cpu"), torch.float32

    def encode_prompt(self, prompt, device):
        self.seen.append(prompt)
        return torch.zeros(len(prompt), 3, 8), None

    def __call__(self, hidden_states, timestep, img_shapes, return_dict, **_):
        assert img_shapes == [(1, 2, 2)] * len(TIMESTEPS) and not return_dict
        t, clean = timestep[:, None, None], 1.0  # (2.5 - 0.5) / 2
        noise = (hidden_states - (1 - t) * clean) / t
        return (self.share * (clean - noise),)


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real.png")
    return tmp_path / "real.png"


def test_the_loss_is_zero_for_the_exact_velocity_and_grows_with_the_square_of_the_error(image):
    known = flow_loss.flow_losses(NucleusMoEImagePipeline(1.0), image, "red", 0)
    nothing, half = (flow_loss.flow_losses(NucleusMoEImagePipeline(share), image, "red", 0) for share in (0.0, 0.5))
    assert list(known) == [str(t) for t in TIMESTEPS] and max(known.values()) < 1e-6
    for t in known:
        assert half[t] == pytest.approx(nothing[t] / 4, rel=1e-3) and nothing[t] > 0.5
    assert nothing != flow_loss.flow_losses(NucleusMoEImagePipeline(0.0), image, "red", 1)


def test_losses_are_written_once_for_each_prompt_of_a_shard_and_not_of_foreign_classes(image, tmp_path):
    prompts = [{"id": f"{i}", "prompt": f"caption {i}", "reference": {"file": "real.png"}} for i in range(6)]
    config = EvalConfig(benchmark="captions", seeds=(3,), batch_size=2, image_size_px=32)
    images = tmp_path / "images"
    for batch in plan_batches(prompts, config, images):
        for index, _ in batch.prompts:
            (images / "seed3" / f"{index:05d}").mkdir(parents=True)
    pipeline = NucleusMoEImagePipeline(0.0)
    counts = [flow_loss.measure(pipeline, prompts, config, images, tmp_path, shard, 3) for shard in (0, 1, 2, 0)]
    assert counts == [2, 2, 2, 0] and len(list(images.rglob(FILE))) == 6
    losses = [json.loads(path.read_text())["0.9"] for path in sorted(images.rglob(FILE))]
    assert len(set(losses)) == 6 and np.isfinite(losses).all()  # each prompt has its own noise
    assert flow_loss.measure(object(), prompts, config, images / "none", tmp_path) == 0
