"""The index of a node: private memory and opening time do not grow with the corpus, and neither does the order's work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[4]


def measure(folder: Path, images: int) -> dict:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "latent_index.py",
        "--images",
        str(images),
        "--folder",
        str(folder),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_large_index_opens_at_once_and_takes_no_more_private_memory_than_a_small_one(tmp_path):
    small, large = (measure(tmp_path / str(images), images) for images in (10_000, 2_000_000))
    assert large["open_s"] < 2
    assert large["private_mb"] - small["private_mb"] < 30  # of 90 MB of columns
    assert large["file_mb"] > 60


@pytest.mark.parametrize("weights", [None, {"A1": 4.0, "A2": 2.0, "A3": 1.0}])
def test_the_order_depends_only_on_the_counts(tmp_path, weights):
    """Draws by offsets: each row is of the bucket and of a tier with a weight; ranks and attempts have no effect."""
    from benchmarks.latent_index import write_synthetic
    from model.data.latents import LatentDataset
    from model.data.order import SampleOrder

    write_synthetic(tmp_path / "index", 30_000)
    dataset = LatentDataset(tmp_path / "index")
    order = SampleOrder(dataset, 64, 5, weights, 0.1)
    tiers = np.asarray(dataset.tier)
    for step in (0, 7, 5000, 10**7):
        plan = order.batch(step)
        assert {dataset.bucket_names[code] for code in dataset.bucket_of(plan.rows)} == {plan.bucket}
        if weights:
            assert {dataset.tier_names[code] for code in tiers[plan.rows]} <= set(weights)
        again = SampleOrder(dataset, 64, 5, weights, 0.1).batch(step)
        assert np.array_equal(plan.rows, again.rows) and np.array_equal(plan.text_rows, again.text_rows)
