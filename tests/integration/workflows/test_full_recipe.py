"""Everything that recipes/nucleus_17b.yaml turns on, together, at a small size: bf16, compiled blocks, selective
checkpointing, experts over ranks, FSDP2, background checkpoints and read-ahead.

CPU and gloo stand for GPUs and NCCL. Three stages, each from the last, run on torch.compile's backend "aot_eager": the
compiler without its C++ kernels, which build slowly. A training of one block runs on "inductor", as in the recipe.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_recipe_worker import JOBS, RESUMED_FROM, STEPS, Job, small_recipe, stage_section
from train_helpers import read_weights

import model.train.run as run
from model.ranks import rank_degrees
from model.train.config import trainer_config
from model.weights.checkpoints import finished_checkpoints
from model.weights.export import load_transformer
from tasks.encoding.buckets import stage_buckets
from tasks.merging.merge_stage import merge_stage

pytestmark = pytest.mark.slow
STAGES = ("first", "first_plain", "second", "third", "third_plain")
RESUME = ("whole", "whole_plain", "resumed")


def trained(folder: Path, backend: str, jobs: tuple[str, ...]) -> Path:
    """The folder, with these jobs of full_recipe_worker.py."""
    here = Path(__file__).resolve().parents[1]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # everything is compiled here, without a cache
    command = [sys.executable, here / "full_recipe_worker.py", folder, backend, *jobs]
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **environment})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("stages"), "aot_eager", STAGES)


def lines(runs: Path, job: str) -> list[dict]:
    return [json.loads(line) for line in (runs / job / "out" / "metrics.jsonl").read_text().splitlines()]


def ranks_of(runs: Path, job: str) -> list[dict]:
    return [json.loads((runs / job / f"rank{rank}.json").read_text()) for rank in range(JOBS[job].ranks)]


def test_the_small_recipe_has_all_settings_of_the_17b_recipe():
    recipe = small_recipe()
    train = recipe.train
    assert (train.dtype, train.compile, train.activation_checkpointing) == ("bfloat16", True, "selective")
    assert train.async_checkpoint and train.num_workers and train.caption_dropout and train.skip.spike_mads
    assert train.losses.router_z_loss and train.losses.router_orthogonality and train.losses.wavelet
    assert [stage.wavelet for stage in train.stages] == [False, False, True]
    assert rank_degrees(recipe.model, train, 2) == (1, 2, 2)


def assert_trains_alike(got: list[dict], expected: list[dict]) -> None:
    """Within bf16's rounding. Weights diverge at these rates, and gradients sooner than losses."""
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert all(math.isfinite(value) for line in got for value in line.values())
    for one, other in zip(got, expected):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02), one["step"]
        if one["step"] <= 4:
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.03), one["step"]
    assert got[-1]["skipped_steps"] == 0 and got[-1]["loss"] < 0.8 * got[0]["loss"]


def test_training_equals_one_process_in_fp32_without_compiler(runs):
    for job in ("first", "third"):
        assert_trains_alike(lines(runs, job), lines(runs, f"{job}_plain"))


def test_every_aspect_ratio_runs_on_the_graphs_of_the_first(runs):
    """One for each kind of block: dense, and of each capacity factor. Nothing falls back to uncompiled code."""
    for job, graphs in (("second", 2), ("third", 3)):
        stage = stage_section(JOBS[job])
        buckets = stage_buckets(stage.stage.image_size_px, stage.stage.aspect_ratios)
        ranks = ranks_of(runs, job)
        for rank in ranks:
            assert (rank["graphs"], rank["breaks"]) == (graphs, [])
            assert job != "third" or len(rank["shapes"]) == len(buckets) == 7
        lengths, masked = map(set, zip(*(text for rank in ranks for text in rank["texts"])))
        assert len(lengths) > 1 and masked == {True, False}
    assert all(rank["graphs"] == 0 for rank in ranks_of(runs, "first_plain"))


def test_compiled_blocks_sample_on_every_rank_while_they_train(runs):
    for step in (2, 4):
        expected = torch.load(runs / "first_plain" / f"sample0-{step}.pt")
        one, other = (torch.load(runs / "first" / f"sample{rank}-{step}.pt") for rank in range(2))
        assert torch.equal(one, other)
        assert (one - expected).norm() < 0.1 * expected.norm()
    for rank in ranks_of(runs, "first"):  # 2 to train, and 2 to sample; the first block may need its own graphs
        assert rank["graphs"] <= 5 and rank["breaks"] == []


def test_a_stage_hands_on_its_last_checkpoints_and_the_next_starts_from_the_last(runs):
    for job, steps, optimizer in (("first", [4], [4]), ("second", [4], [4]), ("third", [4, 8, 12], [])):
        assert list(finished_checkpoints(runs / job / "out")) == steps
        assert list(finished_checkpoints(runs / job / "out" / "optimizer")) == optimizer
        assert list(finished_checkpoints(runs / job / "work" / "checkpoints")) == steps[-2:]
        report = json.loads((runs / job / "out" / "report.json").read_text())
        assert report["checkpoints"] == steps and report["ranks"] == 2 and report["skipped_steps"] == 0
    claimed = {job: json.loads((runs / job / "work" / "run.json").read_text()) for job in ("first", "second", "third")}
    assert claimed["first"]["init_from"] is None
    assert claimed["second"]["init_from"] == run._content(runs / "first" / "out" / "step-00000004")
    first, second = (read_weights(runs / job / "out")[4] for job in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)


def test_a_change_of_stage_changes_capacity_and_resolution_and_nothing_else(runs):
    sections = [stage_section(Job(stage)) for stage in range(3)]
    models = [section.model for section in sections]
    same = [model.model_dump(exclude={"capacity_factors"}) for model in models]
    assert same[0] == same[1] == same[2]
    assert [model.capacity_factor(3) for model in models] == [8.0, 4.0, 4.0]
    assert [model.capacity_factor(4) for model in models] == [8.0, 4.0, 2.0]
    apart = {"keep_checkpoints"}  # only the last stage is merged
    assert len({section.train.model_dump_json(exclude=apart) for section in sections}) == 1
    own = ("name", "image_size_px", "steps", "batch_size", "capacity_factors", "wavelet")
    own += ("tier_weights", "bucket_weights", "caption_weights")
    kept = [section.stage.model_dump(exclude=set(own)) for section in sections]
    assert kept[0] == kept[1] == kept[2]
    configs = [
        trainer_config(
            section,
            latents_dir=runs / "latents0",
            work_dir=runs,
            init_from=None,
            ranks=2,
        )
        for section in sections
    ]
    for part in ("optimizer", "lr_scheduler", "parallelism", "activation_checkpoint", "compile"):
        assert len({str(getattr(config, part)) for config in configs}) == 1, part
    assert [config.training.local_batch_size for config in configs] == [2, 2, 2]
    begun = {job: torch.load(runs / job / "start.pt") for job in STAGES}
    rates = {"lr/Muon": 0.01, "lr/AdamW": 0.01}
    for job in ("first", "first_plain"):
        assert begun[job]["optimizer"] == {} and begun[job]["rates"] == {name: rate / 2 for name, rate in rates.items()}
    # Steps so far are those of all stages: one warm-up, of 2 steps. The plain stage is on one process, not on two.
    for job, before, steps in (("second", "first", 4), ("third", "second", 8), ("third_plain", "second", 8)):
        (left,), (weights,) = (read_weights(runs / before / "out" / part).values() for part in ("optimizer", "."))
        start = begun[job]
        assert start["rates"] == rates and start["lr_scheduler"] == left["lr_scheduler"] == {"last_epoch": steps}
        for expected, got in ((left["optimizer"], start["optimizer"]), (weights, start["weights"])):
            assert expected.keys() == got.keys() and len(expected) > 50
            assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
        moments = [value for name, value in left["optimizer"].items() if not name.endswith(".step")]
        assert sum(bool(value.any()) for value in moments) > 0.9 * len(moments)
        assert {value.item() for name, value in left["optimizer"].items() if name.endswith(".step")} == {steps}


def test_the_last_stage_merges_into_a_transformer_that_loads(runs, tmp_path):
    recipe, section = small_recipe(), stage_section(JOBS["third"])
    report = merge_stage(runs / "third" / "out", section.model, recipe.merge, tmp_path)
    assert report["steps"] == [4, 8, 12]
    merged, last = load_transformer(tmp_path / "transformer"), read_weights(runs / "third" / "out")[12]
    assert merged.config.capacity_factors == (4.0, 4.0, 4.0, 4.0, 2.0)
    assert merged.state_dict().keys() == last.keys()
    assert all(torch.isfinite(tensor).all() for tensor in merged.state_dict().values())


def test_a_finished_stage_that_is_started_again_trains_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "trainer_config", None)  # training calls it first
    stage = stage_section(JOBS["third"])
    latents, init = runs / "latents2", runs / "second" / "out"
    report = run.train_stage(latents, stage, init, runs / "third" / "work", tmp_path)
    assert report["resumed_from_step"] == stage.stage.steps
    weights = "step-00000012/__1_0.distcp"
    assert (tmp_path / weights).read_bytes() == (runs / "third" / "out" / weights).read_bytes()


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile's inductor needs a C++ compiler on a CPU",
)
def test_a_stage_that_was_killed_and_resumed_ends_with_the_bits_of_the_undisturbed_one(tmp_path):
    """In the same layout, with inductor's kernels, although a resumed process meets other shapes first, and compiles
    again."""
    runs = trained(tmp_path, "inductor", RESUME)
    report = json.loads((runs / "resumed" / "out" / "report.json").read_text())
    assert report["resumed_from_step"] == RESUMED_FROM
    for rank in (*ranks_of(runs, "whole"), *ranks_of(runs, "resumed")):
        assert rank["graphs"] == 1
    for rank, undisturbed in zip(ranks_of(runs, "resumed"), ranks_of(runs, "whole")):
        # It compiles on the first batch of each bucket, as the undisturbed one did.
        first = [step for step in rank["steps"] if step < RESUMED_FROM]
        assert first[0] == 0 and set(range(RESUMED_FROM, STEPS)) <= set(rank["steps"])
        assert len(undisturbed["shapes"]) == len(rank["shapes"]) == 7
    assert_trains_alike(lines(runs, "whole"), lines(runs, "whole_plain"))
    expected, got = read_weights(runs / "whole" / "out"), read_weights(runs / "resumed" / "out")
    assert list(expected) == list(got) == [4, 8, 12]
    for step, state in expected.items():
        assert state.keys() == got[step].keys() and len(state) > 20
        assert [name for name, value in state.items() if not torch.equal(value, got[step][name])] == []
    whole, resumed = ([line["loss"] for line in lines(runs, job)] for job in ("whole", "resumed"))
    assert whole == resumed
