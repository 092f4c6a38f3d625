"""Every judge with weights from the Hub or a release, as a small random instance of its class, from images to a
scorecard: it answers differently about different images or questions.

Judges whose weights packages carry are run with those weights: tests/integration/real_data/test_real_judges.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from importlib.util import find_spec

import official_data
import pytest
from PIL import Image
from tiny_judges import AlwaysYes, make_blip, make_dinov2, make_llama, make_llm2clip, make_style, picture
from tiny_packages import load_dreamsim, load_mplug, write_dreamsim, write_mplug

from eval import catalog
from eval.benchmarks.geneval import CLASSES
from eval.config import EvalConfig
from eval.generation.generate import copy_references, generate
from eval.judges.base import BaseJudge
from eval.judges.blip_vqa import BlipVQA
from eval.judges.clip_color import CLIPColor, CLIPColors
from eval.judges.clip_similarity import CLIPSimilarity
from eval.judges.dreamsim import DreamSim
from eval.judges.features import DINOv2
from eval.judges.mask2former import Mask2Former, Mask2FormerCLIP
from eval.judges.mplug import MPlug
from eval.judges.qwen_vl import Qwen3VL, Qwen25VL, Qwen25VLYesNo
from eval.judges.registry import JUDGES
from eval.judging.answers import Answers
from eval.judging.run import read_rows
from eval.scorecard import rescore
from eval.scorecards.card import load

WITH_WEIGHTS = {"shapes-detector", "ssd-mobilenet-v2", "xkcd-color", "pp-ocr", "efficientnet-lite0"}
CPU_SECONDS = 60


def scored(name, prompts_file, judges, folder):
    """The scorecard of two images of each prompt."""
    config = EvalConfig(benchmark=name, prompts_file=str(prompts_file), seeds=(0,), images_per_prompt=2, image_size_px=48)  # fmt: skip
    prompts = catalog.prompts(config)

    tints = itertools.cycle(("red", "white", "blue", "black", "yellow", "lime"))

    def tinted_noise(texts, seeds, height, width):
        return [
            Image.blend(Image.new("RGB", (width, height), next(tints)), picture(width, height, s), 0.3) for s in seeds
        ]

    generate(tinted_noise, prompts, config, folder, log=lambda _: None)
    copy_references(prompts, prompts_file.parent, folder / "images")
    card = rescore(folder, folder / "scored", config, judges=judges, log=lambda _: None)
    assert load(folder / "scored").model_dump(mode="json") == card
    assert card["counts"]["scored"] == card["counts"]["expected"] == 2 * len(prompts) and card["counts"]["failed"] == 0
    assert {(judge["role"], judge["name"]) for judge in card["settings"]["judges"]} == {
        (skill, judge.name) for skill, judge in judges.items()
    }
    assert all(row["answers"] not in ("", "{}") for row in read_rows(folder / "scored" / "scores.parquet"))
    assert (folder / "scored" / "scorecard.html").stat().st_size > 10_000
    return card


def skills_that_tell_inputs_apart(folder):
    """The skills whose answers to the questions of a run, about pictures of other colours and noise, are not all the
    same."""
    answers, by_skill = Answers(folder / "scored" / "judged"), {}
    for key in answers:
        skill = key[1].partition(":")[0].removesuffix(" of all")
        colors = answers[key] if skill == "color" else [answers[key]]
        by_skill.setdefault(skill, set()).update(json.dumps(answer) for answer in colors)
    return {skill for skill, values in by_skill.items() if len(values) > 1}


def test_a_judge_that_does_not_look_at_its_input_tells_nothing_apart(tmp_path):
    scored("dpg", official_data.write_dpg(tmp_path), {"vqa": AlwaysYes()}, tmp_path / "run")
    assert skills_that_tell_inputs_apart(tmp_path / "run") == set()


@pytest.mark.slow
def test_every_class_of_judge_makes_a_scorecard_within_a_minute_of_a_cpu(
    mask2former, clip, qwen25, qwen3, bytes_tokenizer, tmp_path, monkeypatch
):
    for package in ("modelscope", "dreamsim"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed (no-deps.txt)")
    import torch

    begin = time.process_time()
    monkeypatch.setattr(BaseJudge, "selftest", lambda self: None)  # random weights cannot pass it
    monkeypatch.setattr(CLIPColors, "load", lambda at=None: (CLIPColors(*clip[:2]), {"weights": "tiny"}))
    folders = {name: tmp_path / name for name in ("mplug", "dreamsim", "data", "oneig", "captions")}
    for folder in folders.values():
        if folder.name != "captions":
            folder.mkdir()
    data = folders["data"]

    sees_cars = copy.deepcopy(mask2former)  # so that there are objects whose colours the rule asks about
    blip, *blips = make_blip(bytes_tokenizer)
    with torch.no_grad():
        sees_cars.class_predictor.bias[CLASSES.index("car")] += 10
        for parameter in blip.parameters():  # with small weights its answer is always the same
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    detector = Mask2FormerCLIP.of(Mask2Former(sees_cars, short=64, long=107), CLIPColors(*clip[:2]), "tiny")
    mplug = MPlug.of(load_mplug(write_mplug(folders["mplug"])), "tiny")
    qwen = Qwen25VL.of(*qwen25, "tiny")
    oneig = {
        "vqa": qwen,
        "ocr": qwen,
        "reasoning": make_llm2clip(make_llama(bytes_tokenizer), bytes_tokenizer, clip),
        "style": make_style(("line_art",)),
        "diversity": DreamSim.of(load_dreamsim(write_dreamsim(folders["dreamsim"])), "tiny"),
    }
    geneval, dpg = official_data.write_geneval(data), official_data.write_dpg(data)
    real = official_data.write_captions(folders["captions"], [picture(48, 48, seed=100 + i) for i in range(16)])
    runs = [
        ("geneval", geneval, {"detector": detector, "color": detector}),
        ("geneval", geneval, {"detector": detector, "color": CLIPColor()}),
        ("geneval2", official_data.write_geneval2(data), {"soft_tifa": Qwen3VL.of(*qwen3, "tiny")}),
        ("dpg", dpg, {"vqa": mplug}),
        ("dpg", dpg, {"vqa": BlipVQA.of(blip, *blips, "tiny")}),
        ("dpg", dpg, {"vqa": Qwen25VLYesNo.of(*qwen25, "tiny")}),
        ("oneig", official_data.write_oneig(folders["oneig"]), oneig),
        ("captions", real, {"features": DINOv2.of(*make_dinov2(), "tiny"), "similarity": CLIPSimilarity.of(*clip, "tiny")}),
    ]  # fmt: skip
    cards = [scored(name, file, judges, tmp_path / f"run{i}") for i, (name, file, judges) in enumerate(runs)]
    alike = {
        f"{name}, {judge.name}: {skill}"
        for i, (name, _, judges) in enumerate(runs)
        for skill, judge in judges.items()
        if skill not in skills_that_tell_inputs_apart(tmp_path / f"run{i}")
    }
    assert not alike, "skills that answer alike about all inputs"
    seconds = time.process_time() - begin
    print(f"{len(runs)} scorecards by all classes of judges: {seconds:.1f} CPU seconds")
    assert set(cards[6]["official"]["categories"]) == {"alignment", "text", "reasoning", "style", "diversity"}
    assert {judge.name for _, _, judges in runs for judge in judges.values()} == set(JUDGES) - WITH_WEIGHTS
    assert seconds < CPU_SECONDS
