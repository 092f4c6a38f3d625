"""Weights of episodes and of caption lengths change how often a stage draws images and captions."""

import numpy as np
import pytest
import torch

from model.data.latents import LatentDataset, LatentWriter
from model.data.order import SampleOrder

EPISODES = ["people", "rest", "charts"]
TOKENS = [4, 12, 40]  # of the three captions of each image


def write(directory, episodes):
    with LatentWriter(directory, text_dim=4, latent_channels=4) as writer:
        writer.add_text(torch.zeros(1, 4))
        texts = [writer.add_text(torch.full((tokens, 4), float(tokens))) for tokens in TOKENS]
        for i in range(240):
            size = (8, 8) if i % 4 else (8, 16)
            writer.add_image(f"{i:064x}", torch.zeros(4, *size), f"A{1 + i % 2}", texts, episodes[i % len(episodes)])
    return LatentDataset(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several"), EPISODES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("one"), ["rest"])


def drawn(order, steps=200):
    plans = [order.batch(step) for step in range(steps)]
    return np.concatenate([plan.rows for plan in plans]), np.concatenate([plan.captions for plan in plans])


@pytest.mark.parametrize("tiers", [None, {"A1": 3.0, "A2": 1.0}])
def test_without_weights_of_episodes_and_lengths_the_same_images_are_drawn_in_the_same_order(dataset, plain, tiers):
    our_order, other_order = (SampleOrder(data, 8, 7, tiers, 0.1) for data in (dataset, plain))
    for step in range(40):
        ours, other = our_order.batch(step), other_order.batch(step)
        for name in ("rows", "captions", "text_rows", "noise_seeds"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(other, name))


def test_an_episode_is_drawn_in_proportion_to_its_weight_and_the_tiers(dataset):
    order = SampleOrder(dataset, 16, 0, {"A1": 2.0, "A2": 1.0}, episode_weights={"people": 4.0, "charts": 0.0})
    rows, _ = drawn(order, 400)
    ids = [int(record_id, 16) for record_id in dataset.record_ids(range(len(dataset)))]
    counts = np.bincount(rows, minlength=len(dataset))
    shares = {}
    for row, i in enumerate(ids):
        key = EPISODES[i % 3], f"A{1 + i % 2}"
        shares[key] = shares.get(key, 0) + counts[row] / len(rows)
    assert shares["charts", "A1"] == shares["charts", "A2"] == 0
    expected = {("people", "A1"): 8, ("people", "A2"): 4, ("rest", "A1"): 2, ("rest", "A2"): 1}
    for key, weight in expected.items():
        assert shares[key] == pytest.approx(weight / 15, abs=0.02), key


def test_captions_are_drawn_in_proportion_to_the_weight_of_their_length(dataset):
    weights = ((8, 1.0), (20, 0.0), (64, 3.0))
    _, captions = drawn(SampleOrder(dataset, 16, 0, caption_weights=weights), 150)
    shares = np.bincount(captions, minlength=3) / len(captions)
    assert shares[1] == 0
    assert shares[0] == pytest.approx(0.25, abs=0.02) and shares[2] == pytest.approx(0.75, abs=0.02)


def test_captions_without_any_weight_are_drawn_alike(dataset):
    _, captions = drawn(SampleOrder(dataset, 16, 0, caption_weights=((100, 0.0),)), 150)
    assert np.bincount(captions, minlength=3) / len(captions) == pytest.approx([1 / 3] * 3, abs=0.03)


def test_weights_that_leave_no_image_are_refused_with_the_groups_that_there_are(dataset):
    with pytest.raises(ValueError, match=r"episode weights .* leave no image: .*A1 in charts"):
        SampleOrder(dataset, 8, 0, episode_weights=dict.fromkeys(EPISODES, 0.0))
