import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from train_helpers import read_weights, train_config, training_stage, transformer_config, write_latents

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def run(latents, tmp_path, name="out", steps=20, work="work", init_from=None, model=None, sample_fn=None, **changes):
    from model.train.run import train_stage

    out = tmp_path / name
    out.mkdir()
    config = train_config(steps=steps, **changes)
    return out, train_stage(latents, training_stage(config, model), init_from, tmp_path / work, out, sample_fn)


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_weights(checkpoint.parent)[int(checkpoint.name.split("-")[1])]


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    """One stage of 120 steps, with samples, and what it left in the process."""
    tmp_path = tmp_path_factory.mktemp("run")
    calls = []

    def sample_fn(model, step, path):
        calls.append((step, model.training, torch.is_grad_enabled()))
        path.write_bytes(b"png")

    import model.train.run  # noqa: F401  (before looking: what libraries set when they are imported stays)

    environment, collecting, random_state = dict(os.environ), gc.isenabled(), torch.get_rng_state()
    out, report = run(
        latents, tmp_path, steps=120, sample_fn=sample_fn, sample_every_steps=50, checkpoint_every_steps=50
    )
    left = {
        "group": dist.is_initialized(),
        "environment": dict(os.environ) == environment,
        "gc": gc.isenabled() == collecting,
        "rng": torch.equal(torch.get_rng_state(), random_state),
    }
    return tmp_path, out, report, calls, left


def test_the_loss_falls(trained):
    _, out, report, _, _ = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = sum(line["loss"] for line in lines[:3]) / 3
    last = sum(line["loss"] for line in lines[-10:]) / 10
    assert last < 0.5 * first
    assert report["loss"] == lines[-1]["loss"]


def test_metrics_contain_losses_rates_routing_and_throughput(trained):
    _, out, _, _, _ = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, *range(2, 121, 2)]
    for line in lines:
        assert {"loss", "grad_norm", "images_per_s", "tokens_per_s", "lr/Muon", "lr/AdamW"} <= line.keys()
        assert 0 <= line["expert/dropped"] < 1 and 0 < line["expert/entropy"] <= 1
        bins = {name: value for name, value in line.items() if name.startswith("loss_t/")}
        assert bins and set(bins) <= {f"loss_t/{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5)}
    assert lines[-1]["images_seen"] == 120 * 8
    assert lines[0]["lr/Muon"] == pytest.approx(0.01 / 3) and lines[-1]["lr/Muon"] == 0.01  # WSM: no decay


def test_tensorboard_has_the_same_curves(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out, _, _, _ = trained
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]
    assert events.Scalars("loss")[-1].value == pytest.approx(lines[-1]["loss"], rel=1e-5)


def test_samples_are_drawn_at_their_cadence_and_at_the_end_in_eval_mode(trained):
    _, out, _, calls, _ = trained
    assert calls == [(50, False, False), (100, False, False), (120, False, False)]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        f"step-{step:08d}.png" for step in (50, 100, 120)
    ]


def test_an_accelerator_uses_deterministic_algorithms_unless_the_recipe_turns_them_off(latents, tmp_path, monkeypatch):
    """Memory-efficient attention is deterministic only where PyTorch may raise (not with warn_only)."""
    import model.train.config as of_stage

    seen = []

    def sample_fn(model, step, path):
        enabled, warns = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        seen.append((enabled, warns, torch.backends.cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    runs = {}
    for name, device, deterministic in (("cpu", "cpu", True), ("on", "cuda", True), ("off", "cuda", False)):
        monkeypatch.setattr(of_stage, "DEVICE_TYPE", device)
        out, _ = run(latents, tmp_path, name, 2, work=f"{name}_work", sample_fn=sample_fn, sample_every_steps=2,
                     deterministic=deterministic)  # fmt: skip
        runs[name] = load(out / "step-00000002")
    off = (False, False, False, ":4096:8")  # the process's, from its start: see model/__init__.py
    assert seen == [off, (True, False, True, ":4096:8"), off]
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory  # PyTorch's default, which torchtitan changes
    assert all(torch.equal(runs["cpu"][name], runs["on"][name]) for name in runs["cpu"])


def test_the_process_is_left_as_it_was(trained):
    assert trained[4] == {"group": False, "environment": True, "gc": True, "rng": True}


def test_checkpoints_contain_only_the_model_under_its_own_names(trained):
    from model.transformer import NucleusTransformer

    _, out, report, _, _ = trained
    assert report["checkpoints"] == [50, 100, 120]
    state = load(out / "step-00000120")
    model = NucleusTransformer(transformer_config())
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    assert json.loads((out / "report.json").read_text()) == report


def test_a_finished_stage_fills_a_lost_output_again_without_training(trained, latents):
    tmp_path, out, _, _, _ = trained
    again, report = run(latents, tmp_path, "again", steps=120, sample_every_steps=50, checkpoint_every_steps=50)
    assert report["resumed_from_step"] == 120
    assert (again / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    expected, got = load(out / "step-00000120"), load(again / "step-00000120")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_another_configuration_is_refused_in_the_same_work_dir(trained, latents):
    with pytest.raises(ValueError, match="another train, stage"):
        run(latents, trained[0], "other", steps=121)


def test_the_next_stage_starts_from_the_last_weights(trained, latents, tmp_path):
    _, out, _, _, _ = trained
    frozen = dict(optim={"muon_lr": 1e-30, "adamw_lr": 1e-30, "warmup_steps": 0}, losses={})
    second, report = run(
        latents,
        tmp_path,
        "second",
        steps=1,
        init_from=out,
        stage={"name": "second", "capacity_factors": 1.0},
        carry_optimizer=False,
        **frozen,
    )
    assert report["resumed_from_step"] == 0
    before, after = load(out / "step-00000120"), load(second / "step-00000001")
    for name in before:
        assert torch.equal(before[name], after[name]), name
    scratch, _ = run(latents, tmp_path, "scratch", steps=1, work="scratch_work", **frozen)
    assert not torch.equal(load(scratch / "step-00000001")["img_in.weight"], after["img_in.weight"])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_configured_number_of_full_checkpoints_stays(latents, tmp_path, asynchronous):
    from model.weights.checkpoints import finished_checkpoints

    changes = dict(steps=12, checkpoint_every_steps=3, async_checkpoint=asynchronous, keep_checkpoints=1)
    for keep, steps in ((1, [12]), (3, [6, 9, 12])):
        work = f"work{keep}"
        run(latents, tmp_path, f"out{keep}", work=work, keep_full_checkpoints=keep, **changes)
        assert list(finished_checkpoints(tmp_path / work / "checkpoints")) == steps
        assert list(finished_checkpoints(tmp_path / work / "weights")) == [12]
    _, report = run(latents, tmp_path, "again", work="work3", keep_full_checkpoints=2, **changes)  # the same run
    assert report["resumed_from_step"] == 12
    with pytest.raises(ValueError, match="keep_full_checkpoints"):
        train_config(keep_full_checkpoints=0)


def test_saves_in_the_background_from_memory_that_is_used_again_are_the_same(latents, tmp_path, monkeypatch):
    """As on an accelerator, where it is pinned."""
    from torch.distributed.checkpoint import staging

    import model.train.checkpoint as saving

    changes = dict(steps=12, checkpoint_every_steps=3, keep_checkpoints=4)
    expected, _ = run(latents, tmp_path, "expected", work="expected_work", **changes)
    made, allocate = [], staging._create_cpu_state_dict
    monkeypatch.setattr(staging, "_create_cpu_state_dict", lambda state, **how: made.append(how) or allocate(state))
    monkeypatch.setattr(saving, "DEVICE_TYPE", "cuda")
    out, _ = run(latents, tmp_path, async_checkpoint=True, **changes)
    assert made == [{"pin_memory": True}]  # of three saves in the background, the first alone allocates
    expected, actual = read_weights(expected), read_weights(out)
    assert list(expected) == list(actual) == [3, 6, 9, 12]
    for step, state in expected.items():
        assert all(torch.equal(value, actual[step][name]) for name, value in state.items())


def test_a_checkpoint_cut_off_while_it_was_written_is_never_loaded(latents, tmp_path):
    whole, _ = run(latents, tmp_path, "whole", steps=12)
    # As a kill in the middle of saving step 12 leaves it: files, but no .metadata.
    for folder in ("checkpoints/step-12", "weights/step-00000012"):
        (tmp_path / "work" / folder / ".metadata").unlink()
    shutil.copytree(tmp_path / "work/checkpoints/step-12", tmp_path / "work/checkpoints/step-99")
    again, report = run(latents, tmp_path, "again", steps=12)
    assert report["resumed_from_step"] == 10
    assert report["checkpoints"] == [5, 10, 12]
    expected, got = load(whole / "step-00000012"), load(again / "step-00000012")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_extra_losses_change_what_is_learned(latents, tmp_path):
    plain, _ = run(latents, tmp_path, "plain", steps=6, work="w0", losses={})
    reference = load(plain / "step-00000006")
    for i, losses in enumerate(({"router_z_loss": 1.0}, {"router_orthogonality": 0.1}, {"wavelet": 1.0})):
        out, _ = run(latents, tmp_path, f"out{i}", steps=6, work=f"w{i + 1}", losses=losses)
        state = load(out / "step-00000006")
        assert any(not torch.equal(state[name], reference[name]) for name in state), losses


def test_accumulating_micro_batches_is_the_same_training(latents, tmp_path):
    whole, _ = run(latents, tmp_path, "whole", steps=4, work="w0")
    parts, _ = run(latents, tmp_path, "parts", steps=4, work="w1", local_batch_size=2)
    expected, got = load(whole / "step-00000004"), load(parts / "step-00000004")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-4)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(latents, tmp_path):
    with pytest.raises(RuntimeError, match="not finite at step"):
        run(
            latents,
            tmp_path,
            steps=30,
            optim={"muon_lr": 1e30, "adamw_lr": 1e30, "warmup_steps": 0},
            losses={},
            checkpoint_every_steps=30,
        )
    assert not dist.is_initialized()
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_latents_that_do_not_fit_the_model_are_refused(latents, tmp_path):
    with pytest.raises(ValueError, match="joint_attention_dim=12, got 16"):
        run(latents, tmp_path, model=transformer_config(joint_attention_dim=16))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(latents, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.api import CheckpointException

    from model.train.checkpoint import StageCheckpointer

    def dcp_save(self, state, checkpoint_id, **_):
        Path(checkpoint_id).mkdir(parents=True)
        (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"cut off")
        raise CheckpointException("write", {0: (RuntimeError("unexpected pos"), None)})

    monkeypatch.setattr(StageCheckpointer, "dcp_save", dcp_save)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError) as caught:
        run(latents, tmp_path, steps=5)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "work" / "weights").iterdir()) and not list((tmp_path / "out").iterdir())


def test_metrics_of_lost_steps_and_a_cut_off_line_are_forgotten_on_resume(tmp_path):
    from model.train.metrics import truncate_metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 7}\n{"step": 8, "lo')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_two_processes_train_as_one_does(latents, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from train_helpers import train_config, training_stage\n"
        "from model.train.run import train_stage\n"
        "latents, work, out = (Path(argument) for argument in sys.argv[1:])\n"
        "train_stage(latents, training_stage(train_config(steps=6)), None, work, out)\n"
    )
    together = tmp_path / "together"
    together.mkdir()
    root = Path(__file__).resolve().parents[3]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        + [str(latents), str(tmp_path / "work2"), str(together)],
        check=True,
        timeout=600,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{Path(__file__).parents[1]}:{Path(__file__).parent}",
        },
    )
    alone, _ = run(latents, tmp_path, "alone", steps=6)
    assert json.loads((together / "report.json").read_text())["ranks"] == 2
    expected, got = load(alone / "step-00000006"), load(together / "step-00000006")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-4)
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (alone, together)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
