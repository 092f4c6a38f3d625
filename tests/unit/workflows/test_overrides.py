"""What the command line would lose in silence is refused."""

from __future__ import annotations

import importlib
import sys

import pytest
import rich_click as click

import workflows.reproduce


@pytest.mark.parametrize(
    "words",
    [
        ["--overrides", "a.b=1", "--overrides", "c.d=2"],
        ["--overrides=a.b=1", "--overrides=c.d=2"],
        ["--overrides", "a.b=1", "--overrides=c.d=2"],
    ],
)
def test_overrides_given_twice_are_refused_however_they_are_written(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["pyflyte", "run", "workflows/reproduce.py", "reproduce", *words])
    with pytest.raises(click.UsageError, match="give --overrides once"):
        importlib.reload(workflows.reproduce)


def test_overrides_given_once_are_not(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyflyte", "run", "reproduce", "--overrides=--overrides=1"])
    importlib.reload(workflows.reproduce)
    assert callable(workflows.reproduce.reproduce)
