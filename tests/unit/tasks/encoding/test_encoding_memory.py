"""The memory of encoding is bounded by a shard, not by the corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from selected import scenes, select

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.config import StageConfig
from tasks.encoding import flow
from tasks.encoding.config import EncodingConfig
from tasks.encoding.open_latents import open_latents
from tasks.manifest import seal
from tasks.store import LOCATIONS

curated, components, out = map(Path, sys.argv[1:4])
config = EncodingConfig(batch_size=8)
stage = StageConfig(name="s", image_size_px=64, steps=10**6, batch_size=8, capacity_factors=2.0, aspect_ratios=("1:1", "4:3"))
for kind in ("texts", "latents"):
    group, index = out / f"{kind}-group", out / kind
    group.mkdir(parents=True)
    index.mkdir()
    if kind == "texts":
        flow.encode_texts_group(curated, components, config, 0, 1, group)
    else:
        flow.encode_latents_group(curated, components, stage, {f"A{i}": 1.0 for i in range(1, 6)}, config, 0, 1, group)
    flow.gather(curated, [group], kind, index)
    seal(index, kind, logs=(LOCATIONS,))
open_latents(out / "latents", out / "texts")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_is_the_same_for_2_and_for_40_shards(components, tmp_path):
    shard = [(image.resize((512, 512)), *rest) for image, *rest in scenes(5, 3)]
    peaks = []
    for shards in (2, 40):
        folder = tmp_path / str(shards)
        curated = select(folder / "source", [shard] * shards, folder / "curated")
        command = [sys.executable, "-c", SCRIPT, str(curated), str(components[0]), str(folder / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40, f"{peaks} MiB"  # the decoded images of 38 shards are 140 MiB
