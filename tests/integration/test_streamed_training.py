"""A stage of which each step reads its rows in an object store, by the training task, as Flyte hands it its inputs."""

from __future__ import annotations

import json

import pytest
import torch
from flytekit.types.directory import FlyteDirectory
from object_store import s3_bucket
from s3fs import S3FileSystem
from train_helpers import read_weights, train_config, training_stage, write_latents

from model import storage
from tasks.manifest import load_manifest, seal
from tasks.training.task import train_stage

STEPS = 4


pytestmark = pytest.mark.xfail(reason="written for latents and texts in one artifact, not yet for parts", strict=False)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Sealed latents in a bucket, its endpoint and keys given as Flyte gives them to a pod, and components here."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    with s3_bucket("store", as_flyte_tells=True) as fs:
        write_latents(tmp_path / "latents")
        (tmp_path / "components").mkdir()
        (tmp_path / "components" / "file").write_text("nothing is sampled")
        for kind in ("latents", "components"):
            seal(tmp_path / kind, kind)
        fs.put(str(tmp_path / "latents"), "store/latents", recursive=True)
        yield {"latents": "s3://store/latents", "components": str(tmp_path / "components")}


def train(inputs, tmp_path, **changes):
    """The weights of each checkpoint and the losses of a stage that started anew."""
    stage = training_stage(train_config(steps=STEPS, log_every_steps=1, **changes))
    given = {kind: FlyteDirectory.from_source(uri) for kind, uri in inputs.items()}
    artifact = train_stage.task_function(stage=stage, **given)
    metrics = [json.loads(line) for line in (tmp_path / artifact.path / "metrics.jsonl").read_text().splitlines()]
    return given, read_weights(tmp_path / artifact.path), [row["loss"] for row in metrics], load_manifest(artifact.path)


@pytest.mark.slow
def test_a_stage_that_streams_ends_in_the_same_weights_and_copies_no_tensors(inputs, tmp_path, monkeypatch):
    asked, real = [], S3FileSystem._call_s3

    async def call(self, method, *args, **options):
        asked.append((method, options.get("Key"), options.get("Range")))
        return await real(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", call)
    given, streamed, losses, manifest = train(inputs, tmp_path, latents="stream", num_workers=2)
    tensors = [limits for method, key, limits in asked if method == "get_object" and key.endswith(".safetensors")]
    assert tensors and all(limits for limits in tensors)
    there = [path.name for path in (tmp_path / given["latents"].path).rglob("*") if path.is_file()]
    assert sorted(there) == ["index.parquet", "index.parquet", "manifest.json", "meta.json"]

    # In a home of its own: the same work would be handed on again, since reading otherwise is no other training.
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "other_home"))
    _, copied, expected, other = train(inputs | {"latents": str(tmp_path / "latents")}, tmp_path)
    assert len(losses) == STEPS and losses == expected
    assert streamed.keys() == copied.keys() == {STEPS}
    assert all(torch.equal(streamed[STEPS][name], tensor) for name, tensor in copied[STEPS].items())
    assert [parent.digest for parent in manifest.parents] == [parent.digest for parent in other.parents]


@pytest.mark.slow
def test_a_damaged_index_is_refused_before_anything_is_trained(inputs, tmp_path):
    fs, _ = storage.filesystem(inputs["latents"])
    index = bytearray(fs.cat_file("store/latents/index.parquet"))
    index[len(index) // 2] ^= 1
    fs.pipe_file("store/latents/index.parquet", bytes(index))
    with pytest.raises(ValueError, match="index.parquet was changed: its SHA-256 is not the manifest's"):
        train(inputs, tmp_path, latents="stream")
