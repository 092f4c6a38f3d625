"""The whole lineage, by the command that users type."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.manifest import _checksum, load_manifest, verify
from tasks.trace import walk

ROOT = Path(__file__).resolve().parents[3]


def _trace(directory: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tasks.trace", str(directory), *options], cwd=ROOT, capture_output=True, text=True
    )


def test_a_run_leaves_a_verified_pipeline_scorecard_grid_and_report(smoke):
    for path in smoke.values():
        verify(path)
    assert (smoke["pipeline"] / "model_index.json").is_file() and (smoke["pipeline"] / "README.md").is_file()
    assert (smoke["scorecard"] / "grid.png").stat().st_size > 1000
    assert "<html" in (smoke["scorecard"] / "scorecard.html").read_text().lower()
    card = json.loads((smoke["scorecard"] / "scorecard.json").read_text())
    assert card["overall"]["runs"] == 3 and card["counts"]["failed"] == 0
    assert set(card["tasks"]) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    low, high = card["overall"]["interval"]
    assert low <= card["overall"]["mean"] <= high and card["held_out"] is not None


def test_the_ledger_accounts_for_every_record_once(smoke):
    ledger = pd.read_parquet(smoke["curated"] / "ledger.parquet")
    (corpus,) = [node for node in walk(smoke["pipeline"]).values() if node.manifest.kind == "corpus"]
    records = int(pd.read_parquet(Path(corpus.path) / "shards.parquet")["num_rows"].sum())
    assert len(ledger) == records == ledger["key"].nunique()
    made = [Path(parent.uri) for parent in corpus.manifest.parents if parent.kind == "records"]
    assert {key for path in made for key in pd.read_parquet(path / "truth.parquet")["key"]} <= set(ledger["key"])
    assert ledger["kept"].sum() + (ledger["rule"] != "").sum() == records
    report = json.loads((smoke["curated"] / "report.json").read_text())
    assert report["input"] == records and report["kept"] == int(ledger["kept"].sum())


def test_the_trace_leads_from_the_pipeline_to_the_ids_of_the_records(smoke):
    done = _trace(smoke["pipeline"], "--records", "--expect", load_manifest(smoke["pipeline"]).digest)
    assert done.returncode == 0, done.stderr
    ledger = pd.read_parquet(smoke["curated"] / "ledger.parquet")
    assert all(record_id in done.stdout for record_id in ledger["record_id"][ledger["kept"]])
    for kind in (
        "merged",
        "checkpoints",
        "latents",
        "curated",
        "components",
        "corpus",
        "records",
        "scorecard",
        "images",
    ):
        assert f"{kind} " in done.stdout


def test_the_trace_fails_loudly_on_a_flipped_byte_anywhere(smoke, smoke_home, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(smoke_home.artifacts, copy / "artifacts")
    for manifest in (copy / "artifacts").rglob("manifest.json"):  # parents are found by digest below --home
        fields = json.loads(manifest.read_text().replace(str(smoke_home.artifacts), str(copy / "gone")))
        manifest.write_text(json.dumps(fields | {"checksum": _checksum(fields)}))
    pipeline = copy / "artifacts" / "pipeline" / smoke["pipeline"].name
    done = _trace(pipeline, "--home", str(copy), "--json")
    assert done.returncode == 0, done.stderr
    # A file of every kind in this pipeline's own lineage: the cache that other tests share holds other runs too.
    victims = {node["kind"]: Path(node["path"]) for node in json.loads(done.stdout)["nodes"]}
    assert {"latents", "records", "curated", "components", "checkpoints", "merged", "images"} <= victims.keys()
    for directory in victims.values():
        assert directory.is_relative_to(copy)
        files = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
        victim = max(files, key=lambda path: path.stat().st_size)
        data = victim.read_bytes()
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match=re.escape(victim.name)):
            walk(pipeline, copy)
        victim.write_bytes(data)
    walk(pipeline, copy)
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = _trace(pipeline, "--home", str(copy))
    assert done.returncode == 1 and victim.name in done.stderr


def test_the_published_directory_draws_what_our_own_sampler_draws(smoke):
    import torch
    from diffusers import DiffusionPipeline, TextKVCacheConfig

    from model.flow import unpack_latents
    from model.sampling.sampler import sample_latents
    from model.weights.export import load_transformer

    pipe = DiffusionPipeline.from_pretrained(smoke["pipeline"], local_files_only=True)
    assert type(pipe).__name__ == "NucleusMoEImagePipeline"
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a red circle", "a photo of two squares and a small blue triangle"]
    noise = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))
    arguments = dict(prompt=prompts, height=64, width=64, num_inference_steps=5, guidance_scale=4.0, output_type="np")
    theirs = pipe(latents=noise.clone(), **arguments).images
    pipe.transformer.enable_cache(TextKVCacheConfig())
    cached = pipe(latents=noise.clone(), **arguments).images
    np.testing.assert_allclose(cached, theirs, atol=1e-5)

    model = load_transformer(smoke["pipeline"] / "transformer").eval()
    text, mask = pipe.encode_prompt(prompts)
    negative, negative_mask = pipe.encode_prompt(["", ""])
    tokens = sample_latents(model, text, mask, negative, negative_mask, noise, (1, 4, 4), 5, 4.0)
    config = pipe.vae.config
    latents = unpack_latents(tokens, 4, 4) * torch.tensor(config.latents_std).view(1, -1, 1, 1)
    latents = latents + torch.tensor(config.latents_mean).view(1, -1, 1, 1)
    with torch.no_grad():
        ours = pipe.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert theirs.std() > 0.01  # not two blank images
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.fixture(scope="module")
def published(smoke):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(smoke["pipeline"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a photo of a red circle left of a blue square", seeds=(0,), guidance=4.0, **options):
    """Images [B, H, W, 3] in 0..1, one for each seed."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"} | options
    return pipe(generator=generators if len(seeds) > 1 else generators[0], guidance_scale=guidance, **options)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_generator_alone_decides_a_published_image_in_a_batch_as_by_itself(published, guidance):
    """diffusers' convention: images of a batch equal those drawn alone, for prompts of different lengths."""
    import torch

    prompts = ["a photo of a red circle left of a blue square", "two squares", "a photo of a cross"]
    batch = draw(published, prompts, (0, 1, 2), guidance).images
    for seed, (prompt, image) in enumerate(zip(prompts, batch)):
        torch.manual_seed(100 + seed)  # the global generator has no effect
        alone = draw(published, prompt, (seed,), guidance).images[0]
        np.testing.assert_allclose(alone, image, atol=1e-4)
    assert np.abs(draw(published, prompts[0], (1,), guidance).images[0] - batch[0]).max() > 0.05
    twice = draw(published, prompts[0], (0, 0), guidance, num_images_per_prompt=2).images
    assert len(twice) == 2 and np.abs(twice - batch[0]).max() < 1e-4


def test_a_published_pipeline_draws_the_same_after_saving_and_loading_and_as_a_tuple(published, tmp_path):
    from diffusers import DiffusionPipeline

    before = draw(published).images
    published.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(again).images, before, atol=1e-4)
    as_tuple = draw(published, return_dict=False)
    assert isinstance(as_tuple, tuple)
    np.testing.assert_array_equal(as_tuple[0], before)


def test_published_texts_may_be_encoded_apart_and_parts_may_be_shared_or_sliced(published):
    """`encode_prompt` alone, a pipeline from another's components, and attention slicing."""
    prompt, options = "a photo of a red circle left of a blue square", {}
    before = draw(published, prompt).images
    for name, text in (("", prompt), ("negative_", "")):
        options[f"{name}prompt_embeds"], options[f"{name}prompt_embeds_mask"] = published.encode_prompt(text)
    np.testing.assert_allclose(draw(published, None, **options).images, before, atol=1e-4)
    other = type(published)(**published.components)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(other, prompt).images, before)
    for size in (1, "auto"):
        other.enable_attention_slicing(size)
        np.testing.assert_allclose(draw(other, prompt).images, before, atol=1e-4)
    other.disable_attention_slicing()


def test_a_second_run_comes_from_the_cache_and_a_training_number_reruns_training_and_later_tasks(smoke, smoke_home):
    before = smoke_home.listing()
    again = smoke_home.run("--recipe", "smoke")
    assert smoke_home.outputs(again) == smoke
    assert smoke_home.listing() == before
    assert "shapes overall" in again.stdout  # the summary is printed again
    assert "step 1/" not in again.stdout and "records: shard" not in again.stdout

    changed = smoke_home.run("--recipe", "smoke", "--overrides", "train.stages[2].wavelet=false")
    outputs = smoke_home.outputs(changed)
    after = smoke_home.listing()
    new = {kind: len(after[kind] - before[kind]) for kind in after}
    assert new["checkpoints"] == 1 and new["merged"] == 1 and new["scorecard"] == 1 and new["pipeline"] == 1
    for kind in ("records", "scores", "curated", "components", "latents"):
        assert new[kind] == 0, f"{kind} was made again"
    assert outputs["curated"] == smoke["curated"] and outputs["pipeline"] != smoke["pipeline"]
    assert "[stage3_64px] step 1/12" in changed.stdout and "[stage2_48px]" not in changed.stdout


@pytest.mark.parametrize("kind", ["merged", "curated", "components", "latents"])
def test_deleted_cached_files_are_made_again_without_a_training(smoke, smoke_home, kind):
    needed = smoke_home.artifacts / kind
    shutil.rmtree(needed)
    done = smoke_home.run("--recipe", "smoke")
    assert smoke_home.outputs(done) == smoke
    for path in [*smoke.values(), *needed.iterdir()]:
        verify(path)
    assert any(needed.iterdir()) and "step 1/" not in done.stdout, "training needed not to run again"
