"""Checkpoints, signals and bad steps, with real processes. The final weights always have the same bits.

Processes are forked from this one, which has imported what they need, and compute with one thread.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from object_store import s3_bucket
from train_helpers import logged_steps, read_weights, train_config, training_stage, write_latents

from model import storage
from model.data.latents import LatentDataset
from model.data.order import SampleOrder
from model.layers.moe import local_part
from model.train.checkpoint import StageCheckpointer
from model.train.preemption import Preempted
from model.train.run import train_stage
from model.train.trainer import NucleusTrainer
from model.weights.checkpoints import finished_checkpoints

pytestmark = pytest.mark.slow
STEPS = 18
PREEMPTED = 75
LIMIT_S = 300
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def train(latents, folder, name="out", work="work", sample_fn=None, **changes):
    out = folder / name
    out.mkdir(exist_ok=True)
    config = train_config(**{"steps": STEPS, **changes})
    return train_stage(latents, training_stage(config), None, folder / work, out, sample_fn)


class Ranks:
    """`function(rank)` in processes of their own, in one process group where there are several."""

    def __init__(self, function, ranks=1):
        self.folder = tempfile.TemporaryDirectory()  # they meet in a file: a free port may be taken before they listen
        self.processes = [fork.Process(target=self._main, args=(function, rank, ranks)) for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def _main(self, function, rank, ranks):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            store = dist.FileStore(f"{self.folder.name}/store", ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        try:
            function(rank)
        except Preempted as error:
            print(error, flush=True)
            os._exit(PREEMPTED)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self) -> set[int]:
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = {process.exitcode for process in self.processes}
        self.kill()
        return codes

    def wait_for(self, happened) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not happened():
            assert time.monotonic() < deadline and all(process.is_alive() for process in self.processes)
            time.sleep(0.002)


def before_step(step: int, wait) -> None:
    """Calls `wait(trainer)` at the beginning of a step of this process, so that a test can interrupt it there, however
    fast it trains."""
    real = NucleusTrainer.train_step

    def train_step(self, batches):
        if self.step == step:
            wait(self)
        real(self, batches)

    NucleusTrainer.train_step = train_step


def until_sigterm(marker: Path):
    """Waits for SIGTERM; writes `marker` first."""

    def wait(trainer):
        marker.touch()
        while not trainer.stop.raised:
            time.sleep(0.002)

    return wait


def same_weights(one: Path, other: Path) -> list[int]:
    expected, got = read_weights(one), read_weights(other)
    assert list(expected) == list(got)
    for step, state in expected.items():
        assert state.keys() == got[step].keys() and len(state) > 30
        assert [name for name, value in state.items() if not torch.equal(value, got[step][name])] == []
    return list(expected)


@pytest.fixture(scope="module")
def whole(latents, tmp_path_factory):
    """Number of ranks -> outputs of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}

    def get(ranks: int) -> Path:
        if ranks not in made:
            name = f"out{ranks}"
            assert Ranks(lambda rank: train(latents, folder, name, f"work{ranks}"), ranks).codes() == {0}
            made[ranks] = folder / name
        return made[ranks]

    return get


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_in_the_middle_of_a_background_save_resumes_from_the_save_before(latents, whole, tmp_path, ranks):
    import torch.distributed.checkpoint.filesystem as dcp_files

    real, marker = dcp_files._write_item, tmp_path / "in_the_middle"

    def stalling(transforms, stream, data, write_item, *args, **kwargs):
        if "checkpoints/step-10/" in str(stream.name) and stream.tell() > 0:
            assert threading.current_thread().name == "checkpoint"
            stream.flush()
            marker.touch()
            time.sleep(600)
        return real(transforms, stream, data, write_item, *args, **kwargs)

    def killed(rank):
        dcp_files._write_item = stalling
        train(latents, tmp_path, async_checkpoint=True, keep_full_checkpoints=1)

    processes = Ranks(killed, ranks)
    work = tmp_path / "work"
    processes.wait_for(lambda: marker.exists() and logged_steps(work / "metrics.jsonl")[-1] >= 12)  # it trains on
    processes.kill()
    assert any(path.stat().st_size for path in (work / "checkpoints" / "step-10").glob("*.distcp"))
    assert list(finished_checkpoints(work / "checkpoints")) == [5]
    again = Ranks(lambda rank: train(latents, tmp_path, async_checkpoint=True, keep_full_checkpoints=1), ranks)
    assert again.codes() == {0}
    assert report(tmp_path / "out")["resumed_from_step"] == 5
    assert same_weights(whole(ranks), tmp_path / "out") == [10, 15, 18]
    assert list(finished_checkpoints(work / "checkpoints")) == [18]
    assert not [path for path in (work / "checkpoints").iterdir() if not (path / ".metadata").is_file()]


def test_a_newest_checkpoint_that_was_cut_off_is_passed_over_with_a_message(latents, whole, tmp_path, capfd):
    def fails(rank):
        before_step(12, lambda trainer: os._exit(3))
        train(latents, tmp_path)

    assert Ranks(fails).codes() == {3}
    newest = tmp_path / "work" / "checkpoints" / "step-10"
    (file,) = newest.glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)
    assert Ranks(lambda rank: train(latents, tmp_path)).codes() == {0}
    said = capfd.readouterr().out
    assert f"checkpoint {newest} is damaged ({file.name} is cut off or missing)" in said
    assert said.count("resuming from the checkpoint of step 5\n") == 1
    assert report(tmp_path / "out")["resumed_from_step"] == 5
    assert same_weights(whole(1), tmp_path / "out") == [10, 15, 18]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_to_one_rank_saves_the_step_on_all_and_the_restart_ends_with_the_same_bits(
    latents, whole, tmp_path, ranks
):
    work, last, marker = tmp_path / "work", 8, tmp_path / "waiting"

    def preempted(rank):
        if rank == ranks - 1:
            before_step(last, until_sigterm(marker))
        train(latents, tmp_path, num_workers=2)

    processes = Ranks(preempted, ranks)
    processes.wait_for(marker.exists)
    os.kill(processes.processes[-1].pid, signal.SIGTERM)
    assert processes.codes() == {PREEMPTED}
    assert list(finished_checkpoints(work / "checkpoints")) == [5, last]
    assert list(finished_checkpoints(work / "weights")) == [5]
    assert not list((tmp_path / "out").iterdir())
    assert Ranks(lambda rank: train(latents, tmp_path), ranks).codes() == {0}  # the reading settings may change
    assert report(tmp_path / "out")["resumed_from_step"] == last
    assert same_weights(whole(ranks), tmp_path / "out") == [10, 15, 18]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(2, STEPS + 1, 2)]


def test_a_killed_pair_of_processes_ends_with_the_bits_of_an_undisturbed_pair(latents, whole, tmp_path):
    def killed(rank):
        before_step(13, lambda _: time.sleep(LIMIT_S))
        train(latents, tmp_path)

    processes = Ranks(killed, 2)
    processes.wait_for(lambda: logged_steps(tmp_path / "work" / "metrics.jsonl")[-1:] >= [12])
    processes.kill()
    assert Ranks(lambda rank: train(latents, tmp_path), 2).codes() == {0}
    assert report(tmp_path / "out")["resumed_from_step"] == 10
    assert same_weights(whole(2), tmp_path / "out") == [10, 15, 18]


def test_weights_of_a_step_without_a_full_checkpoint_are_deleted_before_they_are_written_again(
    latents, whole, tmp_path
):
    """If they were overwritten in place, they would look complete too early."""
    real, weights = StageCheckpointer.dcp_save, tmp_path / "work" / "weights"

    def broken(rank):
        def dcp_save(self, state, path):
            if path.endswith("checkpoints/step-10"):
                os._exit(1)
            real(self, state, path)

        StageCheckpointer.dcp_save = dcp_save
        train(latents, tmp_path)

    def again(rank):
        before_step(6, lambda _: (tmp_path / "seen").write_text(str(list(finished_checkpoints(weights)))))
        train(latents, tmp_path)

    assert Ranks(broken).codes() == {1}
    assert list(finished_checkpoints(weights)) == [5, 10]
    assert Ranks(again).codes() == {0}
    assert (tmp_path / "seen").read_text() == "[5]"
    assert same_weights(whole(1), tmp_path / "out") == [10, 15, 18]


def spoil(monkeypatch, steps: dict[int, str], on_rank: int = 0) -> None:
    """Sets the loss or a gradient of these steps, on one rank."""
    real = NucleusTrainer.forward_backward_step

    def forward_backward_step(self, **kwargs):
        loss = real(self, **kwargs)
        how = steps.get(self.step)
        if torch.distributed.get_rank() != on_rank or how is None:
            return loss
        if how == "gradient":
            gradient = next(self.model.parameters()).grad
            getattr(gradient, "_local_tensor", gradient).view(-1)[0] = float("nan")
            return loss
        self.bin_sums += float(how)
        return loss + float(how)

    monkeypatch.setattr(NucleusTrainer, "forward_backward_step", forward_backward_step)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_step_changes_nothing_on_any_rank_and_is_counted(latents, tmp_path, monkeypatch, ranks):
    spoil(monkeypatch, {3: "nan", 7: "gradient", 10: "inf", 16: "100"}, on_rank=ranks - 1)
    real, changed = NucleusTrainer.train_step, []

    def state(trainer):
        tensors = [*trainer.model.state_dict().values(), *trainer.optimizers.state_dict().values()]
        return [getattr(tensor, "_local_tensor", tensor).clone() for tensor in tensors if torch.is_tensor(tensor)]

    def train_step(self, batches):
        before = state(self)
        real(self, batches)
        now = state(self)
        if len(now) != len(before) or not all(torch.equal(a, b) for a, b in zip(before, now)):
            changed.append(self.step)

    monkeypatch.setattr(NucleusTrainer, "train_step", train_step)

    def main(rank):
        optim = {"muon_lr": 0.01, "adamw_lr": 0.01, "warmup_steps": 12}
        train(latents, tmp_path, skip={"spike_mads": 30, "window_steps": 16, "max_skipped": 5}, optim=optim)
        (tmp_path / f"changed{rank}.json").write_text(json.dumps(changed))

    assert Ranks(main, ranks).codes() == {0}
    good = [step for step in range(1, STEPS + 1) if step not in (3, 7, 10, 16)]
    assert [json.loads((tmp_path / f"changed{rank}.json").read_text()) for rank in range(ranks)] == [good] * ranks
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["skipped_steps"] for line in lines} == {
        1: 0, 2: 0, 4: 1, 6: 1, 8: 2, 12: 3, 14: 3, 18: 4,
    }  # fmt: skip
    assert report(tmp_path / "out")["skipped_steps"] == 4
    assert [line["lr/Muon"] for line in lines] == pytest.approx([0.01 * min(1, line["step"] / 12) for line in lines])
    bins = [value for line in lines for name, value in line.items() if name.startswith("loss")]
    assert all(0 < value < 50 for value in bins)


def test_skipped_steps_do_not_disturb_a_resume(latents, tmp_path, monkeypatch):
    spoil(monkeypatch, {3: "nan", 13: "1000", 14: "nan"})
    skip = {"spike_mads": 30, "window_steps": 16, "max_skipped": 4}
    train(latents, tmp_path, "whole", "whole_work", skip=skip)

    def stop(model, step, path):
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="after step 8; it goes on from .*step-8"):
        train(latents, tmp_path, skip=skip, sample_fn=stop, sample_every_steps=7)
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = train(latents, tmp_path, skip=skip, sample_fn=lambda *_: None, sample_every_steps=7)
    assert resumed["resumed_from_step"] == 8 and resumed["skipped_steps"] == 3
    same_weights(tmp_path / "whole", tmp_path / "out")


def test_too_many_bad_steps_end_the_run_with_the_records_of_the_batch(latents, tmp_path, monkeypatch):
    spoil(monkeypatch, dict.fromkeys((7, 9, 10), "nan"))
    with pytest.raises(RuntimeError, match="not finite at step 10; 3 of the last 10 steps were skipped") as caught:
        train(latents, tmp_path, skip={"window_steps": 10, "max_skipped": 3})
    dataset = LatentDataset(latents)
    stage = training_stage(train_config(steps=STEPS))
    order = SampleOrder(dataset, 8, stage.seed, stage.stage.tier_weights)
    ids = dataset.record_ids(order.batch(9).rows)
    assert len(ids) == 8 and all(record_id in str(caught.value) for record_id in ids)
    assert json.loads((tmp_path / "work" / "skipped.json").read_text())["record_ids"] == ids
    assert list(finished_checkpoints(tmp_path / "work" / "checkpoints")) == [5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_on_one_rank_are_saved_by_none(latents, tmp_path, monkeypatch, ranks):
    real = NucleusTrainer.train_step

    def train_step(self, batches):
        real(self, batches)
        if self.step == 10 and dist.get_rank() == ranks - 1:
            weight = next(self.model.parameters()).data
            getattr(weight, "_local_tensor", weight).view(-1)[3] = float("nan")

    monkeypatch.setattr(NucleusTrainer, "train_step", train_step)

    def main(rank):
        with pytest.raises(RuntimeError, match="not finite after step 10"):
            train(latents, tmp_path)

    assert Ranks(main, ranks).codes() == {0}
    assert list(finished_checkpoints(tmp_path / "work" / "checkpoints")) == [5]


@pytest.mark.parametrize("replicas, name", [(1, "transformer_blocks.1.img_mlp.gate.weight"), (2, "proj_out.weight")])
def test_replicated_weights_that_come_apart_by_one_bit_are_named_on_every_rank_and_not_saved(
    latents, tmp_path, monkeypatch, replicas, name
):
    """Routers of a sharded model, and any weight of plain replicas."""
    real = NucleusTrainer.train_step

    def train_step(self, batches):
        real(self, batches)
        if self.step == 10 and dist.get_rank() == 1:
            weight = local_part(self.model.get_parameter(name)).data.view(-1)
            weight[3] = weight[3].nextafter(torch.tensor(1.0))

    monkeypatch.setattr(NucleusTrainer, "train_step", train_step)

    def main(rank):
        with pytest.raises(RuntimeError, match=f"after step 10 .* replicated: {name}. Nothing was saved"):
            train(latents, tmp_path, data_parallel_replicate=replicas)

    assert Ranks(main, 2).codes() == {0}
    assert list(finished_checkpoints(tmp_path / "work" / "checkpoints")) == [5]


def test_a_gradient_norm_that_ranks_round_differently_does_not_part_their_weights(latents, tmp_path, monkeypatch):
    real = torch.nn.utils.get_total_norm
    monkeypatch.setattr(
        torch.nn.utils, "get_total_norm", lambda *args, **options: real(*args, **options) * (1 + 1e-6 * dist.get_rank())
    )
    clipped = {"muon_lr": 0.01, "adamw_lr": 0.01, "warmup_steps": 3, "max_grad_norm": 0.05}
    assert Ranks(
        lambda rank: train(latents, tmp_path, data_parallel_replicate=2, optim=clipped, steps=5), 2
    ).codes() == {0}


def test_what_fails_in_the_background_ends_the_run_at_the_next_save(latents, tmp_path, monkeypatch):
    real = StageCheckpointer.dcp_save

    def dcp_save(self, state, path):
        if path.endswith("checkpoints/step-5"):
            raise RuntimeError("the store is gone")
        real(self, state, path)

    monkeypatch.setattr(StageCheckpointer, "dcp_save", dcp_save)
    with pytest.raises(RuntimeError, match="the store is gone"):
        train(latents, tmp_path, async_checkpoint=True)
    assert not finished_checkpoints(tmp_path / "work" / "checkpoints")


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server of S3's protocol on this machine, with the credentials as Flyte gives them."""
    with s3_bucket("checkpoints", as_flyte_tells=True):
        yield "s3://checkpoints/runs"


def test_a_run_in_s3_resumes_on_another_node_and_is_pruned_there(latents, tmp_path, bucket):
    train(latents, tmp_path, "local", "local_work")
    changes = dict(async_checkpoint=True, checkpoint_uri=bucket, sample_every_steps=7)

    def stop(model, step, path):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="s3://checkpoints/runs/work/checkpoints/step-8"):
        train(latents, tmp_path, sample_fn=stop, **changes)
    assert not (tmp_path / "work" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "work")
    # As a kill during a save leaves it: an object, but no .metadata.
    storage.write_bytes(f"{bucket}/work/checkpoints/step-12/__0_0.distcp", b"cut off")
    assert train(latents, tmp_path, sample_fn=lambda *_: None, **changes)["resumed_from_step"] == 8
    assert same_weights(tmp_path / "local", tmp_path / "out") == [10, 15, 18]
    assert [name.split("/")[-1] for name in storage.children(f"{bucket}/work/checkpoints")] == ["step-15", "step-18"]
    assert list(finished_checkpoints(f"{bucket}/work/weights")) == [10, 15, 18]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(2, STEPS + 1, 2)]

    shutil.rmtree(tmp_path / "work")
    shutil.move(tmp_path / "out", tmp_path / "first")
    assert train(latents, tmp_path, sample_fn=lambda *_: None, **changes)["resumed_from_step"] == STEPS
    for name in ("report.json", "metrics.jsonl", "step-00000018/__0_0.distcp"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
