"""Parts of a run are the whole run, answers are kept between attempts, and the gate fails beyond noise and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flytekit.types.directory import FlyteDirectory
from PIL import Image, ImageDraw

from eval import catalog, pipelines
from eval.benchmarks.shapes.vocabulary import COLORS
from eval.config import EvalConfig
from eval.shapes_judge import ShapesDetector
from tasks.artifacts import UserError
from tasks.evaluation import evaluate, task
from tasks.evaluation.evaluate import Part
from tasks.manifest import load_manifest, seal
from tasks.store import home

CONFIG = EvalConfig(prompts_per_task=4, seeds=(0, 1), image_size_px=32, batch_size=4)


def squares(color):
    def sample(prompts, seeds, height, width):
        image = Image.new("RGB", (width, height), (250, 250, 250))
        ImageDraw.Draw(image).rectangle((8, 8, 20, 20), fill=COLORS[color])
        return [image] * len(prompts)

    return sample


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Sealed inputs of a model, whose pipeline is a sampler of this test."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    inputs = {}
    for kind in ("merged", "components"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "file").write_text(kind)
        seal(tmp_path / kind, kind)
        inputs[kind] = FlyteDirectory(str(tmp_path / kind))
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: squares("red"))
    return inputs


def run(function, **inputs):
    return function.task_function(**inputs)


def local(artifact) -> Path:
    return Path(artifact.path)


def score_files(artifact):
    return {name: (local(artifact) / name).read_bytes() for name in ("scorecard.json", "scores.parquet")}


def test_parts_of_a_run_are_scored_as_the_whole_run(model):
    whole = [run(task.generate_images, **model, config=CONFIG, seed=seed) for seed in CONFIG.seeds]
    expected = run(task.score_images, images=whole, config=CONFIG)
    for parts_per_seed in (2, 5):
        parts = run(task.plan_parts, config=CONFIG, parts_per_seed=parts_per_seed)
        assert len(parts) == 2 * parts_per_seed
        images = [run(task.generate_part, **model, config=CONFIG, part=part) for part in parts]
        assert score_files(run(task.score_images, images=images, config=CONFIG)) == score_files(expected)
    card = json.loads((local(expected) / "scorecard.json").read_text())
    assert set(card["settings"]["model_digests"]) == {"merged", "components"} and card["counts"]["failed"] == 0
    with pytest.raises(UserError, match="lacks|holds"):  # a part that is not there is missing images
        run(task.score_images, images=images[:-1], config=CONFIG)


def test_answers_are_an_artifact_of_their_own_and_score_alike_without_a_judge(model, monkeypatch):
    images = [run(task.generate_images, **model, config=CONFIG, seed=seed) for seed in CONFIG.seeds]
    expected = run(task.score_images, images=images, config=CONFIG)
    answers = run(task.judge_images, images=images, config=CONFIG)
    assert load_manifest(local(answers)).kind == "answers" and not list((home() / "runs").iterdir())
    monkeypatch.setattr(catalog, "judge", lambda *_: pytest.fail("a judge was asked for"))
    scored = run(task.score_answers, images=images, answers=answers, config=CONFIG)
    assert score_files(scored) == score_files(expected)


def test_answers_of_a_judge_that_died_are_kept_for_the_next_attempt(model, monkeypatch):
    asked = []

    class Dying(ShapesDetector):
        def answer(self, requests):
            if len(asked) == 1:
                asked.append("died")
                raise RuntimeError("out of memory")
            asked.append(len(requests))
            return super().answer(requests)

    monkeypatch.setattr(catalog, "judge", lambda _: Dying())
    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: colourful)
    config = CONFIG.model_copy(update={"judge_batch_size": 4})

    def colourful(prompts, seeds, height, width):
        return [Image.new("RGB", (width, height), (200, 200, seed % 256)) for seed in seeds]

    images = [run(task.generate_images, **model, config=config, seed=seed) for seed in CONFIG.seeds]
    with pytest.raises(UserError, match="judge shapes-detector stopped at .* 4 answers are kept"):
        run(task.judge_images, images=images, config=config)
    run(task.judge_images, images=images, config=config)
    total = json.loads((local(images[0]) / "manifest.json").read_text())["counts"]["images"] * 2
    assert sum(n for n in asked if n != "died") <= total  # equal images are asked about once
    assert asked.count("died") == 1


def scorecard_of(model, monkeypatch, sampler, name, config=CONFIG):
    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: sampler)
    folder = local(model["merged"]).parent / name
    folder.mkdir()
    (folder / "file").write_text(name)
    seal(folder, "merged")
    inputs = {**model, "merged": FlyteDirectory(str(folder))}
    images = [run(task.generate_images, **inputs, config=config, seed=seed) for seed in config.seeds]
    return run(task.score_images, images=images, config=config)


def blank(prompts, seeds, height, width):
    return [Image.new("RGB", (width, height), (250, 250, 250))] * len(prompts)


def right(prompts, seeds, height, width):
    """Right for all of this test's prompts: the detector below reads the prompt's own number of objects."""
    return [Image.new("RGB", (width, height), (1, 2, 3))] * len(prompts)


class Answering(ShapesDetector):
    """Finds four of everything in a dark image, and nothing in another: right for prompts without `exclude`."""

    revision = "a" * 64

    def answer(self, requests):
        item = [{"box": [1, 1, 9, 9], "score": 1.0, "color": "red"}]
        everything = dict.fromkeys(("circle", "square", "triangle", "cross"), item)
        return [everything if request.images[0].getpixel((0, 0)) == (1, 2, 3) else {} for request in requests]

    def selftest(self):
        pass


def test_the_gate_fails_beyond_noise_and_only_then(model, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    config = CONFIG.model_copy(update={"prompts_per_task": 24})
    good = scorecard_of(model, monkeypatch, right, "good", config)
    bad = scorecard_of(model, monkeypatch, blank, "bad", config)
    same = scorecard_of(model, monkeypatch, right, "same", config)
    assert "cannot tell" in run(task.gate, scorecard=same, incumbent=good)
    assert run(task.gate, scorecard=good, incumbent=bad).startswith("better")
    with pytest.raises(UserError, match=r"the score dropped beyond noise, from .*: worse: shapes"):
        run(task.gate, scorecard=bad, incumbent=good)
    assert (local(bad) / "scorecard.json").is_file()  # it is stored before the gate fails


def test_the_gate_compares_nothing_with_scores_of_other_prompts(model, monkeypatch):
    good = scorecard_of(model, monkeypatch, squares("red"), "good")
    other = scorecard_of(
        model,
        monkeypatch,
        blank,
        "other",
        CONFIG.model_copy(update={"prompt_set": "development", "prompts_per_task": 5}),
    )
    assert run(task.gate, scorecard=other, incumbent=good).startswith(
        "not compared with the incumbent: they are of diff"
    )


def test_a_candidate_is_chosen_on_development_prompts(model, monkeypatch):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    config = CONFIG.model_copy(update={"prompt_set": "development", "prompts_per_task": 24})
    names = {"incumbent": blank, "equal": blank, "better": right}
    cards = {name: scorecard_of(model, monkeypatch, sampler, name, config) for name, sampler in names.items()}
    candidates = [cards["equal"], cards["better"]]
    assert run(task.choose_candidate, incumbent=cards["incumbent"], candidates=candidates) == 1
    assert run(task.choose_candidate, incumbent=cards["better"], candidates=[cards["equal"]]) == -1


def test_a_model_is_resolved_to_what_it_is_and_a_changed_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    name = str(tmp_path / "model")
    digest = run(task.resolve_model, model=name, revision="")
    monkeypatch.setattr(
        pipelines, "load_pipeline", lambda m, **_: (None, {"model": "m", "digest": pipelines.resolve(m)})
    )
    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: squares("red"))
    images = run(task.generate_from_model, model=name, digest=digest, config=CONFIG, part=Part(seed=0))
    assert load_manifest(local(images)).config["digest"] == digest
    (tmp_path / "model" / "model_index.json").write_text("{ }")
    assert run(task.resolve_model, model=name, revision="") != digest
    with pytest.raises(UserError, match="changed since it was resolved"):
        run(task.generate_from_model, model=name, digest=digest, config=CONFIG, part=Part(seed=1))
    with pytest.raises(UserError, match="needs its revision"):
        run(task.resolve_model, model="a/b", revision="")


def test_a_part_must_be_one_of_its_parts():
    with pytest.raises(ValueError, match="index=2 must be one of the 2 parts"):
        Part(seed=0, index=2, parts=2)
    with pytest.raises(ValueError, match="parts_per_seed=0"):
        evaluate.plan_parts(CONFIG, 0)
