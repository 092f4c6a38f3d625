"""One training in many layouts, on CPU with gloo: the same losses and weights as one process, within fp32 rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_helpers import read_weights, transformer_config

from model.merge import merge
from model.plan.memory import Layout, Shapes
from model.weights.export import load_transformer

pytestmark = pytest.mark.slow

STEPS = 4
# Sums have another order. Adam's first steps divide by the root of a square, which enlarges the differences.
WEIGHTS = {"rtol": 0, "atol": 1e-5}
VALUES = 1e-5
SAME_MODEL = (
    "replicas2", "fsdp2", "ep2", "fsdp4", "hsdp2x2", "ep2_fsdp2", "ep2_replicas2_accumulated", "fsdp2_accumulated",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with every job of parallel_worker.py."""
    folder = tmp_path_factory.mktemp("parallel")
    here = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, str(here / "parallel_worker.py"), str(folder)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])},
    )
    return folder


def lines(runs: Path, job: str) -> list[dict]:
    return [json.loads(line) for line in (runs / job / "out" / "metrics.jsonl").read_text().splitlines()]


def weights(runs: Path, job: str) -> dict[str, torch.Tensor]:
    return read_weights(runs / job / "out")[STEPS]


def assert_same_training(runs: Path, job: str, reference: str) -> None:
    expected, got = weights(runs, reference), weights(runs, job)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **WEIGHTS, msg=lambda text: f"{job}: {name}: {text}")
    for before, after in zip(lines(runs, reference), lines(runs, job), strict=True):
        assert after["step"] == before["step"]
        assert after["loss"] == pytest.approx(before["loss"], rel=VALUES), job
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=VALUES), job
        assert after.keys() == before.keys() and after["lr/Muon"] == before["lr/Muon"]
        bins = [name for name in before if name.startswith("loss_t/")]
        assert bins and [after[name] for name in bins] == pytest.approx([before[name] for name in bins], rel=VALUES), (
            job
        )


def test_every_layout_trains_as_one_process_does(runs):
    reference = lines(runs, "one")
    assert all(line["grad_norm"] > 0.05 for line in reference)  # so that every step is clipped, by the global norm
    for job in SAME_MODEL:
        assert_same_training(runs, job, "one")


def test_replicas_add_up_their_gradients_once_a_step_however_many_micro_batches_it_has(runs):
    """As the planner counts: a rank's weights without the routers, which all ranks reduce together."""
    shapes = Shapes(transformer_config(moe_intermediate_dim=33))
    for job, layout in (
        ("hsdp2x2", Layout(gpus=4, shard=2, expert_parallel=1, micro_batch=2, checkpointing="none")),
        ("ep2_replicas2_accumulated", Layout(gpus=4, shard=2, expert_parallel=2, micro_batch=1, checkpointing="none")),
    ):
        routers = sum(shapes.per_gpu(layout, prefix=f"transformer_blocks.{i}.img_mlp.gate") for i in (1, 2))
        summed = torch.load(runs / job / "sample-0.pt")["replicated"]
        assert summed == STEPS * (shapes.trainable_per_gpu(layout) - routers), job


def test_matrices_that_fsdp_cuts_are_orthogonalised_whole(runs):
    for job in ("few_fsdp4", "few_ep2_fsdp2"):
        assert_same_training(runs, job, "few_one")


def test_token_choice_shares_out_experts_too(runs):
    assert_same_training(runs, "tokens_ep2_fsdp2", "tokens_one")


def test_guidance_is_trained_in_alike_by_ranks_that_share_the_weights(runs):
    assert_same_training(runs, "guided_ep2_fsdp2", "guided_one")
    assert lines(runs, "guided_one")[-1]["loss"] != lines(runs, "one")[-1]["loss"]


def test_ranks_guide_away_from_the_weights_that_the_stage_started_from(runs):
    assert_same_training(runs, "autoguided_ep2_fsdp2", "autoguided_one")
    guided, without = (
        [line["loss"] for line in lines(runs, job)] for job in ("autoguided_one", "without_autoguidance")
    )
    assert guided[0] == without[0]  # guidance begins at the second step
    assert all(abs(a - b) > 1e-4 for a, b in zip(guided[1:], without[1:]))


def test_a_resumed_stage_guides_away_from_the_same_weights(runs):
    assert json.loads((runs / "autoguided_resumed" / "out" / "report.json").read_text())["resumed_from_step"] == 2
    resumed, whole = (weights(runs, job) for job in ("autoguided_resumed", "autoguided_one"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_checkpoint_of_one_layout_resumes_in_another(runs):
    for job in ("from_one_to_ep2_fsdp2", "from_ep2_to_one", "from_ep2_fsdp2_to_hsdp2x2"):
        report = json.loads((runs / job / "out" / "report.json").read_text())
        assert report["resumed_from_step"] == 2
        assert_same_training(runs, job, "one")  # which a lost momentum or moment would change by 1e-2


def test_a_stage_continues_in_another_layout_with_the_optimiser_of_the_previous_stage(runs):
    assert_same_training(runs, "next_ep2_fsdp2", "next_one")
    assert [line["lr/Muon"] for line in lines(runs, "next_ep2_fsdp2")] == [0.01] * STEPS  # no second warm-up


def test_released_weights_start_a_sharded_training(runs):
    assert len(list((runs / "released").glob("*.safetensors"))) > 2
    assert_same_training(runs, "released_ep2_fsdp2", "released_one")
    start, scratch = (weights(runs, job)["img_in.weight"] for job in ("released_one", "one"))
    assert (start - scratch).abs().max() > 0.05


def test_weights_of_experts_spread_over_ranks_merge_into_a_transformer(runs, tmp_path):
    config = transformer_config(moe_intermediate_dim=33)
    saved = sorted((runs / "ep2_fsdp2" / "out").glob("step-*"))
    assert len(saved) == 2
    merge(saved[-1:], [1.0], tmp_path / "one", config)
    model = load_transformer(tmp_path / "one")
    expected = weights(runs, "ep2_fsdp2")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    merge(saved, [0.5, 0.5], tmp_path / "both", config)
    first = read_weights(runs / "ep2_fsdp2" / "out")[2]
    name = "transformer_blocks.1.img_mlp.experts.gate_up_proj"
    got = load_transformer(tmp_path / "both").state_dict()[name]
    torch.testing.assert_close(got, (first[name] + expected[name]) / 2)


def test_every_rank_samples_what_one_process_samples(runs):
    expected = torch.load(runs / "one" / "sample-0.pt")
    for job in ("fsdp4", "ep2_fsdp2", "hsdp2x2"):
        for rank in range(4):
            got = torch.load(runs / job / f"sample-{rank}.pt")
            torch.testing.assert_close(got["latents"], expected["latents"], rtol=1e-4, atol=1e-4)
            assert got["whole_blocks"] == [1, 1, 1], "text keys and values of one gathered block at a time"


def test_bfloat16_keeps_weights_router_and_reduction_in_fp32(runs):
    """bf16 is as close to fp32 when sharded as in one process, and logits are not bf16 numbers."""
    reference = [line["loss"] for line in lines(runs, "one")]
    for job in ("bf16_one", "bf16_ep2_fsdp2"):
        assert [line["loss"] for line in lines(runs, job)] == pytest.approx(reference, rel=0.01)
        assert all(value.dtype == torch.float32 for value in weights(runs, job).values())
    sample = torch.load(runs / "bf16_ep2_fsdp2" / "sample-0.pt")
    assert sample["reduced"] == [torch.float32]
    logits = sample["logits"]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_dist_muon_updates_as_our_muon_does(runs):
    """torchtitan's DistMuon runs our Newton-Schulz iteration here, so the test covers the choice of matrices, their ranks,
    momentum and rates."""
    attention = tuple(f"{name}.weight" for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0"))
    feed_forward = ("net.0.proj.weight", "net.2.weight")
    for job, reference, taken in (
        ("dist_muon_fsdp2", "one", attention + feed_forward),
        ("dist_muon_hsdp2x2", "one", attention + feed_forward),  # from a checkpoint of our Muon
        ("dist_muon_few_fsdp4", "few_one", attention + feed_forward),
        ("dist_muon_rms_ep2_fsdp2", "rms_one", attention + feed_forward + ("experts.down_proj",)),
    ):
        assert_same_training(runs, job, reference)
        names = torch.load(runs / job / "sample-0.pt")["taken"]
        assert {name for name in weights(runs, job) if name.endswith(taken) and "blocks" in name} == names, job


def test_dist_muon_by_its_own_iteration_trains_as_ours_does(runs):
    job = "dist_muon_rms_fsdp2_bf16_iteration"
    start, expected, got = read_weights(runs / "rms_one" / "out")[2], weights(runs, "rms_one"), weights(runs, job)
    names = torch.load(runs / job / "sample-0.pt")["taken"]
    changes = [[after[name] - start[name] for name in names] for after in (expected, got)]
    alike = torch.stack([torch.cosine_similarity(*map(torch.flatten, pair), dim=0) for pair in zip(*changes)])
    assert alike.mean() > 0.9 and alike.min() > 0.75  # small singular values end between 0.3 and 1.2
    sizes = [torch.stack([change.norm() for change in of_run]) for of_run in changes]
    torch.testing.assert_close(sizes[1], sizes[0], rtol=0.2, atol=0)
    reference = [line["loss"] for line in lines(runs, "rms_one")]
    assert [line["loss"] for line in lines(runs, job)] == pytest.approx(reference, rel=0.01)
