"""The captions benchmark: generated images against real ones, in the features of a named judge."""

from __future__ import annotations

import json

import numpy as np
import official_data
import pytest
from PIL import Image

from eval import catalog
from eval.benchmarks import flow_loss, manifold
from eval.benchmarks.base import Judged
from eval.benchmarks.captions import REAL
from eval.config import EvalConfig
from eval.generation.generate import copy_references, generate
from eval.judges.shapes_judge import ShapesDetector
from eval.scorecard import judge_run, lines, rescore
from eval.scorecards.card import load

CAPTIONS = catalog.benchmark("captions")
RNG = np.random.default_rng(0)


def features(n, width=6, shift=0.0):
    return RNG.normal(size=(n, width)) + shift


def test_the_frechet_distance_is_that_of_the_covariances_square_root():
    from scipy.linalg import sqrtm

    for n, m in ((40, 30), (8, 9)):  # more images than features, and fewer
        a, b = features(n, 6 if n == 40 else 20), features(m, 6 if n == 40 else 20, 0.5)
        covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = sqrtm(covariances[0] @ covariances[1]).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert manifold.frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)
        assert manifold.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_images_of_the_same_kind_are_among_the_real_ones_and_others_are_not():
    real = features(200)
    same, other = manifold.memberships(real, features(200)), manifold.memberships(real, features(200, shift=30.0))
    for of in (same.precise, same.recalled, same.covered):
        assert of.mean() > 0.8
    for of in (other.precise, other.recalled, other.covered):
        assert of.mean() == 0


def test_one_image_again_and_again_is_precise_and_covers_nothing():
    real = features(100)
    collapsed = manifold.memberships(real, np.repeat(real[:1], 50, axis=0) + 1e-6)
    assert collapsed.precise.all() and collapsed.covered.mean() < 0.2 and collapsed.recalled.mean() < 0.1


def test_a_match_is_one_for_the_own_image_and_a_half_by_chance():
    real = features(60)
    own = np.arange(60)
    assert (manifold.matches(real, real + 1e-9, own) == 1).all()
    assert manifold.matches(real, features(60), own).mean() == pytest.approx(0.5, abs=0.1)
    assert (manifold.matches(np.ones((4, 2)), np.zeros((4, 2)), np.arange(4)) == 0.5).all()  # ties


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="1 and 3 images are too few"):
        manifold.frechet_distance(features(1), features(3))


def test_the_score_is_the_mean_of_the_parts_that_were_judged_whatever_the_order():
    real = features(12)
    prompts = [{"id": f"{i:02d}", "prompt": f"caption {i}", "tag": "captions"} for i in range(12)]
    judged = {
        prompt["id"]: Judged(({"features": list(vector + 0.01)},), {REAL: list(vector)})
        for prompt, vector in zip(prompts, real, strict=True)
    }
    summary = CAPTIONS.summarise(prompts, judged, "fixed")
    assert set(summary["categories"]) == {"match", "precision", "recall", "coverage"} and summary["failed"] == 0
    assert summary["score"] == pytest.approx(np.mean(list(summary["categories"].values()))) and summary["score"] > 0.9
    again = CAPTIONS.summarise(prompts[::-1], dict(reversed(list(judged.items()))), "fixed")
    assert again["categories"] == pytest.approx(summary["categories"])
    judged["03"] = Judged((None,), {})
    assert CAPTIONS.summarise(prompts, judged, "fixed")["failed"] == 1


class Features(ShapesDetector):
    """Mean colour and spread as features; 0.25 as similarity."""

    name, model, revision = "mean-colour", "the mean colour", "b" * 64

    def answer(self, requests):
        answers = []
        for request in requests:
            pixels = np.asarray(request.images[0].convert("RGB"), dtype=float)
            vector = [*pixels.mean((0, 1)), *pixels.std((0, 1))]
            answers.append(0.25 if request.text else vector)
        return answers


@pytest.fixture
def run(tmp_path):
    """(folder of a run, its configuration): twenty captions, and images in nearly the right colours."""
    colors = np.random.default_rng(1).integers(0, 256, (20, 3))
    pictures = [Image.new("RGB", (16, 16), tuple(map(int, color))) for color in colors]
    prompts_file = str(official_data.write_captions(tmp_path / "given", pictures))
    config = EvalConfig(benchmark="captions", seeds=(0, 1), image_size_px=16, prompts_file=prompts_file)

    def sampler(texts, seeds, height, width):
        pictures = [Image.new("RGB", (width, height), tuple(map(int, colors[int(text)]))) for text in texts]
        for picture, seed in zip(pictures, seeds, strict=True):
            picture.putpixel((0, 0), (seed % 256, 0, 0))
        return pictures

    generate(sampler, catalog.prompts(config), config, tmp_path / "run", log=lambda _: None)
    copy_references(catalog.prompts(config), tmp_path / "given", tmp_path / "run" / "images")
    return tmp_path / "run", config


@pytest.mark.parametrize("skills", [("features",), ("features", "similarity")])
def test_a_run_is_scored_beside_its_real_images_under_its_judges_name(run, skills, tmp_path):
    folder, config = run
    card = rescore(folder, tmp_path / "out", config, judges={skill: Features() for skill in skills}, log=lambda _: None)
    assert card["name"] == "captions[mean-colour]" and card["counts"]["failed"] == 0
    assert card["tasks"]["match"]["mean"] > 0.95 and ("similarity" in card["tasks"]) == (len(skills) == 2)
    assert card["measures"]["real_images"] == 20 and card["measures"]["frechet_distance"] < 400
    assert any("no judge for similarity" in note for note in card["deviations"]) == (len(skills) == 1)
    page = (tmp_path / "out" / "scorecard.html").read_text()
    assert "not by the benchmark" not in page and "frechet distance" in page.lower()
    assert load(tmp_path / "out").tasks["match"].prompts == 20
    assert (card["overall"]["prompts"], card["overall"]["images"]) == (20, 40)  # however many parts there are
    text = "\n".join(lines(card))
    assert "frechet distance" in text


def test_a_real_image_is_asked_about_once_and_needed_in_no_later_scoring(run, tmp_path):
    folder, config = run
    report = judge_run(folder, tmp_path / "judged", {"features": Features()}, config, log=lambda _: None)
    assert report["asked"] == 2 * 20 + 20
    for path in (folder / "images" / "reference").iterdir():
        path.unlink()
    rescore(folder, tmp_path / "out", config, judged=tmp_path / "judged", log=lambda _: None)


def test_a_lost_real_image_is_one_clear_error(run, tmp_path):
    folder, config = run
    (folder / "images" / "reference" / "3.png").unlink()
    with pytest.raises((ValueError, OSError), match=r"reference/3\.png"):
        judge_run(folder, tmp_path / "judged", {"features": Features()}, config, log=lambda _: None)


def test_flow_losses_are_averaged_over_prompts_by_timestep_and_a_damaged_file_is_named(run):
    folder, config = run
    prompts = catalog.prompts(config.model_copy(update={"prompts_file": config.prompts_file}))
    for seed in (0, 1):
        for index in range(20):
            path = folder / "images" / f"seed{seed}" / f"{index:05d}" / flow_loss.FILE
            path.write_text(json.dumps({"0.1": index, "0.9": 2.0 + seed}))
    low, high = flow_loss.read(folder / "images", prompts, (0, 1))
    assert (low.timestep, low.loss, low.prompts) == (0.1, 9.5, 20) and low.standard_error > 1
    assert (high.loss, high.standard_error) == (2.5, 0.0)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"seed1/00019/flow_loss.json is not a file of losses"):
        flow_loss.read(folder / "images", prompts, (0, 1))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "absent.png"])
def test_a_real_image_must_lie_below_the_file_of_captions(tmp_path, name):
    (tmp_path / "given").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a file below"):
        copy_references([{"id": "0", "reference": {"file": name}}], tmp_path / "given", tmp_path / "images")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": "x"}', "line 1: needs 'prompt' and 'reference'"), ("{", "line 1: not JSON"), ("", "has 0 captions")],
)
def test_a_file_of_captions_without_images_is_refused(tmp_path, line, message):
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        CAPTIONS.prompts(tmp_path / "captions.jsonl")
