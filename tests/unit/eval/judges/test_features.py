"""Feature extractors and image-text similarity: small random instances of the libraries' classes, by their definition."""

import numpy as np
import pytest
from PIL import Image
from tiny_judges import make_dinov2, picture

from eval.judges.clip_similarity import CLIPSimilarity
from eval.judges.features import DINOv2, rounded
from eval.judging.protocols import Request


@pytest.fixture(scope="module")
def dinov2():
    return make_dinov2()


def test_a_small_dinov2_gives_the_class_token_whatever_else_is_asked(dinov2):
    import torch

    judge = DINOv2.of(*dinov2, "random")
    one, other = Request([picture()], ""), Request([picture(seed=1)], "")
    (first, second), (again,) = judge.answer([one, other]), judge.answer([one])
    assert len(first) == 32 and first == again != second
    pixels = dinov2[1](images=[picture()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = dinov2[0](pixel_values=pixels).last_hidden_state[0, 0]
    assert np.allclose(first, expected, rtol=1e-3, atol=1e-4)


def test_several_tiles_have_the_distances_of_their_pairs_without_the_black_ones(dinov2):
    judge = DINOv2.of(*dinov2, "random")
    tiles = [picture(seed=i) for i in range(3)]
    black = Image.new("RGB", tiles[0].size)
    vectors = np.array([judge.features(tile) for tile in tiles])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [1 - units[i] @ units[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    (actual,) = judge.answer([Request([tiles[0], black, *tiles[1:]], "")])
    assert np.allclose(actual, expected, atol=1e-4)
    assert judge.answer([Request([tiles[0], black], "")]) == [[]]


def test_a_small_clip_gives_a_cosine_that_depends_on_image_and_caption(clip):
    judge = CLIPSimilarity.of(*clip, "random")
    requests = [Request([picture(seed=i)], text) for i in (0, 1) for text in ("a red circle", "a cat, é 猫")]
    answers = judge.answer(requests)
    assert all(0 <= answer <= 1 for answer in answers) and answers == judge.answer(requests)
    assert len({round(judge_cosine(clip, r), 6) for r in requests}) == 4
    for request, answer in zip(requests, answers, strict=True):
        assert answer == pytest.approx(max(0.0, judge_cosine(clip, request)), abs=1e-5)
    assert judge.answer([Request([picture()], "word " * 200)])  # longer than CLIP's 77 tokens


def judge_cosine(clip, request):
    """Computed by the model's own forward pass."""
    import torch

    model, tokenizer, processor = clip
    inputs = tokenizer([request.text], return_tensors="pt") | {
        "pixel_values": processor(images=list(request.images), return_tensors="pt")["pixel_values"]
    }
    with torch.no_grad():
        output = model(**inputs)
    return float((output.image_embeds * output.text_embeds).sum())


def test_features_keep_five_digits():
    assert rounded([0.123456789, -1234567.0, 0.0]) == [0.12346, -1234600.0, 0.0]


def test_a_feature_extractor_fails_its_selftest_with_other_weights(dinov2, tmp_path, monkeypatch):
    import copy

    from eval.judges import base

    judge = DINOv2.of(*dinov2, "random")
    monkeypatch.setattr(base, "RECORDS", tmp_path)
    judge.record(tmp_path)
    judge.selftest()
    changed = copy.deepcopy(dinov2[0])
    for parameter in changed.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(ValueError, match="fails its self-test"):
        DINOv2.of(changed, dinov2[1], "random").selftest()
