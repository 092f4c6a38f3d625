"""A small curated corpus of rendered scenes in two shards, and components trained on it for some steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from selected import scenes, select

from tasks.encoding.config import ComponentsConfig, TinyTextEncoderConfig, TinyVAEConfig
from tasks.manifest import seal


@pytest.fixture(scope="session")
def curated_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _home(curated_home, monkeypatch):
    monkeypatch.setenv("NUCLEUS_HOME", str(curated_home))


@pytest.fixture(scope="session")
def curated_dir(tmp_path_factory, curated_home) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCLEUS_HOME", str(curated_home))
        out = tmp_path_factory.mktemp("curated")
        return select(out / "source", [scenes(60, 0), scenes(60, 1)], out / "curated")


@pytest.fixture(scope="session")
def small_config() -> ComponentsConfig:
    return ComponentsConfig(
        kind="trained",
        vae=TinyVAEConfig(base_dim=4, dim_mult=(1, 2, 2, 4), steps=25, batch_size=4, image_size_px=64),
        text_encoder=TinyTextEncoderConfig(
            hidden_size=48, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, steps=12, batch_size=8
        ),
        min_psnr_db=5.0,
    )


@pytest.fixture(scope="session")
def components(curated_dir, small_config, tmp_path_factory, curated_home) -> tuple[Path, dict]:
    """(components directory, its report)."""
    from tasks.encoding.components import make_components

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCLEUS_HOME", str(curated_home))
        out = tmp_path_factory.mktemp("components")
        report = make_components(curated_dir, small_config, out)
        seal(out, "components")
        return out, report
