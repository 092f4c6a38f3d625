"""Homes for runs of workflows: one with a whole run of the smoke recipe, and new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_home import Home


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def smoke(smoke_home) -> dict[str, Path]:
    """Paths of the outputs of one smoke reproduction."""
    return Home.outputs(smoke_home.run("--recipe", "smoke"))


@pytest.fixture
def new_home(tmp_path) -> Home:
    return Home(tmp_path / "home")
