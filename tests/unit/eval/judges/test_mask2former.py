"""Mask2Former with mmdet's rules, against the formula written out in NumPy; CLIP's colours with its masks."""

import numpy as np
import pytest
from PIL import Image
from tiny_judges import picture

from eval.benchmarks.geneval import CLASSES
from eval.judges.clip_color import CLIPColors
from eval.judges.mask2former import Mask2Former, Mask2FormerCLIP, postprocess, preprocess, resized
from eval.judging.protocols import Request


def bilinear(x, size):
    """[..., h, w] to `size`, half-pixel centres, no antialiasing: OpenCV's and mmdet's rule."""
    for axis, (old, new) in enumerate(zip(x.shape[-2:], size)):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, old - 1), at - low
        a, b = np.take(x, low, axis=axis - 2), np.take(x, high, axis=axis - 2)
        share = share[:, None] if axis == 0 else share
        x = a * (1 - share) + b * share
    return x


def by_formula(class_logits, mask_logits, padded, size, original, top):
    """mmdet's instance_postprocess: [(label, score, box)] in order of the score."""
    e = np.exp(class_logits - class_logits.max(1, keepdims=True))
    scores = (e / e.sum(1, keepdims=True))[:, :-1]
    classes = scores.shape[1]
    result = []
    for flat in np.argsort(-scores.ravel(), kind="stable")[:top]:
        mask = bilinear(bilinear(mask_logits[flat // classes], padded)[: size[0], : size[1]], original)
        binary = mask > 0
        score = scores.ravel()[flat] * ((1 / (1 + np.exp(-mask))) * binary).sum() / (binary.sum() + 1e-6)
        ys, xs = np.nonzero(binary)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
        result.append((flat % classes, score, box))
    return sorted(result, key=lambda d: -d[1])


def test_the_best_pairs_of_query_and_class_are_mmdets():
    import torch

    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 9)) * 3
    masks = rng.normal(size=(6, 8, 12)) * 2
    masks[2] = -1  # a query without any pixel
    shapes = (32, 64), (30, 50), (57, 91)
    ours = postprocess(torch.from_numpy(logits), torch.from_numpy(masks), *shapes, top=20)
    theirs = by_formula(logits, masks, *shapes, top=20)
    assert [d.label for d in ours] == [label for label, _, _ in theirs]
    assert [d.score for d in ours] == pytest.approx([score for _, score, _ in theirs], abs=1e-9)
    assert [d.box for d in ours] == [tuple(map(float, box)) for _, _, box in theirs]
    assert len({(d.label, d.box) for d in ours}) > 6, "a query may have several classes"
    assert all(d.mask.shape == (57, 91) for d in ours)


def test_one_pixel_has_a_box_one_pixel_wide():
    import torch

    masks = torch.full((1, 4, 4), -50.0)
    masks[0, 2, 1] = 50.0
    (best,) = postprocess(torch.tensor([[5.0, 0.0]]), masks, (4, 4), (4, 4), (4, 4))
    assert best.box == (1.0, 2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 512), (800, 800)), ((640, 480), (800, 1067)), ((3000, 1000), (444, 1333)), ((90, 120), (1067, 800))]
)  # fmt: skip
def test_images_are_resized_within_800_and_1333_pixels(size, expected):
    assert resized(*size) == expected


def test_the_input_is_padded_right_and_below_with_the_normalised_zero():
    import torch

    pixels, size = preprocess(picture(60, 40), short=50, long=80)
    assert size == (50, 75) and pixels.shape == (1, 3, 64, 96)
    assert not pixels[..., 50:, :].any() and not pixels[..., 75:].any() and pixels[..., :50, :75].abs().min() > 0
    expected = bilinear(np.asarray(picture(60, 40), dtype=np.float64).transpose(2, 0, 1), size).round()
    values = pixels[0, :, :50, :75] * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    values += torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    assert np.abs(values.numpy() - expected).max() <= 1.01  # halves may round either way


@pytest.fixture(scope="module")
def judge(mask2former, clip):
    return Mask2FormerCLIP.of(Mask2Former(mask2former, short=64, long=107), CLIPColors(*clip[:2]), "sha256:tiny")


def test_a_small_random_judge_answers_both_roles_end_to_end(judge):
    image = picture()
    (objects,) = judge.answer([Request([image], "")])
    assert set(objects) <= set(CLASSES) and sum(map(len, objects.values())) == 100
    for result in objects.values():
        scores = [d["score"] for d in result]
        assert scores == sorted(scores, reverse=True) and 0 < min(scores) and max(scores) < 1
        assert all(0 <= x0 <= x1 <= 96 and 0 <= y0 <= y1 <= 80 for x0, y0, x1, y1 in (d["box"] for d in result))
    name, result = next((n, f) for n, f in objects.items() if f[0]["box"][2] > 0)
    (colors,) = judge.answer([Request([image], "", {"class": name, "boxes": [result[0]["box"]], "indices": [0]})])
    assert len(colors) == 1


def test_colours_are_those_of_the_masked_object(judge, monkeypatch):
    image = picture(seed=3)
    name, result = next((n, f) for n, f in judge._detector.detect(image).items() if f[0].mask.any())
    seen = {}
    monkeypatch.setattr(CLIPColors, "colors", lambda self, *args: seen.update(masks=args[3]) or ["red"])
    options = {"class": name, "boxes": [list(result[0].box)], "indices": [0]}
    assert judge.answer([Request([image], "", options)]) == [["red"]]
    assert np.array_equal(seen["masks"][0], result[0].mask)


def test_boxes_of_another_detector_are_refused(judge):
    with pytest.raises(ValueError, match="not this judge's detections"):
        judge.answer([Request([picture()], "", {"class": "cat", "boxes": [[1.5, 2, 3, 4]], "indices": [0]})])


def test_a_detector_of_other_classes_is_refused(mask2former):
    class Other:
        config = type("C", (), {"num_labels": 133})
        eval = lambda self: self  # noqa: E731

    with pytest.raises(ValueError, match="133 classes, and GenEval needs 80"):
        Mask2Former(Other())


def test_the_colour_is_that_of_the_nearest_text(clip):
    """By CLIP's definition, with the embeddings computed here."""
    import torch

    from eval.geneval import COLORS

    model, tokenizer, processor = clip
    image = picture(64, 64, seed=5)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    rows = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        with torch.no_grad():
            embeddings = [
                model.text_projection(model.text_model(**tokenizer([t], return_tensors="pt")).pooler_output)[0]
                for t in texts
            ]
        rows.append(unit(sum(unit(e) for e in embeddings) / 3))
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:30, 5:40] = True
    grey = np.where(mask[..., None], np.asarray(image), 0x99).astype(np.uint8)
    crop = Image.fromarray(grey).crop((5, 10, 40, 30))
    with torch.no_grad():
        pixels = processor(images=[crop], return_tensors="pt")["pixel_values"]
        feature = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
    expected = COLORS[int((torch.stack(rows) @ feature).argmax())]
    judge = CLIPColors(*clip[:2])
    assert judge.colors(image, "dog", [[5.0, 10.0, 40.0, 30.0]], [mask]) == [expected]
    assert torch.allclose(judge._classifier("dog"), torch.stack(rows), atol=1e-6)
