"""A stage that reads the rows of its batches from the parts in an object store, run by the training task with its inputs in
that store, as in a pod."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from flytekit import FlyteContextManager
from flytekit.configuration import DataConfig
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory
from object_store import s3_bucket
from s3fs import S3FileSystem
from train_helpers import read_weights, train_config, training_stage, write_artifacts

from model import storage
from model.train.trainer import NucleusTrainer
from tasks.manifest import load_manifest, seal
from tasks.training.task import train_stage

pytestmark = pytest.mark.slow
STEPS = 6
IMAGES = (40, 24)  # of two parts


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """URIs of the artifacts; the endpoint and keys are set as Flyte sets them in a pod."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    with s3_bucket("store", as_flyte_tells=True) as fs:
        folders = write_artifacts(tmp_path, IMAGES, store="s3://store")
        folders["components"] = tmp_path / "components"
        folders["components"].mkdir()
        (folders["components"] / "file").write_text("nothing is sampled")
        seal(folders["components"], "components")
        for name, folder in folders.items():
            fs.put(str(folder), f"store/{name}", recursive=True)
        # A pod starts with this environment; here flytekit has read another one already.
        files = FileAccessProvider(tmp_path / "sandbox", str(tmp_path / "raw"), DataConfig.auto())
        context = FlyteContextManager.current_context()
        with FlyteContextManager.with_context(context.with_file_access(files)):
            yield {name: f"s3://store/{name}" for name in folders}


@pytest.fixture
def requests(monkeypatch):
    """(method, key, range) of each request to the object store."""
    requests, real = [], S3FileSystem._call_s3

    async def call(self, method, *args, **options):
        requests.append((method, options.get("Key", ""), options.get("Range")))
        return await real(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", call)
    return requests


def train(inputs, **changes) -> Path:
    """The sealed checkpoints of a stage that the training task ran."""
    stage = training_stage(train_config(steps=STEPS, log_every_steps=1, checkpoint_every_steps=2, **changes))
    given = {kind: FlyteDirectory.from_source(uri) for kind, uri in inputs.items()}
    return Path(train_stage.task_function(stage=stage, **given).path)


def losses(checkpoints: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]


def tensor_files(folder: Path) -> list[str]:
    """Files of latents and texts below a folder, without the prefix that all texts share."""
    return [path.name for path in folder.rglob("*.safetensors") if path.name != "prefix.safetensors"]


def interrupt_at(monkeypatch, step: int):
    real = NucleusTrainer.train_step

    def train_step(self, batches):
        if self.step == step:
            raise OSError(errno.EIO, "Input/output error")
        real(self, batches)

    monkeypatch.setattr(NucleusTrainer, "train_step", train_step)


def test_a_streamed_stage_that_is_resumed_ends_in_the_weights_of_a_copy_that_ran_through(
    inputs, tmp_path, monkeypatch, requests
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=4)
        with pytest.raises(FlyteRecoverableException, match="Input/output error"):
            train(inputs, latents="stream", num_workers=2)
    streamed = train(inputs, latents="stream", num_workers=2)
    assert json.loads((streamed / "report.json").read_text())["resumed_from_step"] > 0
    assert tensor_files(tmp_path / "home" / "artifacts") == []
    reads = [(key, limits) for method, key, limits in requests if method == "get_object" and "safetensors" in key]
    rows = [(key, limits) for key, limits in reads if not key.endswith("prefix.safetensors")]
    assert {kind for key, _ in rows for kind in ("latents", "texts") if f"/{kind}/" in key} == {"latents", "texts"}
    assert len({re.search("latents/([0-9a-f]{64})/", key)[1] for key, _ in rows if "/latents/" in key}) == len(IMAGES)
    assert all(limits for _, limits in rows), "files are read by byte ranges"

    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "other_home"))  # another home has no result to reuse
    copied = train(inputs)
    assert len(tensor_files(tmp_path / "other_home" / "artifacts")) >= 2 * len(IMAGES)
    assert len(losses(streamed)) == STEPS and losses(streamed) == losses(copied)
    expected, got = read_weights(copied), read_weights(streamed)
    assert got.keys() == expected.keys() and STEPS in got
    assert all(torch.equal(got[STEPS][name], tensor) for name, tensor in expected[STEPS].items())
    assert load_manifest(streamed).digest == load_manifest(copied).digest


def flip(uri: str, place: int) -> None:
    content = bytearray(storage.read_bytes(uri))
    content[place] ^= 1
    storage.write_bytes(uri, bytes(content))


def files_of_part(inputs, kind: str, name: str) -> list[str]:
    fs, root = storage.filesystem("s3://store/artifacts")
    return [f"s3://{path}" for path in fs.find(f"{root}/{kind}") if path.endswith(name)]


def test_a_damaged_table_of_a_part_is_refused_before_anything_is_trained(inputs, tmp_path):
    table = files_of_part(inputs, "latents", "rows.parquet")[0]
    flip(table, len(storage.read_bytes(table)) // 2)
    with pytest.raises(ValueError, match="rows.parquet was changed: its SHA-256 is not the manifest's"):
        train(inputs, latents="stream")
    assert not list((tmp_path / "home").rglob("metrics.jsonl"))


def test_a_damaged_row_is_refused_when_a_batch_reads_it(inputs):
    for file in files_of_part(inputs, "latents", ".safetensors"):
        flip(file, -1)  # in the last row, which some batch of two epochs draws
    with pytest.raises(ValueError, match=r"record [0-9a-f]{64} \(row \d+\): bytes \d+ to \d+ of .* are corrupt"):
        train(inputs, latents="stream")
