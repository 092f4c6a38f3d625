"""Encoding reads ahead of the model within bounds: of images, of their pixels and of the bytes of their files."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from PIL import Image

from tasks.encoding import images
from tasks.encoding.buckets import Bucket


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "bounds",
    [{"AHEAD": 4}, {"AHEAD_PIXELS": 3 * 64 * 64}, {"AHEAD_BYTES": 3 * len(png())}],
    ids=lambda b: next(iter(b)),
)
def test_files_are_read_ahead_within_each_bound(monkeypatch, bounds):
    for name, value in bounds.items():
        monkeypatch.setattr(images, name, value)
    taken = 0

    def records(*_):
        nonlocal taken
        for row in range(20):
            taken += 1
            yield row, SimpleNamespace(data=png())

    rows = {row: (Bucket(64, 64), 64 * 64) for row in range(20)}
    curated = SimpleNamespace(images=records)
    for done, (row, pixels) in enumerate(images.read_images(curated, None, rows, pytest.fail)):
        assert row == done and pixels.shape == (64, 64, 3)
        assert taken <= done + 4
    assert done == 19
