"""Training on CUDA as the published recipe does it: bf16, compiled blocks, selective checkpointing, background checkpoints,
read-ahead, and the kernels and attention that this card takes. One process of NCCL; two where there are two cards."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "integration"))

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
for package in ("torchtitan", "pydantic", "safetensors"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"training needs {package}", allow_module_level=True)
# PyTorch 2.11 lacks names that FSDP's layout needs, and torchtitan asks for what else it needs itself.
pytest.importorskip("model.train.parallel.parallelize", reason="training needs a newer PyTorch", exc_type=ImportError)

from train_cuda_worker import SAVED_EVERY, STEPS, WAIT_S  # noqa: E402
from train_helpers import logged_steps, read_weights, write_latents  # noqa: E402

from model.train.data import to_device  # noqa: E402
from model.weights.checkpoints import finished_checkpoints  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
KILLED_BEFORE = 8  # between two checkpoints


def start(folder: Path, job: str, *options: int, device: str = "cuda", ranks: int = 1) -> subprocess.Popen:
    """Starts train_cuda_worker.py in separate processes, with one compiler cache for each job."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE.parent / "integration"))),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / job / "inductor"),
    }
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, HERE / "train_cuda_worker.py", folder, job, *options]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment)


def finish(process: subprocess.Popen) -> None:
    assert process.wait(timeout=WAIT_S) == 0


def lines(folder: Path, job: str) -> list[dict]:
    return [json.loads(line) for line in (folder / job / "out" / "metrics.jsonl").read_text().splitlines()]


def report(folder: Path, job: str) -> dict:
    return json.loads((folder / job / "out" / "report.json").read_text())


def kill_before(folder: Path, job: str, step: int, device: str = "cuda") -> None:
    """Kills a training before `step`, when its last checkpoint is finished."""
    process = start(folder, job, step, device=device)
    deadline, work = time.monotonic() + WAIT_S, folder / job / "work"
    saved = (step - 1) // SAVED_EVERY * SAVED_EVERY
    while logged_steps(work / "metrics.jsonl")[-1:] < [step - 1] or saved not in finished_checkpoints(
        work / "checkpoints"
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def assert_close(folder: Path, job: str, reference: str, within: float) -> None:
    expected, got = ([line["loss"] for line in lines(folder, name)] for name in (reference, job))
    assert len(got) == STEPS and all(map(math.isfinite, got))
    assert got == pytest.approx(expected, rel=within)
    assert got[-1] < got[0]


def assert_same_bits(folder: Path, job: str, reference: str) -> None:
    expected, got = (read_weights(folder / name / "out") for name in (reference, job))
    assert list(expected) == list(got) == [10, 15, STEPS]
    for step, state in expected.items():
        assert state.keys() == got[step].keys()
        for name, value in state.items():
            assert torch.equal(value, got[step][name]), f"{name} differs at step {step}"
    assert [line["loss"] for line in lines(folder, job)] == [line["loss"] for line in lines(folder, reference)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an fp32 training in one CPU process, and the same training on CUDA with the recipe's settings."""
    made = tmp_path_factory.mktemp("cuda")
    write_latents(made / "latents")
    for process in [start(made, "reference", device="cpu"), start(made, "whole")]:
        finish(process)
    return made


def test_cuda_training_follows_fp32_on_a_cpu(folder):
    assert report(folder, "reference")["device"] == "cpu" and report(folder, "whole")["device"] == "cuda"
    assert_close(folder, "whole", "reference", within=0.05)


def test_a_killed_and_resumed_training_has_the_bits_of_an_uninterrupted_one(folder):
    kill_before(folder, "killed", KILLED_BEFORE)
    finish(start(folder, "killed"))
    assert report(folder, "killed")["resumed_from_step"] == SAVED_EVERY
    assert_same_bits(folder, "killed", "whole")


@two_cards
@pytest.mark.parametrize("job", ["sharded", "spread"])
def test_fsdp2_and_expert_parallelism_over_two_cards_follow_one(folder, job):
    finish(start(folder, job, ranks=2))
    assert report(folder, job)["ranks"] == 2
    assert_close(folder, job, "reference", within=0.05)


def test_a_batch_is_copied_without_a_wait_and_from_memory_that_is_not_used_again_before():
    device = torch.device("cuda")
    numbers = torch.arange(1 << 22, dtype=torch.float32)
    for pinned in (True, False):
        batch = numbers.pin_memory() if pinned else numbers.clone()
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)  # the device is busy for about half a second
        torch.cuda.set_sync_debug_mode("error")
        try:
            copy = to_device(batch, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if pinned:  # pinning again may wait until PyTorch has free pinned memory
            assert not torch.cuda.current_stream().query(), "the host waited for the device"
        del batch
        other = torch.full_like(numbers, -1.0).pin_memory()  # would be given the same memory
        assert torch.equal(copy.cpu(), numbers) and other[0] == -1
