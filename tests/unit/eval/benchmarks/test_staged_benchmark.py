"""Benchmarks with scores between right and wrong, with questions that depend on answers, or about all images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.base import Benchmark, Question, Scored
from eval.config import EvalConfig
from eval.generation.generate import generate
from eval.judging.images import open_png
from eval.judging.protocols import digest_of
from eval.judging.run import read_rows
from eval.scorecard import evaluate, judge_run, rescore


def quiet(_):
    pass


class Staged(Benchmark):
    """Two rounds of questions, one question about all images, and scores between 0 and 1."""

    name, version, scale, tasks, images_per_prompt, grid, data = "staged", "1", 100.0, ("a",), 2, None, ""
    prompt_count = 6
    judges = {"vqa": "m"}

    def prompts(self, path=None):
        return [{"id": f"p{i}", "prompt": f"prompt {i}", "tag": "a"} for i in range(6)]

    def questions(self, prompt, answers):
        if "first" not in answers:
            return [Question("vqa", "first", "a number?")]
        asked = [Question("vqa", "second", f"after {answers['first']}"), Question("vqa", "all", together=True)]
        return [q for q in asked if q.key not in answers]

    def score(self, prompt, judged):
        images = tuple(None if a is None else a["first"] * a["second"] for a in judged.images)
        return Scored(None, images, ("",) * len(images), {"together": judged.together["all"]})

    def summarise(self, prompts, judged, mode):
        values = [v for p in prompts for v in self.score(p, judged[p["id"]]).images]
        score = 100 * sum(values) / len(values)
        return {"score": score - 5 * (mode == "official"), "categories": {"a": score - 5 * (mode == "official")}}


STAGED = Staged()


class Teller:
    name, model, spec, revision = "teller", "m", {}, digest_of("teller")

    def __init__(self):
        self.asked = 0

    def answer(self, requests):
        self.asked += len(requests)
        values = [np.asarray(r.images[0]).mean() / 255 for r in requests]
        return [len(r.images) / 4 if len(r.images) > 1 else v for v, r in zip(values, requests, strict=True)]

    def selftest(self):
        pass


def test_judges_of_oneig_see_images_through_jpeg_and_others_do_not(tmp_path, monkeypatch):
    shown = []

    class Looking(Teller):
        def answer(self, requests):
            shown.extend(request.images[0] for request in requests)
            return super().answer(requests)

    def sampler(prompts, seeds, height, width):
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return [Image.fromarray(noise)] * len(prompts)

    config = EvalConfig(benchmark="test_staged_benchmark:STAGED", seeds=(0,), images_per_prompt=2, image_size_px=8)
    monkeypatch.setitem(sys.modules, "test_staged_benchmark", sys.modules[__name__])
    generate(sampler, STAGED.prompts(), config, tmp_path, log=quiet)
    for jpeg in (False, True):
        monkeypatch.setattr(Staged, "jpeg_tiles", jpeg)
        judge_run(tmp_path, tmp_path / f"judged{jpeg}", {"vqa": Looking()}, config, log=quiet)
    original = np.asarray(open_png(tmp_path / "images/seed0/00000/samples/0000.png"))
    assert np.array_equal(np.asarray(shown[0]), original)
    assert shown[-1].format == "JPEG" and np.abs(np.asarray(shown[-1]).astype(int) - original).max() > 10


@pytest.mark.parametrize("pooling", ["prompts", "parts"])
def test_any_benchmark_is_judged_in_rounds_and_scored_with_floats(tmp_path, monkeypatch, pooling):
    monkeypatch.setattr(Staged, "pooling", pooling)
    config = EvalConfig(benchmark="test_staged_benchmark:STAGED", seeds=(0, 1), images_per_prompt=2, image_size_px=8)
    monkeypatch.setitem(sys.modules, "test_staged_benchmark", sys.modules[__name__])

    def sampler(prompts, seeds, height, width):
        return [Image.new("RGB", (8, 8), (seed % 256,) * 3) for seed in seeds]

    judge = Teller()
    card = evaluate(sampler, config, tmp_path, prompts=STAGED.prompts(), judges={"vqa": judge}, log=quiet)
    assert card["name"] == "staged" and card["pooling"] == pooling
    rows = read_rows(tmp_path / "scores.parquet")
    assert {round(row["score"], 9) for row in rows} == {
        round((np.asarray(open_png(tmp_path / "images" / row["file"])).mean() / 255) ** 2, 9) for row in rows
    }
    if pooling == "parts":
        assert card["overall"]["mean"] == 0.5 and set(card["tasks"]) == {"together"}
    else:
        assert card["overall"]["mean"] * 100 == pytest.approx(card["fixed"]["overall"])
        assert card["official"]["overall"] == pytest.approx(card["fixed"]["overall"] - 5)
        page = (tmp_path / "scorecard.html").read_text()
        assert '<th class="n">official</th><th class="n">fixed</th>' in page.replace("<th class=n>", '<th class="n">')
    assert rescore(tmp_path, tmp_path / "again", config, judged=tmp_path / "judged", log=quiet) == card


# ---- References and training noise
