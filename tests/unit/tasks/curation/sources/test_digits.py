import numpy as np
import pytest
from sklearn.datasets import load_digits

from tasks.curation.sources.made import digits


def test_a_digit_is_its_scan_enlarged_and_named():
    data = load_digits()
    for index in (0, 7, 1796):
        made = digits.digit(index, 64)
        assert made.image.size == (64, 64) and made.image.mode == "RGB"
        assert made.captions[0] == f"a photo of the handwritten digit {digits.WORDS[data.target[index]]}"
        assert made.label == data.target[index] and len(set(made.captions)) == 4
        # Averaging each 8 x 8 block gives the scan back: dark where there is ink.
        blocks = np.asarray(made.image.convert("L")).reshape(8, 8, 8, 8).mean((1, 3))
        assert np.corrcoef(255 - blocks.ravel(), data.images[index].ravel())[0, 1] > 0.97


def test_a_larger_choice_holds_a_smaller_one_and_follows_the_seed():
    assert digits.chosen(50, 1) == digits.chosen(100, 1)[:50] != digits.chosen(50, 2)
    assert sorted(digits.chosen(1797, 3)) == list(range(1797))


def test_more_digits_than_there_are_is_refused():
    with pytest.raises(ValueError, match="1797"):
        digits.chosen(1798, 0)
