"""What is published is what was merged, byte for byte, and loads with diffusers, transformers and torch alone."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from model.plan.memory import Shapes
from tasks.manifest import load_manifest, public_manifest, seal
from tasks.profiles import PROFILES
from tasks.publishing import publish, redact
from tasks.publishing.config import PublishConfig
from tasks.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[4]


def tiny_pipeline():
    """tests/fixtures is no package: several test folders load its files by path."""
    spec = importlib.util.spec_from_file_location("tiny_pipeline", ROOT / "tests/fixtures/models/tiny_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> dict:
    return load_recipe("tiny").model_dump(mode="json")


SCORE = {"mean": 0.5, "std": 0.1, "runs": 2, "seeds": [0, 1], "interval": [0.4, 0.6]}
SCORECARD = {
    "name": "shapes",
    "benchmark": "shapes",
    "overall": {**SCORE, "noise": {"sampling": 0.02, "prompts": 0.05, "training": None, "training_runs": 0}},
    "tasks": {"colors": {**SCORE, "prompts": 3, "images": 6, "correct": 3}},
    "held_out": None,
    "counts": {"expected": 6, "generated": 6, "scored": 6, "failed": 0},
    "interval": {"method": "Wilson", "level": 0.95},
    "settings": {"model_digests": {}},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("parts")
    make = tiny_pipeline()
    make.make_components(home / "components")
    make.make_transformer(home / "merged")
    (home / "scorecard").mkdir()
    (home / "scorecard/scorecard.json").write_text(json.dumps(SCORECARD))
    (home / "scorecard/grid.png").write_bytes(b"a picture")
    for name in ("components", "merged", "scorecard"):
        seal(home / name, name)
    return home


@pytest.fixture(scope="module")
def published(parts, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("published")
    report = publish.publish(parts / "merged", parts / "components", parts / "scorecard", recipe, out)
    assert report["class"] == "NucleusMoEImagePipeline" and report["files"] == sum(p.is_file() for p in out.rglob("*"))
    return out


def test_scores_of_other_weights_two_of_one_benchmark_and_missing_ones_are_refused(parts, recipe, tmp_path):
    def publish_with(message: str, *cards: dict, further: tuple[str, ...] = ()) -> None:
        folders = []
        for i, card in enumerate(cards):
            folders.append(tmp_path / f"{len(list(tmp_path.iterdir()))}-{i}")
            folders[-1].mkdir()
            (folders[-1] / "scorecard.json").write_text(json.dumps(SCORECARD | card))
        changed = recipe | {"eval": recipe["eval"] | {"further_benchmarks": list(further)}}
        with pytest.raises(ValueError, match=message):
            publish.publish(parts / "merged", parts / "components", folders[0], changed, tmp_path / "out", folders[1:])
        assert not (tmp_path / "out").exists()

    for kind in ("merged", "components"):
        publish_with(f"is of other {kind} .digest ffff", {"settings": {"model_digests": {kind: "f" * 64}}})
    publish_with("two scorecards of one benchmark among shapes, shapes", {}, {})
    publish_with("further_benchmarks have geneval2, of which no scorecard", {}, further=("geneval2",))


def test_weights_and_tables_are_copied_byte_for_byte(parts, published):
    for source, names in (("merged", ["transformer"]), ("components", ["vae", "text_encoder", "processor"])):
        for name in names:
            files = [p for p in (parts / source / name).rglob("*") if p.is_file()]
            assert files
            for file in files:
                assert (published / file.relative_to(parts / source)).read_bytes() == file.read_bytes()
    assert (published / "scorecard.json").read_bytes() == (parts / "scorecard/scorecard.json").read_bytes()
    assert (published / "grid.png").read_bytes() == b"a picture"


def test_only_the_files_of_a_pipeline_are_published(published):
    assert {p.name for p in published.iterdir()} == {
        "model_index.json", "transformer", "vae", "text_encoder", "processor", "scheduler",
        "README.md", "scorecard.json", "grid.png", "SHA256SUMS",
    }  # fmt: skip


def test_scorecards_of_further_benchmarks_are_published_too(parts, recipe, tmp_path):
    second = SCORECARD | {"name": "geneval2", "benchmark": "geneval2", "scale": 100.0}
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "scorecard.json").write_text(json.dumps(second))
    seal(tmp_path / "second", "scorecard")
    out = tmp_path / "out"
    publish.publish(parts / "merged", parts / "components", parts / "scorecard", recipe, out, [tmp_path / "second"])
    assert json.loads((out / "scorecard-geneval2.json").read_text()) == second
    assert json.loads((out / "scorecard.json").read_text()) == SCORECARD
    card = (out / "README.md").read_text()
    assert "| `geneval2` | 50.000 |" in card and load_manifest(tmp_path / "second").digest in card


def test_the_index_names_the_released_classes(published):
    index = json.loads((published / "model_index.json").read_text())
    assert index["_class_name"] == "NucleusMoEImagePipeline"
    assert index["transformer"] == ["diffusers", "NucleusMoEImageTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLQwenImage"]
    assert index["text_encoder"] == ["transformers", "Qwen3VLForConditionalGeneration"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_the_schedule_is_the_released_line_moved_by_the_recipes_shift(published, recipe):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    line = np.linspace(1.0, 0.1, 10)
    shift = recipe["eval"]["scheduler"]["shift"]
    released = FlowMatchEulerDiscreteScheduler.from_config(publish.SCHEDULER)
    for scheduler, expected in (
        (released, line),
        (
            FlowMatchEulerDiscreteScheduler.from_pretrained(published / "scheduler"),
            shift * line / (1 + (shift - 1) * line),
        ),
    ):
        scheduler.set_timesteps(sigmas=line, mu=0.7)
        assert np.allclose(scheduler.sigmas.numpy(), [*expected, 0.0], atol=1e-6)


def test_the_sums_cover_every_file_and_sha256sum_agrees(published):
    listed = {line.split("  ", 1)[1] for line in (published / "SHA256SUMS").read_text().splitlines()}
    there = {p.relative_to(published).as_posix() for p in published.rglob("*") if p.is_file()}
    assert listed == there - {"SHA256SUMS"}
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=published, capture_output=True)
        assert done.returncode == 0
    for line in (published / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((published / name).read_bytes()).hexdigest() == digest


def test_the_card_has_the_scores_and_the_digests_of_the_parents(parts, published):
    card = (published / "README.md").read_text()
    assert "| colors | 0.500 | 0.100 | 0.400 to 0.600 | 3 | 6 |" in card
    for name in ("merged", "components", "scorecard"):
        assert load_manifest(parts / name).digest in card


def test_publishing_twice_gives_the_same_bytes(parts, recipe, published, tmp_path):
    publish.publish(parts / "merged", parts / "components", parts / "scorecard", recipe, tmp_path)
    assert (tmp_path / "SHA256SUMS").read_bytes() == (published / "SHA256SUMS").read_bytes()


def test_without_scores_nothing_is_published(parts, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="only a model with scores is published"):
        publish.publish(parts / "merged", parts / "components", tmp_path / "empty", recipe, tmp_path / "out")


def test_no_published_file_names_a_place(parts, tmp_path):
    """Neither the folders that it was made in, nor those of its settings."""
    home = tmp_path / "someone"
    shutil.copytree(parts, home)
    judges = {"vqa": "mplug@/home/someone/mplug"}
    config = {"prompts_file": "someone/prompts.jsonl", "judges": judges}
    card = SCORECARD | {"config": config, "generation": {"config": config}}
    (home / "scorecard/scorecard.json").write_text(json.dumps(card))
    recipe = load_recipe(
        "smoke",
        ["source.path=/home/someone/images", "train.checkpoint_uri=s3://someone/x", "curation.takedown=someone.txt"],
    )
    out = tmp_path / "out"
    out.mkdir()
    public = redact.recipe(recipe.model_dump(mode="json"))
    publish.publish(home / "merged", home / "components", home / "scorecard", public, out)
    seal(out, "pipeline", config={"recipe": public})
    (out / "manifest.json").write_text(public_manifest(load_manifest(out)).model_dump_json())
    assert public["train"]["seed"] == recipe.train.seed
    for file in out.rglob("*"):
        assert not file.is_file() or b"someone" not in file.read_bytes(), file.name


def test_a_class_that_is_no_processor_is_not_looked_up(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Trainer"}))
    with pytest.raises(ValueError, match="names the class 'Trainer'; it must be one of"):
        publish.processor_class(tmp_path)


def test_the_check_runs_without_tokens_and_credentials(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FLYTE_AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted")
    assert "planted" not in publish._without_secrets(str(tmp_path)).values()


@pytest.mark.parametrize(
    ("source", "gone", "message"),
    [
        ("merged", "transformer/diffusion_pytorch_model.safetensors", r"transformer has no \*.safetensors"),
        ("merged", "transformer/config.json", "transformer has no config.json"),
        ("components", "vae/config.json", "vae has no config.json"),
        ("components", "processor/tokenizer_config.json", "processor has no tokenizer_config.json"),
        ("scorecard", "scorecard.json", "has no scorecard.json"),
    ],
)
def test_a_missing_part_is_named(parts, recipe, tmp_path, source, gone, message):
    copied = shutil.copytree(parts, tmp_path / "parts")
    (copied / source / gone).unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        publish.publish(copied / "merged", copied / "components", copied / "scorecard", recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("merged/transformer", {"joint_attention_dim": 48}, "takes text of width 48, the text encoder gives 32"),
        ("components/vae", {"z_dim": 8}, "takes 64 channels, the VAE gives 32 packed"),
        (
            "components/text_encoder",
            {"num_hidden_layers": 8},
            "return_index -8 needs more than 8 text layers; .* has 8",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_before_any_copy(parts, recipe, tmp_path, part, change, message):
    copied = shutil.copytree(parts, tmp_path / "parts")
    config = json.loads((copied / part / "config.json").read_text())
    config.get("text_config", config).update(change)
    (copied / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        publish.publish(copied / "merged", copied / "components", copied / "scorecard", recipe, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_processor_is_published_with_the_class_of_its_own_files(parts, recipe, tmp_path):
    copied = shutil.copytree(parts, tmp_path / "parts")
    (copied / "components/processor/processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    (tmp_path / "out").mkdir()
    publish.publish(copied / "merged", copied / "components", copied / "scorecard", recipe, tmp_path / "out")
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]


@pytest.mark.slow
def test_it_loads_and_draws_in_a_fresh_process_and_the_text_cache_changes_no_pixel(published):
    report = publish.check_pipeline(published, height_px=32, width_px=48)
    assert report["ok"] and report["class"] == "NucleusMoEImagePipeline"
    assert report["image_size_px"] == [32, 48]
    if report["device"] == "cpu":
        assert report["cache_max_difference"] == 0.0


@pytest.mark.slow
def test_a_stochastic_pipeline_is_checked_with_the_same_noise_each_time(parts, recipe, tmp_path):
    scheduler = {"shift": 3.0, "stochastic_sampling": True}
    changed = {**recipe, "eval": {**recipe["eval"], "scheduler": scheduler}}
    publish.publish(parts / "merged", parts / "components", parts / "scorecard", changed, tmp_path)
    assert scheduler.items() <= json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text()).items()
    assert publish.check_pipeline(tmp_path, height_px=32, width_px=32)["cache_max_difference"] == 0


@pytest.mark.slow
def test_a_large_pipeline_is_checked_in_half_the_memory_with_a_small_image(published, monkeypatch):
    parameters = publish.count_parameters(published)
    assert publish.check_memory_bytes(parameters) == 4 * parameters
    monkeypatch.setattr(publish, "LARGE_PARAMETERS", parameters - 1)
    monkeypatch.setattr(publish, "LARGE_SIDE_PX", 32)
    assert publish.check_memory_bytes(parameters) == 2 * parameters
    report = publish.check_pipeline(published, height_px=64, width_px=64)
    assert report["dtype"] == "bfloat16" and report["image_size_px"] == [32, 32]


def test_the_pod_that_publishes_can_load_the_17b_recipe():
    shapes = Shapes(load_recipe("nucleus_17b").model, load_recipe("nucleus_17b").train.optim.matrices)
    parameters = shapes.total + 8_767_123_696  # of Qwen3-VL-8B; the VAE has 0.1e9
    needed = publish.check_memory_bytes(parameters)
    assert needed == pytest.approx(51e9, rel=0.05)
    for name in ("h100", "h200", "b200"):
        assert needed * 1.5 < PROFILES[name].publish.memory_gib * 2**30, name
        assert needed * 1.5 > PROFILES[name].light.memory_gib * 2**30, name


def test_the_pod_that_merges_has_disk_for_all_checkpoints_of_the_17b_recipe():
    recipe = load_recipe("nucleus_17b")
    shapes = Shapes(recipe.model, recipe.train.optim.matrices)
    for name in ("h100", "h200", "b200"):  # weights in float32, and the result
        needed = (recipe.train.keep_checkpoints + 1) * 4 * shapes.total
        assert needed * 1.2 < PROFILES[name].merge.ephemeral_gib * 2**30, name


@pytest.mark.slow
def test_a_pipeline_that_does_not_load_is_one_error_with_the_reason(published, tmp_path):
    broken = shutil.copytree(published, tmp_path / "broken")
    weights = broken / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"(?s)broken does not load and draw in a fresh process \(exit 1\).*afetensor"):
        publish.check_pipeline(broken)


def test_the_check_has_a_time_limit(published):
    with pytest.raises(ValueError, match="did not draw an image within 0 s"):
        publish.check_pipeline(published, timeout_s=0.05)


def test_an_upload_goes_only_to_the_configured_destinations(published, monkeypatch):
    from tasks.publishing import hub, s3

    sent = []
    monkeypatch.setattr(
        hub, "push", lambda directory, repo_id, private, revision: sent.append((repo_id, private)) or {"to": "hub"}
    )
    monkeypatch.setattr(s3, "upload", lambda directory, uri, bucket_owner: sent.append(uri) or {"to": "s3"})
    assert publish.upload(published, PublishConfig()) == {} and sent == []
    config = PublishConfig(hub_repo_id="me/model", hub_private=False, s3_uri="s3://bucket/x")
    assert publish.upload(published, config) == {"s3": {"to": "s3"}, "hub": {"to": "hub"}}
    assert sent == ["s3://bucket/x", ("me/model", False)]


def test_another_hidden_state_needs_as_many_text_layers(parts, recipe, tmp_path):
    changed = copy.deepcopy(recipe)
    changed["encoding"]["hidden_state_index"] = -10
    with pytest.raises(ValueError, match="the recipe's return_index -10 needs more than 10 text layers"):
        publish.publish(parts / "merged", parts / "components", parts / "scorecard", changed, tmp_path)
