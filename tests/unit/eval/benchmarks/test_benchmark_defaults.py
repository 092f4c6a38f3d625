"""What a benchmark has that sets a name, judges and the score of an image, and nothing else."""

from __future__ import annotations

import pytest

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark, Judged


class Plain(Benchmark):
    name, texts, judges = "plain", ("one", "two", "three"), {"vqa": "", "ocr": ""}

    def score_image(self, prompt, answers):
        return answers["vqa"], "" if answers["vqa"] == 1 else "no"


def judged(*images):
    return Judged([None if score is None else {"vqa": score, "ocr": ""} for score in images])


def test_prompts_are_its_texts_or_the_lines_of_a_file(tmp_path):
    assert [(p["id"], p["prompt"], p["tag"]) for p in Plain().prompts()] == [
        ("00000", "one", "plain"), ("00001", "two", "plain"), ("00002", "three", "plain"),
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "four", "tag": "a", "more": 1}\n\n{"prompt": "five", "id": "mine"}\n')
    assert Plain().prompts(path) == [
        {"id": "00000", "prompt": "four", "tag": "a", "more": 1}, {"id": "mine", "prompt": "five", "tag": "plain"},
    ]  # fmt: skip
    path.write_text('{"prompt": "four"}\n{"text": "five"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: must be a JSON object with a text 'prompt'"):
        Plain().prompts(path)
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        Plain().prompts(tmp_path / "absent.jsonl")


def test_each_judge_is_asked_once_with_the_text_of_the_prompt():
    (prompt, *_) = Plain().prompts()
    asked = Plain().questions(prompt, {})
    assert [(q.judge, q.key, q.text) for q in asked] == [("vqa", "vqa", "one"), ("ocr", "ocr", "one")]
    assert [q.judge for q in Plain().questions(prompt, {"vqa": 1.0})] == ["ocr"]
    assert Plain().questions(prompt, {"vqa": 1.0, "ocr": ""}) == []


def test_images_of_a_prompt_have_names_of_their_own():
    prompts = Plain().prompts()
    names = {Plain().picture_path(prompt, image, "m") for prompt in prompts for image in range(4)}
    assert len(names) == 12


def test_a_prompts_score_is_the_mean_of_its_judged_images():
    scored = Plain().score(Plain().prompts()[0], judged(1.0, None, 0.5))
    assert (scored.score, scored.images, scored.reasons) == (0.75, (1.0, None, 0.5), ("", "not judged", "no"))
    assert Plain().score(Plain().prompts()[0], judged(None)).score is None


@pytest.mark.parametrize(
    ("pooling", "mode", "score"),
    # a: prompts of (1 + 0) / 2 and 1; b: one of 1, whose other image is missing
    [("prompts", "official", 250 / 3), ("prompts", "fixed", 200 / 3), ("categories", "official", 87.5), ("categories", "fixed", 62.5)],
)  # fmt: skip
def test_a_summary_is_the_mean_over_prompts_or_categories_and_a_missing_image_is_left_out_or_wrong(
    pooling, mode, score
):
    class Pooled(Plain):
        pass

    Pooled.pooling, Pooled.scale, Pooled.tasks = pooling, 100.0, ("b", "a")
    prompts = [{"id": key, "prompt": "p", "tag": tag} for key, tag in (("0", "a"), ("1", "a"), ("2", "b"))]
    summary = Pooled().summarise(prompts, {"0": judged(1.0, 0.0), "1": judged(1.0, 1.0), "2": judged(None, 1.0)}, mode)
    assert summary["score"] == pytest.approx(score)
    assert summary["categories"] == {"b": 100.0 if mode == "official" else 50.0, "a": 75.0}
    assert list(summary["categories"]) == ["b", "a"]
    assert (summary["expected"], summary["scored"], summary["failed"]) == (6, 5, 1)


def test_a_summary_of_nothing_or_of_unknown_prompts_is_refused():
    prompts = Plain().prompts()
    with pytest.raises(ValueError, match="none of 6 images was judged"):
        Plain().summarise(prompts, {"00000": judged(None, None)}, "fixed")
    with pytest.raises(ValueError, match="answers to 1 unknown prompts, such as 'x'"):
        Plain().summarise(prompts, {"x": judged(1.0)}, "fixed")


class Unscored(Benchmark):
    name, judges = "unscored", {"vqa": ""}


class OfParts(Plain):
    pooling = "parts"


@pytest.mark.parametrize("target, message", [
    ("Unscored", "Unscored must have score_image"),
    ("OfParts", "pooling='parts', for which it must have its own summarise"),
    ("judged", "is a function, not a subclass of eval.benchmarks.base.Benchmark"),
])  # fmt: skip
def test_an_incomplete_benchmark_is_refused_when_it_is_loaded(target, message):
    with pytest.raises(ValueError, match=message):
        registry.load(f"{__name__}:{target}")
