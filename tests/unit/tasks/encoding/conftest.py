"""A small curated directory of rendered scenes, and components trained on it for some steps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.curation.shards import Record, ShardWriter
from tasks.curation.sources.made import scenes
from tasks.encoding.config import ComponentsConfig, TinyTextEncoderConfig, TinyVAEConfig


def write_curated(out: Path, count: int, seed: int = 0, aspects: tuple[float, ...] = (1.0, 4 / 3)) -> pd.DataFrame:
    """Scenes of 64 px in two shards; every seventh record is held out."""
    rng = np.random.default_rng(seed)
    rows = []
    for shard in range(2):
        with ShardWriter(out / f"shards/{shard:05d}.tar") as writer:
            for i in range(count // 2):
                scene = scenes.sample_scene(rng, size_px=64, aspect=aspects[i % len(aspects)])
                image = scenes.render(scene)
                data = io.BytesIO()
                image.save(data, "PNG")
                sidecar = {"captions": scenes.captions(scene, rng)[:3], "source": "scenes", "meta": {}}
                record = Record(f"scene-{shard}-{i:03d}", data.getvalue(), sidecar, "png")
                writer.add(record)
                split = "val" if i % 7 == 0 else "train"
                rows.append(
                    record.row(shard) | {"width": image.width, "height": image.height, "tier": "A2", "split": split}
                )
    table = pd.DataFrame(rows)
    table.to_parquet(out / "records.parquet")
    return table


@pytest.fixture(scope="session")
def curated_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    write_curated(out, 120)
    return out


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
def components(curated_dir, small_config, tmp_path_factory) -> tuple[Path, dict]:
    """(components directory, its report)."""
    from tasks.encoding.components import make_components

    out = tmp_path_factory.mktemp("components")
    return out, make_components(curated_dir, small_config, out)
