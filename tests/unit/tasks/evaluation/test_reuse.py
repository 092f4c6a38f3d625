"""Images are sampled again only for another setting of sampling, and questions are asked again only about another image,
in other words or to another judge."""

from __future__ import annotations

import flytekit.core.local_cache
import pytest
from evaluated import local, run, sampled, scored_by
from PIL import Image

from eval import catalog
from eval.config import EvalConfig
from eval.generation import pipelines
from eval.judges.shapes_judge import ShapesDetector
from eval.judging.answers import Answers
from tasks.evaluation import task
from tasks.manifest import load_manifest
from tasks.store import home
from workflows.evaluate import score_merged

CONFIG = EvalConfig(prompts_per_task=1, seeds=(0,), image_size_px=32, batch_size=4)


@pytest.fixture
def number_sampled(monkeypatch):
    """The numbers of images of each call of the sampler; all images differ."""
    numbers = []

    def sample(prompts, seeds, height, width):
        numbers.append(len(prompts))
        return [
            Image.new("RGB", (width, height), tuple((seed >> shift) % 256 for shift in (0, 8, 16))) for seed in seeds
        ]

    monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_: sample)
    return numbers


@pytest.fixture
def number_asked(monkeypatch):
    """The numbers of questions of each call of a judge."""
    numbers, answer = [], ShapesDetector.answer

    def counted(self, requests):
        numbers.append(len(requests))
        return answer(self, requests)

    monkeypatch.setattr(ShapesDetector, "answer", counted)
    monkeypatch.setattr(ShapesDetector, "selftest", lambda self: None)
    return numbers


@pytest.fixture
def flyte_cache(tmp_path, monkeypatch):
    """Flyte's local cache, empty, in a folder of this test."""
    cache = flytekit.core.local_cache
    monkeypatch.setattr(cache, "CACHE_LOCATION", str(tmp_path / "flyte-cache"))
    cache.LocalTaskCache._initialized = False
    yield
    cache.LocalTaskCache._initialized = False


class Another(ShapesDetector):
    """The same detector at another revision."""

    def __init__(self):
        super().__init__()
        self.revision = "b" * 64


SCORING = [
    {"judges": {"detector": "shapes-detector"}},
    {"missing": "official"},
    {"further_benchmarks": ("geneval2",)},
    {"judge_batch_size": 7},
]


@pytest.mark.slow
def test_a_workflow_samples_no_image_again_when_only_scoring_changes(model, number_sampled, number_asked, flyte_cache):
    score_merged(**model, config=CONFIG)
    first, questions = sum(number_sampled), sum(number_asked)
    assert first and questions
    for changed in SCORING:
        score_merged(**model, config=CONFIG.model_copy(update=changed))
        assert (changed, sum(number_sampled), sum(number_asked)) == (changed, first, questions)
    score_merged(**model, config=CONFIG.model_copy(update={"guidance_scale": 2.0}))
    assert sum(number_sampled) == 2 * first


def test_a_further_seed_changes_no_input_or_output_of_the_parts_of_the_others(model, number_sampled):
    """On a cluster each part of a map task is cached for itself; Flyte's local cache knows a map task as a whole."""
    two = CONFIG.model_copy(update={"seeds": (0, 1)})
    plans = [run(task.plan_generation, config=config, parts_per_seed=1) for config in (CONFIG, two)]
    assert plans[0].config == plans[1].config and plans[0].parts == plans[1].parts[:1]
    (_, (one,)), (_, (same, other)) = sampled(model, CONFIG), sampled(model, two)
    digests = [load_manifest(local(images)).digest for images in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def judged(model, config):
    prompts, images = sampled(model, config)
    return run(task.judge_images, images=images, prompts=prompts, config=config)


@pytest.mark.slow
def test_a_question_is_asked_again_only_about_another_image_or_to_another_judge(
    model, number_sampled, number_asked, monkeypatch
):
    asked = judged(model, CONFIG)
    first = sum(number_asked)
    for changed in SCORING[1:]:
        reused = judged(model, CONFIG.model_copy(update=changed))
        assert (changed, sum(number_asked)) == (changed, first)
        assert load_manifest(local(reused)).digest == load_manifest(local(asked)).digest
    judged(model, CONFIG.model_copy(update={"seeds": (0, 1)}))
    assert sum(number_asked) == 2 * first
    more = judged(model, CONFIG.model_copy(update={"prompts_per_task": 2, "seeds": (0, 1)}))
    questions = len(Answers(local(more)))
    assert sum(number_asked) == questions > 2 * first
    monkeypatch.setattr(catalog, "judge", lambda _: Another())
    judged(model, CONFIG)
    assert sum(number_asked) == questions + first


@pytest.mark.slow
def test_the_digests_of_answers_and_scores_are_equal_whether_answers_were_asked_or_reused(
    model, number_sampled, number_asked, monkeypatch
):
    both = CONFIG.model_copy(update={"seeds": (0, 1)})
    scored_by(model, CONFIG)
    scored_by(model, CONFIG.model_copy(update={"seeds": (1, 2)}))
    before = sum(number_asked)
    reused = scored_by(model, both)
    assert sum(number_asked) == before
    monkeypatch.setenv("NUCLEUS_HOME", str(home().parent / "another home"))
    asked = scored_by(model, both)
    assert sum(number_asked) > before
    assert load_manifest(local(reused)).digest == load_manifest(local(asked)).digest


@pytest.mark.slow
def test_answers_of_a_judge_that_stopped_are_reused_by_a_run_with_other_settings(
    model, number_sampled, number_asked, monkeypatch
):
    answer = ShapesDetector.answer

    def stops(self, requests):
        if number_asked:
            raise RuntimeError("out of memory")
        return answer(self, requests)

    config = CONFIG.model_copy(update={"judge_batch_size": 4})
    with monkeypatch.context() as patch:
        patch.setattr(ShapesDetector, "answer", stops)
        with pytest.raises(ValueError, match="4 answers are kept"):
            judged(model, config)
    two = config.model_copy(update={"seeds": (0, 1), "judge_batch_size": 2})
    judged(model, two)
    kept = sum(number_asked)
    monkeypatch.setenv("NUCLEUS_HOME", str(home().parent / "another home"))
    judged(model, two)
    assert sum(number_asked) - kept == kept  # none of the four was asked again


def test_an_answer_about_an_image_is_not_reused_for_the_image_through_jpeg(
    model, number_sampled, number_asked, monkeypatch
):
    judged(model, CONFIG)
    first = sum(number_asked)
    monkeypatch.setattr(catalog.benchmark("shapes"), "jpeg_tiles", True, raising=False)
    judged(model, CONFIG)
    assert sum(number_asked) == 2 * first
