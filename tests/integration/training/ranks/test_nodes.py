"""Training as on a cluster: spawned processes with inputs in an object store, and nodes without a shared disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from flyteidl.core import errors_pb2, literals_pb2
from flytekit import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.core.utils import write_proto_to_file
from flytekit.types.directory import FlyteDirectory
from object_store import s3_bucket
from train_helpers import train_config, training_stage, write_artifacts

from model.train import run
from tasks.manifest import seal, verify

ROOT = Path(__file__).resolve().parents[4]
BUCKET = "s3://nodes"


@pytest.fixture
def store():
    """A bucket on this machine; the endpoint and its keys as Flyte gives them to a pod."""
    with s3_bucket(BUCKET.removeprefix("s3://"), as_flyte_tells=True) as fs:
        yield fs


@pytest.mark.slow
def test_a_pod_spawns_its_processes_which_train_on_data_in_an_object_store(store, tmp_path):
    """With the start method and command of production, which pickle functions and inputs for the workers."""
    write_artifacts(tmp_path)
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "file").write_text("nothing is sampled")
    values = {"stage": training_stage(train_config(steps=2, expert_parallel=2))}
    seal(tmp_path / "components", "components")
    for kind in ("latents", "texts", "components"):
        store.put(str(tmp_path / kind), f"{BUCKET}/{kind}", recursive=True)
        values[kind] = FlyteDirectory(f"{BUCKET}/{kind}")
    context, kinds = FlyteContextManager.current_context(), {name: type(value) for name, value in values.items()}
    literals = TypeEngine.dict_to_literal_map(context, values, kinds)
    write_proto_to_file(literals.to_flyte_idl(), str(tmp_path / "inputs.pb"))

    command = [Path(sys.executable).with_name("pyflyte-execute"), "--inputs", tmp_path / "inputs.pb"]
    command += ["--output-prefix", tmp_path / "outputs", "--raw-output-data-prefix", f"{BUCKET}/raw"]
    command += ["--resolver", "flytekit.core.python_auto_container.default_task_resolver"]
    command += ["--", "task-module", "tasks.training.task", "task-name", "train_stage"]
    environment = {"NUCLEUS_TRAIN_NPROC": "2", "NUCLEUS_ACCELERATOR": "none", "NUCLEUS_HOME": str(tmp_path / "home")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    subprocess.run(
        [str(part) for part in command], check=True, cwd=tmp_path, env={**os.environ, **environment}, timeout=900
    )
    error = tmp_path / "outputs" / "error.pb"
    assert not error.exists(), errors_pb2.ErrorDocument.FromString(error.read_bytes()).error.message

    verified = [path for path in (tmp_path / "temporary").glob("torchelastic_*/*/attempt_0/*") if path.is_file()]
    # Latents, texts and components, which the second process did not download again, and the index.
    assert len(verified) == 4

    outputs = literals_pb2.LiteralMap.FromString((tmp_path / "outputs" / "outputs.pb").read_bytes())
    uri = outputs.literals["o0"].scalar.blob.uri
    assert uri.startswith(f"{BUCKET}/raw")
    store.get(uri, str(tmp_path / "artifact"), recursive=True)
    verify(tmp_path / "artifact")
    report = json.loads((tmp_path / "artifact" / "report.json").read_text())
    assert (report["ranks"], report["steps"], report["checkpoints"]) == (2, 2, [2])
    assert {path.name for path in (tmp_path / "artifact" / "step-00000002").iterdir()} > {
        "__0_0.distcp",
        "__1_0.distcp",
    }


def see(rank: int, folder: Path, roots: list[Path], queue) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    try:
        run._check_one_place(str(roots[rank]))
        queue.put("one place")
    except ValueError as error:
        queue.put(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_that_save_on_disks_of_their_own_are_refused_before_they_train(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(run, "VISIBLE_WITHIN_S", 0.1)
    roots = [tmp_path / "node0", tmp_path / ("node0" if shared else "node1")]
    for root in roots:
        root.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    processes = [fork.Process(target=see, args=(rank, tmp_path, roots, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    messages = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    if shared:
        assert messages == {"one place"}
    else:
        assert all("is not shared" in message and "ranks [1]" in message for message in messages)
    assert not list(roots[0].iterdir())
