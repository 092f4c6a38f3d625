"""Trains one tiny stage in many layouts: `python parallel_worker.py FOLDER`. Imports once, then forks each job's ranks.

FOLDER/latents, FOLDER/released
FOLDER/JOB/work/, FOLDER/JOB/out/       of model.train.run.train_stage
FOLDER/JOB/sample-{rank}.pt             what every rank sampled with its (sharded) model after the last step
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train_helpers import TEXT_DIM, fork_ranks, train_config, training_stage, transformer_config, write_latents

from model.config import GuidanceConfig
from model.optim import newton_schulz
from model.sampling.sampler import sample_latents
from model.train.run import train_stage
from model.transformer import Block, NucleusTransformer, RouterTrace
from model.weights.export import export_transformer

from torchtitan.distributed.flex_shard import dist_muon

STEPS = 4
# Uneven on purpose: 66 rows of the shared experts' first matrix do not divide by 4.
MODEL = {"moe_intermediate_dim": 33}
# Fewer experts than ranks: FSDP then cuts each expert's matrices.
FEW_EXPERTS = {"num_experts": 2, "moe_intermediate_dim": 32}
EP2_FSDP2 = {"expert_parallel": 2}
TOKEN_CHOICE = {**MODEL, "routing": {"kind": "token_choice"}}  # ranks differ in their fullest expert
BALANCED = {"losses": {"load_balance": 0.01}}
OPTIM = {"muon_lr": 0.01, "adamw_lr": 0.01, "warmup_steps": 3, "max_grad_norm": 0.05, "muon_weight_decay": 0.1}
RMS = {"optim": {**OPTIM, "muon_scale": "rms"}}
DIST_MUON = {"muon_implementation": "torchtitan"}
NEXT = {"stage": {"name": "next"}}
GUIDED = {"stage": {"guidance": {"steps": 3, "scale": 3.0}, "decay": {"steps": 2, "to": 0.1}}, "caption_dropout": 0.3}
AUTOGUIDED = {"stage": {"name": "next"}, "caption_dropout": 0.3}
# Only a later stage may have it, and the configurations here have one.
GUIDANCE = {
    "autoguided": GuidanceConfig(steps=3, scale=3.0, autoguidance=2.0),
    "without": GuidanceConfig(steps=3, scale=3.0),
}
RELEASED = {"init_from": "released"}  # below FOLDER

# name: (ranks, changes of the train section, changes of the model, the job whose step 2 it resumes from)
JOBS = {
    "one": (1, {}, MODEL, None),
    "replicas2": (2, {"data_parallel_replicate": 2}, MODEL, None),
    "fsdp2": (2, {}, MODEL, None),
    "ep2": (2, {"expert_parallel": 2}, MODEL, None),
    "fsdp4": (4, {}, MODEL, None),
    "hsdp2x2": (4, {"data_parallel_replicate": 2}, MODEL, None),
    "ep2_fsdp2": (4, EP2_FSDP2, MODEL, None),
    "ep2_replicas2_accumulated": (
        4, {"expert_parallel": 2, "data_parallel_replicate": 2, "local_batch_size": 1}, MODEL, None
    ),
    "fsdp2_accumulated": (2, {"local_batch_size": 2, "activation_checkpointing": "full"}, MODEL, None),
    "from_one_to_ep2_fsdp2": (4, EP2_FSDP2, MODEL, "one"),
    "from_ep2_to_one": (1, {}, MODEL, "ep2"),
    "from_ep2_fsdp2_to_hsdp2x2": (4, {"data_parallel_replicate": 2}, MODEL, "ep2_fsdp2"),
    "few_one": (1, {}, FEW_EXPERTS, None),
    "few_fsdp4": (4, {}, FEW_EXPERTS, None),
    "few_ep2_fsdp2": (4, EP2_FSDP2, FEW_EXPERTS, None),
    "tokens_one": (1, BALANCED, TOKEN_CHOICE, None),
    "tokens_ep2_fsdp2": (4, {**BALANCED, **EP2_FSDP2, "activation_checkpointing": "selective"}, TOKEN_CHOICE, None),
    "bf16_one": (1, {"dtype": "bfloat16"}, MODEL, None),
    "bf16_ep2_fsdp2": (
        4, {"dtype": "bfloat16", "activation_checkpointing": "selective", **EP2_FSDP2}, MODEL, None
    ),
    "dist_muon_fsdp2": (2, DIST_MUON, MODEL, None),
    "dist_muon_hsdp2x2": (4, {**DIST_MUON, "data_parallel_replicate": 2}, MODEL, "one"),
    "dist_muon_few_fsdp4": (4, DIST_MUON, FEW_EXPERTS, None),
    "rms_one": (1, RMS, MODEL, None),
    "dist_muon_rms_ep2_fsdp2": (4, {**RMS, **DIST_MUON, **EP2_FSDP2}, MODEL, None),
    "dist_muon_rms_fsdp2_bf16_iteration": (2, {**RMS, **DIST_MUON}, MODEL, None),
    "next_one": (1, NEXT, MODEL, None),
    "next_ep2_fsdp2": (4, {**NEXT, **EP2_FSDP2}, MODEL, None),
    "guided_one": (1, GUIDED, MODEL, None),
    "guided_ep2_fsdp2": (4, {**GUIDED, **EP2_FSDP2, "activation_checkpointing": "full"}, MODEL, None),
    "autoguided_one": (1, AUTOGUIDED, MODEL, None),
    "autoguided_ep2_fsdp2": (4, {**AUTOGUIDED, **EP2_FSDP2, "activation_checkpointing": "full"}, MODEL, None),
    "without_autoguidance": (1, AUTOGUIDED, MODEL, None),
    "autoguided_resumed": (1, AUTOGUIDED, MODEL, "autoguided_one"),
    "released_one": (1, RELEASED, MODEL, None),
    "released_ep2_fsdp2": (4, {**RELEASED, **EP2_FSDP2}, MODEL, None),
}  # fmt: skip
STAGE_BEFORE = {job: "one" for job in JOBS if job.startswith(("next_", "autoguided_", "without_"))}


class CpuStream(torch.cpu.Stream):
    def __init__(self, priority: int = -1, device: object = None):
        super().__init__(priority)


def allow_dist_muon_on_cpus() -> None:
    """DistMuon checks for CUDA, but uses only streams and events, which torch.cpu has as no-ops."""
    dist_muon.DistMuon._validate_parameter_storage = lambda optimizer: torch.device("cpu")
    torch.cpu.Stream = CpuStream


def note_dist_muon(taken: set[str], own_iteration: bool) -> None:
    """Records what DistMuon updates in this process from now on. By default in fp32, by our Muon's iteration."""
    prepare = dist_muon.DistMuon._prepare_local

    def noting(optimizer, layout, out):
        taken.add(layout.fqn)
        prepare(optimizer, layout, out)

    dist_muon.DistMuon._prepare_local = noting
    if not own_iteration:
        dist_muon._zeropower_via_newtonschulz = lambda update, *, ns_coefficients, ns_steps, eps: newton_schulz(
            update, ns_steps
        )


def note_reduced(types: set[torch.dtype]) -> None:
    """Records the types of the gradients that FSDP reduces in this process from now on."""
    reduce_scatter = dist.reduce_scatter_single

    def noting(*, input, **kwargs):
        types.add(input.dtype)
        return reduce_scatter(input=input, **kwargs)

    dist.reduce_scatter_single = noting


def note_all_reduced(numbers: list[int], ranks: int) -> None:
    """Records how many numbers this process sums with groups of `ranks` ranks from now on."""
    all_reduce = dist.all_reduce

    def noting(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if dist.get_world_size(group) == ranks and op == dist.ReduceOp.SUM:
            numbers.append(tensor.numel())
        return all_reduce(tensor, op, group, async_op)

    dist.all_reduce = noting


def sample(model: torch.nn.Module, path: Path, **seen) -> None:
    """Two steps of sampling, with the text's keys and values computed separately, and the router's outputs."""
    generator = torch.Generator().manual_seed(0)
    text, noise = torch.randn(1, 8, TEXT_DIM, generator=generator), torch.randn(1, 16, 64, generator=generator)
    whole_blocks = []
    plain = Block.text_kv

    def watched(block: Block, *args):
        cut = [isinstance(other.attn.to_k.weight, DTensor) for other in model.transformer_blocks]
        whole_blocks.append(cut.count(False))
        return plain(block, *args)

    Block.text_kv = watched
    latents = sample_latents(model, text, None, None, None, noise, (1, 4, 4), 2, 1.0)
    Block.text_kv = plain
    trace = RouterTrace()
    model(noise, (1, 4, 4), text, None, torch.tensor([0.5]), collect=trace)
    seen |= {"latents": latents, "whole_blocks": whole_blocks, "logits": trace.logits()[0]}
    torch.save(seen, path)


def train(folder: Path, name: str, rank: int) -> None:
    ranks, train_changes, model_changes, resumed = JOBS[name]
    if "init_from" in train_changes:
        train_changes = {**train_changes, "init_from": str(folder / train_changes["init_from"])}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    job, reduced, taken, replicated = folder / name, set(), set(), []
    note_reduced(reduced)
    note_all_reduced(replicated, train_changes.get("data_parallel_replicate", 1))
    allow_dist_muon_on_cpus()
    note_dist_muon(taken, own_iteration=name.endswith("bf16_iteration"))
    dist.init_process_group("gloo", store=dist.FileStore(str(job / "store"), ranks), rank=rank, world_size=ranks)
    config = train_config(
        steps=STEPS,
        log_every_steps=1,
        checkpoint_every_steps=2,
        sample_every_steps=STEPS,
        **{"optim": OPTIM, **train_changes},
    )
    stage = training_stage(config, transformer_config(**model_changes), hand_on_optimizer=True)
    if guidance := GUIDANCE.get(name.split("_")[0]):
        stage = stage.model_copy(update={"stage": stage.stage.model_copy(update={"guidance": guidance})})
    train_stage(
        folder / "latents",
        stage,
        folder / STAGE_BEFORE[name] / "out" if name in STAGE_BEFORE else None,
        job / "work",
        job / "out",
        lambda model, step, path: sample(
            model, job / f"sample-{rank}.pt", reduced=list(reduced), taken=taken, replicated=sum(replicated)
        ),
    )
    dist.destroy_process_group()


def run(folder: Path, name: str) -> None:
    ranks, _, _, resumed = JOBS[name]
    job = folder / name
    (job / "out").mkdir(parents=True)
    if resumed:
        # As a run that was killed after step 2 leaves it.
        shutil.copytree(folder / resumed / "work", job / "work")
        for lost in (f"checkpoints/step-{STEPS}", f"weights/step-{STEPS:08d}"):
            shutil.rmtree(job / "work" / lost)
    fork_ranks(name, ranks, lambda rank: train(folder, name, rank))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_latents(root / "latents")
    torch.manual_seed(7)
    released = NucleusTransformer(transformer_config(**MODEL, capacity_factors=1.0)).to(torch.bfloat16)
    export_transformer(released, root / "released", max_shard_size="50KB")
    for job_name in sys.argv[2:] or JOBS:
        run(root, job_name)
