"""Parts add up to the whole run, answers are kept between attempts, and the gate fails only beyond noise."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from evaluated import local, run, sampled, scored_by, squares
from flytekit.types.directory import FlyteDirectory
from PIL import Image

from eval import catalog
from eval.config import EvalConfig
from eval.generation import pipelines
from eval.judges.shapes_judge import ShapesDetector
from tasks.artifacts import UserError
from tasks.evaluation import evaluate, history, plan, task
from tasks.evaluation.models import Model
from tasks.evaluation.plan import ImagesPart
from tasks.manifest import load_manifest, seal
from tasks.store import home

CONFIG = EvalConfig(prompts_per_task=4, seeds=(0, 1), image_size_px=32, batch_size=4)


def score_files(artifact):
    return {name: (local(artifact) / name).read_bytes() for name in ("scorecard.json", "scores.parquet")}


@pytest.mark.slow
def test_parts_of_a_run_are_scored_as_the_whole_run(model):
    expected = scored_by(model, CONFIG, parts_per_seed=1)
    for parts_per_seed in (2, 5):
        assert len(run(task.plan_generation, config=CONFIG, parts_per_seed=parts_per_seed).parts) == 2 * parts_per_seed
        assert score_files(scored_by(model, CONFIG, parts_per_seed)) == score_files(expected)
    card = json.loads((local(expected) / "scorecard.json").read_text())
    assert set(card["settings"]["model_digests"]) == {"merged", "components"} and card["counts"]["failed"] == 0
    prompts, images = sampled(model, CONFIG, parts_per_seed=2)
    with pytest.raises(UserError, match="lacks|holds"):  # a missing part means missing images
        run(task.judge_images, images=images[:-1], prompts=prompts, config=CONFIG)


@pytest.mark.slow
def test_answers_are_an_artifact_of_their_own_and_score_alike_without_a_judge(model, monkeypatch):
    prompts, images = sampled(model, CONFIG)
    answers = run(task.judge_images, images=images, prompts=prompts, config=CONFIG)
    assert load_manifest(local(answers)).kind == "answers" and not list((home() / "runs").iterdir())
    monkeypatch.setattr(catalog, "judge", lambda *_: pytest.fail("a judge was asked for"))
    scored = run(task.score_answers, images=images, prompts=prompts, answers=answers, config=CONFIG)
    again = run(task.score_answers, images=images, prompts=prompts, answers=answers, config=CONFIG)
    assert score_files(scored) == score_files(again)


def test_images_are_linked_and_not_copied_to_be_sealed_and_judged(model, monkeypatch):
    linked, link = [], os.link

    def recorded(source, target):
        linked.append(Path(source).name)
        link(source, target)

    monkeypatch.setattr(os, "link", recorded)
    prompts, images = sampled(model, NIGHTLY)
    number = load_manifest(local(images[0])).counts["images"]
    assert sum(name.endswith(".png") for name in linked) == number
    run(task.judge_images, images=images, prompts=prompts, config=NIGHTLY)
    assert sum(name.endswith(".png") for name in linked) == 2 * number
    picture = next(local(images[0]).rglob("*.png"))
    assert picture.stat().st_nlink == 1  # the folders of the run are gone


@pytest.mark.slow
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

    prompts, images = sampled(model, config)
    with pytest.raises(UserError, match="judge shapes-detector stopped at .* 4 answers are kept"):
        run(task.judge_images, images=images, prompts=prompts, config=config)
    run(task.judge_images, images=images, prompts=prompts, config=config)
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
    return scored_by(inputs, config)


def blank(prompts, seeds, height, width):
    return [Image.new("RGB", (width, height), (250, 250, 250))] * len(prompts)


def right(prompts, seeds, height, width):
    """Images that `Answering` finds right for all prompts of this test."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        "shapes: not compared with the incumbent: they are of diff"
    )


@pytest.mark.slow
def test_a_candidate_is_chosen_on_development_prompts(model, monkeypatch):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    config = CONFIG.model_copy(update={"prompt_set": "development", "prompts_per_task": 24})
    names = {"incumbent": blank, "equal": blank, "better": right}
    cards = {name: scorecard_of(model, monkeypatch, sampler, name, config) for name, sampler in names.items()}
    names = ["incumbent", "guidance_scale=1", "guidance_scale=2"]
    scorecards = [cards["incumbent"], cards["equal"], cards["better"]]
    choice = run(task.choose_scorecard, names=names, scorecards=scorecards)
    assert choice.chosen == "guidance_scale=2"
    assert choice.sentence.startswith("shapes: guidance_scale=2 beats the incumbent by +")
    kept = run(task.choose_scorecard, names=names[:2], scorecards=[cards["better"], cards["equal"]])
    assert kept.chosen == "incumbent" and kept.sentence.startswith("shapes: the incumbent stays: the best of 1 differs")


def test_a_model_is_resolved_to_its_digest_or_commit_and_a_changed_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")

    def resolve(place=str(tmp_path / "model"), revision="", components=""):
        return run(task.resolve_model, model=place, revision=revision, components=components)

    model = resolve()
    monkeypatch.setattr(
        pipelines, "load_pipeline", lambda m, **_: (None, {"model": "m", "digest": pipelines.resolve(m)})
    )
    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: squares("red"))
    prompts = run(task.make_prompts, config=CONFIG)
    sample = {"model": model, "digest": model.digest, "prompts": prompts, "config": CONFIG}
    images = run(task.generate_from_model, **sample, part=ImagesPart(seed=0))
    assert load_manifest(local(images)).config["digest"] == model.digest
    (tmp_path / "model" / "model_index.json").write_text("{ }")
    assert resolve().digest != model.digest
    with pytest.raises(UserError, match="changed since it was resolved"):
        run(task.generate_from_model, **sample, part=ImagesPart(seed=1))
    with pytest.raises(UserError, match="has no revision"):
        resolve(revision="a" * 40)
    with pytest.raises(UserError, match="neither a directory, nor a Hub id"):
        resolve("./nowhere")
    assert resolve("a/b@" + "c" * 40).digest == resolve("a/b", "c" * 40).digest == "c" * 40


def nightly(model_digest, scorecard):
    """One night: (benchmarks that changed, the gate's result)."""
    model = Model(place="/somewhere", digest=model_digest)
    changed = run(task.find_changed, source="s3://bucket/pipeline", model=model, configs=[NIGHTLY])
    stored = [
        run(task.store_score, source="s3://bucket/pipeline", model=model, config=config, scorecard=scorecard)
        for config in changed
    ]
    return len(changed), run(task.gate_scores, stored=stored) if stored else []


NIGHTLY = CONFIG.model_copy(update={"seeds": (0,)})


@pytest.mark.slow
def test_a_night_scores_a_new_model_once_and_a_drop_alarms_once_and_is_never_a_reference(model, monkeypatch):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    good, bad, worse_again, same = (
        scorecard_of(model, monkeypatch, sampler, name, NIGHTLY)
        for name, sampler in (("good", right), ("bad", blank), ("bad2", blank), ("same", right))
    )
    assert nightly("1" * 64, good) == (1, ["shapes 0.333: the first score, nothing to compare it with"])
    assert nightly("1" * 64, good) == (0, [])  # unchanged: nothing runs
    with pytest.raises(UserError, match="the score dropped beyond noise"):
        nightly("2" * 64, bad)
    assert nightly("2" * 64, bad) == (0, [])  # it alarmed once
    with pytest.raises(UserError, match="the score dropped beyond noise"):  # not compared with the one that dropped
        nightly("3" * 64, worse_again)
    model = Model(place="/somewhere", digest="4" * 64)  # this night ends before the gate
    run(task.store_score, source="s3://bucket/pipeline", model=model, config=NIGHTLY, scorecard=bad)
    with pytest.raises(UserError, match="the score dropped beyond noise"):
        nightly("4" * 64, bad)
    changed, (sentence,) = nightly("5" * 64, same)
    assert changed == 1 and sentence.startswith("cannot tell")
    (reference,) = history.read("s3://bucket/pipeline", "shapes")["references"].values()
    assert reference == str(local(good))  # else several small drops, each within noise, would lower it


@pytest.mark.slow
def test_a_score_by_other_judges_is_not_compared_and_says_so_and_the_old_reference_stays_for_the_old_judges(
    model, monkeypatch, capsys
):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    good, bad = (
        scorecard_of(model, monkeypatch, sampler, name, NIGHTLY) for name, sampler in (("good", right), ("bad", blank))
    )

    class Another(Answering):
        name, model, revision = "another", "not the official one", "b" * 64

    monkeypatch.setattr(catalog, "judge", lambda _: Another())
    good_by_another, bad_by_another = (
        scorecard_of(model, monkeypatch, sampler, name, NIGHTLY)
        for name, sampler in (("good by another", right), ("bad by another", blank))
    )
    nightly("1" * 64, good)
    changed, (sentence,) = nightly("2" * 64, bad_by_another)  # passes, for nothing shows whether the weights are worse
    assert changed == 1 and sentence.startswith("shapes[another] 0.") and sentence in capsys.readouterr().out
    assert "NOT COMPARED with the reference (shapes 0.333): one was judged by shapes-detector at" in sentence
    _, (sentence,) = nightly("3" * 64, good_by_another)  # compared with its own kind
    assert sentence.startswith("better: shapes[another]")
    with pytest.raises(UserError, match=r"dropped beyond noise.*worse: shapes\[another\]"):
        nightly("4" * 64, bad_by_another)
    with pytest.raises(UserError, match="dropped beyond noise.*worse: shapes 0.333"):  # back to the first judge
        nightly("5" * 64, bad)
    _, (sentence,) = nightly("6" * 64, good)
    assert sentence.startswith("cannot tell: shapes 0.333")


def test_the_settings_and_the_judges_make_an_unchanged_model_new(model, monkeypatch):
    monkeypatch.setattr(catalog, "judge", lambda _: Answering())
    card = scorecard_of(model, monkeypatch, right, "good", NIGHTLY)
    nightly("1" * 64, card)
    unchanged = Model(place="/elsewhere", digest="1" * 64)
    for update, number in (({}, 0), ({"guidance_scale": 2.0}, 1), ({"judges": {"detector": "ssd-mobilenet-v2"}}, 1)):
        configs = [NIGHTLY.model_copy(update=update)]
        assert len(run(task.find_changed, source="s3://bucket/pipeline", model=unchanged, configs=configs)) == number


def test_a_part_must_be_one_of_its_parts():
    with pytest.raises(ValueError, match="index=2 must be one of the 2 parts"):
        ImagesPart(seed=0, index=2, parts=2)
    with pytest.raises(ValueError, match="parts_per_seed=0"):
        plan.plan_parts(CONFIG, 0)


def test_a_score_that_cannot_be_gated_hides_no_drop_and_is_gated_the_next_night(monkeypatch):
    written, sentences = {}, []

    def drops(reference, scorecard):
        raise evaluate.DropError("geneval dropped")

    def fetch(place):
        if place == "broken":
            raise OSError("no such object")
        return place

    monkeypatch.setattr(history, "check_drop", drops)
    monkeypatch.setattr(history, "read", lambda source, benchmark: {"scorecard": benchmark, "gated": "no"})
    monkeypatch.setattr(history, "_write", lambda source, benchmark, record: written.update({benchmark: record}))
    stored = [
        json.dumps({"source": "s", "benchmark": name, "scorecard": name, "key": "k", "references": {"k": reference}})
        for name, reference in (("geneval", "good"), ("geneval2", "broken"))
    ]
    with pytest.raises(evaluate.DropError, match="geneval dropped; geneval2 cannot be gated: no such object"):
        history.gate(stored, fetch, sentences.append)
    assert {name: record["gated"] for name, record in written.items()} == {"geneval": "yes"}
    assert sentences == ["geneval dropped", "geneval2 cannot be gated: no such object"]
    with pytest.raises(ValueError, match="^geneval2 cannot be gated"):
        history.gate(stored[1:], fetch, sentences.append)


def test_a_record_that_cannot_be_read_hides_no_drop(monkeypatch):
    def drops(reference, scorecard):
        raise evaluate.DropError("geneval dropped")

    def damaged(source, benchmark):
        raise ValueError("geneval.json is not a record")

    monkeypatch.setattr(history, "check_drop", drops)
    monkeypatch.setattr(history, "read", damaged)
    item = {"source": "s", "benchmark": "geneval", "scorecard": "new", "key": "k", "references": {"k": "old"}}
    with pytest.raises(
        evaluate.DropError, match="^geneval dropped; geneval cannot be gated: geneval.json is not a record$"
    ):
        history.gate([json.dumps(item)], lambda place: place, lambda sentence: None)
