import numpy as np
import pytest
from sklearn.datasets import load_digits

from tasks.curation.config import SourceConfig
from tasks.curation.sources.made import digits, registry


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


def test_the_order_of_scans_is_a_permutation_that_follows_the_seed():
    assert digits.order(1)[:50] != digits.order(2)[:50]
    assert sorted(digits.order(3)) == list(range(1797))


def test_more_digits_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"source\.made\.digits=1798: there are 1797 records"):
        registry.check_made(SourceConfig(made={"digits": 1798}))
