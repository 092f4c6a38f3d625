"""Sample grids of a stage with sharded weights and experts, on CPU with gloo, equal those of one process.

All jobs with the same number of ranks run in one set of processes, one after another.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_robust import Ranks, same_weights
from tiny_pipeline import TEXT_WIDTH, make_components
from torch.distributed.tensor import DTensor
from train_helpers import train_config, training_stage, transformer_config, write_latents

from model.layers import moe
from model.train.run import train_stage
from tasks.training import samples

pytestmark = pytest.mark.slow
STEPS, EVERY = 4, 2
PROMPTS = ("a photo of one red circle and two green square", "blue circle")  # of two lengths: the text has a mask
COMMON = {"steps": STEPS, "checkpoint_every_steps": 2, "sample_every_steps": EVERY, "sample_prompts": PROMPTS}
BF16 = {"dtype": "bfloat16"}
# Name: (ranks, changes of the train section).
JOBS = {
    "one": (1, {}),
    "one_bf16": (1, BF16),
    "fsdp": (2, {}),
    "experts": (2, {"expert_parallel": 2}),
    "experts_unsampled": (2, {"expert_parallel": 2, "sample_every_steps": 0}),
    "experts_bf16": (2, {"expert_parallel": 2, **BF16}),
    "broken": (2, {}),
}


@contextlib.contextmanager
def watched(model, observed):
    """Records the types in which the experts compute, and whether the process or the model stays changed."""
    types, random_numbers, plain = set(), torch.get_rng_state(), moe.Experts.forward

    def forward(self, rows):
        out = plain(self, rows)
        types.add(str(out.dtype).removeprefix("torch."))
        return out

    def sharded():
        return [isinstance(parameter, DTensor) for parameter in model.transformer_blocks.parameters()]

    before = model.training, sharded()
    moe.Experts.forward = forward
    try:
        yield
    finally:
        moe.Experts.forward = plain
        observed.setdefault("types", []).append(sorted(types))
        kept = before == (model.training, sharded()) and torch.equal(random_numbers, torch.get_rng_state())
        observed.setdefault("left_as_it_was", []).append(kept)


def failure(call) -> dict:
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error), "seconds": time.monotonic() - begin}
    return {}


def run_job(folder: Path, name: str, rank: int) -> None:
    model = transformer_config(joint_attention_dim=TEXT_WIDTH)
    stage = training_stage(train_config(**COMMON | JOBS[name][1]), model)
    observed: dict = {}
    write = samples.sampler(folder / ("lost" if name == "broken" else "components"), 64, stage)

    def sample(model, step, path):
        with watched(model, observed):
            write(model, step, path)
        if name == "fsdp" and step == STEPS:
            observed["not_written"] = failure(lambda: write(model, step, folder / "taken.png"))

    job = folder / name
    (job / "out").mkdir(parents=True, exist_ok=True)
    observed["failed"] = failure(
        lambda: train_stage(folder / "latents", stage, None, job / "work", job / "out", sample)
    )
    (job / f"observed-{rank}.json").write_text(json.dumps(observed))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with every job's outputs, and each rank's records."""
    folder = tmp_path_factory.mktemp("samples")
    make_components(folder / "components")
    (folder / "taken.png").mkdir()
    write_latents(folder / "latents", text_dim=TEXT_WIDTH)

    def run(ranks, rank):
        if rank:
            samples._load = samples._save = None  # only the first one may
        for name in JOBS:
            if JOBS[name][0] == ranks:
                run_job(folder, name, rank)

    for ranks in (1, 2):
        assert Ranks(lambda rank: run(ranks, rank), ranks).codes() == {0}
    return folder


def observed(runs: Path, job: str) -> list[dict]:
    return [json.loads((runs / job / f"observed-{rank}.json").read_text()) for rank in range(JOBS[job][0])]


def grids(runs: Path, job: str) -> np.ndarray:
    """Pixels of the grids of all steps [steps, height, width, 3]."""
    paths = [runs / job / "out" / "samples" / f"step-{step:08d}.png" for step in range(EVERY, STEPS + 1, EVERY)]
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def test_ranks_that_share_weights_and_experts_draw_what_one_process_draws(runs):
    expected = grids(runs, "one")
    assert expected.shape[1:] == (2 * 64, 4 * 64, 3) and expected.std() > 5
    assert np.abs(expected[0] - expected[1]).max() > 5  # training in between changes the grid
    for job in ("fsdp", "experts"):
        assert np.abs(grids(runs, job) - expected).max() <= 1, job
        assert [rank["failed"] for rank in observed(runs, job)] == [{}, {}]


def test_bfloat16_training_is_sampled_in_bfloat16_on_one_process_and_on_several(runs):
    exact = grids(runs, "one")
    for job in ("one", "fsdp", "experts"):
        assert all(rank["types"] == 2 * [["float32"]] for rank in observed(runs, job))
    for job in ("one_bf16", "experts_bf16"):
        assert all(rank["types"] == 2 * [["bfloat16"]] for rank in observed(runs, job)), job
        difference = np.abs(grids(runs, job) - exact)
        assert 0 < difference.mean() < 2, job


def test_sampling_leaves_training_as_it_was(runs):
    assert same_weights(runs / "experts_unsampled" / "out", runs / "experts" / "out") == [2, 4]
    for job in ("one", "one_bf16", "fsdp", "experts", "experts_bf16"):
        assert all(rank["left_as_it_was"] == [True, True] for rank in observed(runs, job)), job


def test_what_fails_on_the_first_rank_ends_all_of_them_at_once(runs):
    for first, second in (
        [rank["failed"] for rank in observed(runs, "broken")],  # its components are not there
        [rank["not_written"] for rank in observed(runs, "fsdp")],  # there is a folder in the grid's place
    ):
        assert first["type"] in ("OSError", "IsADirectoryError") and second["type"] == "RuntimeError"
        assert second["message"] == f"rank 0 could not sample: {first['type']}: {first['message']}"
        assert first["seconds"] < 30 and second["seconds"] < 30
