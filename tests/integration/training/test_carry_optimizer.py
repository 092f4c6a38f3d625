"""A stage goes on with the optimiser state and the learning rate of the stage before, or begins with a warm-up of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from object_store import s3_bucket
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from train_helpers import read_weights, train_config, training_stage, write_latents

from model.train.run import prune_run, train_stage
from model.train.trainer import NucleusTrainer
from model.weights.checkpoints import METADATA, CheckpointReader, finished_checkpoints

pytestmark = pytest.mark.slow
WARMUP = 5
RATES = {"lr/Muon": 0.01, "lr/AdamW": 0.02}
OPTIM = {"muon_lr": RATES["lr/Muon"], "adamw_lr": RATES["lr/AdamW"], "warmup_steps": WARMUP, "muon_weight_decay": 0.1}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def train(latents, folder, name, steps, before=None, hand_on=False, out="out", stage=None, **changes) -> Path:
    """Trains the stage `name` in `folder`, with `stage`'s changes of its section. Returns its out_dir."""
    target = folder / out
    target.mkdir(parents=True, exist_ok=True)
    values = {"optim": OPTIM, "log_every_steps": 1, "checkpoint_every_steps": 100, "keep_checkpoints": 1, **changes}
    config = train_config(steps=steps, stage={"name": name, **(stage or {})}, **values)
    train_stage(latents, training_stage(config, hand_on_optimizer=hand_on), before, folder / "work", target)
    return target


@pytest.fixture(scope="module")
def first(latents, tmp_path_factory) -> Path:
    """A stage that ends within the warm-up, and saves what the next stage needs."""
    return train(latents, tmp_path_factory.mktemp("first"), "first", 3, hand_on=True)


def rates(out: Path) -> list[dict[str, float]]:
    return [
        {name: line[name] for name in RATES}
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    ]


def scheduled(steps: range) -> list[dict[str, float]]:
    """The rates of these steps (from 1) of a training with one warm-up."""
    return [{name: pytest.approx(rate * min(1, step / WARMUP)) for name, rate in RATES.items()} for step in steps]


def handed_on(out: Path) -> dict[str, torch.Tensor]:
    (state,) = read_weights(out / "optimizer").values()
    return {**state["optimizer"], **state["lr_scheduler"]}


def differing(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    assert expected.keys() == got.keys() and len(expected) > 30
    return [name for name in expected if not torch.equal(expected[name], got[name])]


@pytest.fixture
def known(monkeypatch):
    """From now on the number of steps seen determines the gradients of each step, whatever the data. Records optimiser
    state (None where there is none yet) and weights before each step, and after the last."""
    seen = SimpleNamespace(steps=[], last=None)
    backward, step = NucleusTrainer.forward_backward_step, NucleusTrainer.train_step

    def state(trainer):
        tensors = {**trainer.optimizers.state_dict(), **trainer.model.state_dict()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def forward_backward_step(self, **options):
        loss = backward(self, **options)
        generator = torch.Generator().manual_seed(len(seen.steps))
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return loss

    def train_step(self, batches):
        seen.steps.append(state(self) if any(optimizer.state for optimizer in self.optimizers) else None)
        step(self, batches)
        seen.last = state(self)

    monkeypatch.setattr(NucleusTrainer, "forward_backward_step", forward_backward_step)
    monkeypatch.setattr(NucleusTrainer, "train_step", train_step)
    return seen


def test_stages_update_as_one_uninterrupted_training_does(latents, tmp_path, known):
    """Three stages of equal configuration and gradients, the first of which ends within the warm-up, give the same
    bits."""
    whole = train(latents, tmp_path / "whole", "first", 8)
    expected, known.steps = [*known.steps, known.last], []
    one = train(latents, tmp_path / "one", "first", 3, hand_on=True)
    two = train(latents, tmp_path / "two", "second", 3, before=one, hand_on=True)
    three = train(latents, tmp_path / "three", "third", 2, before=two)
    got = [*known.steps, known.last]
    assert expected[0] is None and got[0] is None
    assert [differing(*pair) for pair in zip(expected[1:], got[1:], strict=True)] == [[]] * 8
    assert {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"} == {
        name.rpartition(".")[2] for name in got[3] if name.startswith("state.")
    }
    assert [*rates(one), *rates(two), *rates(three)] == rates(whole) == scheduled(range(1, 9))


def test_without_carried_state_a_stage_has_its_own_warm_up(latents, first, tmp_path, known):
    fresh = train(latents, tmp_path, "second", 2, before=first, carry_optimizer=False)
    assert known.steps[0] is None and rates(fresh) == scheduled(range(1, 3))
    assert not (fresh / "optimizer").exists()


def test_a_decay_covers_the_stages_own_last_steps_and_continues_after_a_stop(latents, first, tmp_path, monkeypatch):
    """Also if the schedule has counted the steps of an earlier stage."""
    decay, step = {"decay": {"steps": 4, "to": 0.2}}, NucleusTrainer.train_step
    options = {"before": first, "stage": decay, "checkpoint_every_steps": 3}
    whole = train(latents, tmp_path / "whole", "second", 7, **options)

    def stops(self, batches):
        if self.step == 6:
            raise KeyboardInterrupt
        step(self, batches)

    monkeypatch.setattr(NucleusTrainer, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(latents, tmp_path / "stopped", "second", 7, **options)
    monkeypatch.undo()
    resumed = train(latents, tmp_path / "stopped", "second", 7, **options)
    assert json.loads((resumed / "report.json").read_text())["resumed_from_step"] == 3
    factors = [0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]  # of which the first ends the warm-up
    assert rates(whole) == rates(resumed) == [{k: pytest.approx(v * f) for k, v in RATES.items()} for f in factors]
    assert differing(read_weights(whole)[7], read_weights(resumed)[7]) == []


def test_data_and_noise_are_the_stages_own(latents, first, tmp_path):
    out = train(latents, tmp_path, "second", 3, before=first)
    of_first, of_second = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (first, out)
    )
    assert len(set(of_first) | set(of_second)) == 6
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["images_seen"], report["skipped_steps"]) == (3, 24, 0)


def test_only_tensors_of_optimiser_and_schedule_reach_the_next_stage_and_a_lost_output_gets_them_again(latents, first):
    (path,) = finished_checkpoints(first / "optimizer").values()
    entries = CheckpointReader(path).read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    schedule = {name for name in entries if not name.startswith("optimizer.state.")}
    assert schedule == {"lr_scheduler.last_epoch"} and len(entries) > 60
    assert json.loads((first / "report.json").read_text())["optimizer"] == [3]
    prune_run(train_config(), first.parent / "work")
    assert not (first.parent / "work" / "checkpoints").exists()
    again = train(latents, first.parent, "first", 3, hand_on=True, out="again")
    for file in (".metadata", "__0_0.distcp"):
        assert (again / "optimizer" / "step-00000003" / file).read_bytes() == (Path(path) / file).read_bytes()


def test_a_missing_optimiser_state_of_the_previous_stage_is_one_error_that_says_what_to_do(latents, first, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(first / "step-00000003", older / "step-00000003")
    with pytest.raises(
        ValueError, match="older/optimizer/step-00000003 does not exist: .* train.carry_optimizer=false"
    ):
        train(latents, tmp_path, "second", 1, before=older)
    shutil.copytree(first / "optimizer", older / "optimizer")
    (older / "optimizer" / "step-00000003" / METADATA).unlink()  # cut off
    with pytest.raises(ValueError, match="does not exist"):
        train(latents, tmp_path, "second", 1, before=older)
    assert not (tmp_path / "work" / "run.json").exists()


def test_another_state_in_the_same_work_dir_and_a_pickle_in_it_are_refused(latents, first, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(first, other)
    train(latents, tmp_path, "second", 1, before=other)
    (other / "optimizer" / "step-00000003" / METADATA).write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="another optimizer_from"):
        train(latents, tmp_path, "second", 1, before=other)
    with pytest.raises(ValueError, match="posix.getcwd, which is not part"):
        train(latents, tmp_path / "elsewhere", "second", 1, before=other)


@pytest.fixture
def one_thread(monkeypatch):
    """OpenMP in a forked process would wait for threads that the fork did not copy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # otherwise a training takes all cores
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_kill_within_the_stage_resumes_to_the_same_bits(latents, first, tmp_path, one_thread):
    def killed():
        step = NucleusTrainer.train_step

        def train_step(self, batches):
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, batches)

        NucleusTrainer.train_step = train_step
        stage(tmp_path / "killed")

    def stage(folder):
        return train(latents, folder, "second", 7, before=first, hand_on=True, checkpoint_every_steps=3)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    whole, resumed = stage(tmp_path / "whole"), stage(tmp_path / "killed")
    assert json.loads((resumed / "report.json").read_text())["resumed_from_step"] == 3
    assert differing(read_weights(whole)[7], read_weights(resumed)[7]) == []
    assert differing(handed_on(whole), handed_on(resumed)) == []
    assert rates(resumed) == rates(whole) == scheduled(range(4, 11))
    assert handed_on(resumed)["last_epoch"] == 10


def test_the_state_travels_through_an_object_store_as_the_weights_do(latents, first, tmp_path):
    with s3_bucket("checkpoints"):
        out = train(latents, tmp_path, "first", 3, hand_on=True, checkpoint_uri="s3://checkpoints/runs")
        assert list(finished_checkpoints("s3://checkpoints/runs/work/optimizer")) == [3]
        assert not (tmp_path / "work" / "optimizer").exists()
    assert differing(handed_on(first), handed_on(out)) == []
