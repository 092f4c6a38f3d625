"""Trains a small version of recipes/nucleus_17b.yaml: `python full_recipe_worker.py FOLDER BACKEND JOB...`, with a
BACKEND of torch.compile. Imports once, then forks each job's ranks, which find each other as torch elastic's workers
do.

    FOLDER/latents{stage}
    FOLDER/JOB/work/, FOLDER/JOB/out/       of model.train.run.train_stage
    FOLDER/JOB/sample{rank}-{step}.pt       what each rank sampled, where a job samples
    FOLDER/JOB/rank{rank}.json              what its compiler did, and the shapes of its micro-batches
    FOLDER/JOB/start.pt                     optimiser state, schedule, rates and weights before the first step
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train_helpers import fork_ranks

import model.train.config as train_config
from model.data.latents import LatentWriter
from model.sampling.sampler import sample_latents
from model.stages import TrainingStage, training_stages
from model.train.run import train_stage
from model.train.trainer import NucleusTrainer
from tasks.encoding.buckets import stage_buckets
from tasks.recipe import Recipe, load_recipe

from torchtitan.config import CompileConfig

RANKS = 2
TEXT_DIM = 24
STEPS, RESUMED_FROM = 12, 8  # of the last stage
# Only sizes and counts differ. Rates are higher, because steps are few.
SMALLER = (
    "model.num_layers=5",
    "model.attention_head_dim=16",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=1",
    f"model.joint_attention_dim={TEXT_DIM}",
    "model.axes_dims_rope=[4, 6, 6]",
    "model.num_experts=8",
    "model.moe_intermediate_dim=32",
    "model.capacity_factors=[4.0, 4.0, 4.0, 4.0, 2.0]",  # the two that are released
    "train.stages[2].capacity_factors=[4.0, 4.0, 4.0, 4.0, 2.0]",
    "train.stages[0].image_size_px=64",
    "train.stages[1].image_size_px=96",
    "train.stages[2].image_size_px=128",
    "train.stages[0].batch_size=8",
    "train.stages[1].batch_size=4",
    "train.stages[2].batch_size=4",
    "train.stages[0].steps=4",
    "train.stages[1].steps=4",
    f"train.stages[2].steps={STEPS}",
    "train.optim.warmup_steps=2",
    "train.optim.muon_lr=0.01",
    "train.optim.adamw_lr=0.01",
    "train.local_batch_size=2",  # stage 0: two steps of accumulation
    "train.checkpoint_every_steps=4",
    "train.keep_checkpoints=3",
    "train.log_every_steps=1",
    "train.sample_every_steps=0",
    "train.nnodes=1",
    f"train.nproc_per_node={RANKS}",
    f"train.expert_parallel={RANKS}",
    "merge.last_n=3",
)
# A C++ compiler needs many seconds for each kind of block.
ONE_BLOCK = (
    *SMALLER,
    "model.num_layers=1",
    "model.dense_moe_strategy=all_moe",
    "model.capacity_factors=2.0",
    "train.stages[2].capacity_factors=2.0",
)
PLAIN = {"dtype": "float32", "compile": False, "activation_checkpointing": "none", "expert_parallel": 1}
SAMPLED = {"sample_every_steps": 2}


class Job(NamedTuple):
    stage: int
    init_from: str | None = None
    ranks: int = RANKS
    changes: dict = {}
    smaller: tuple[str, ...] = SMALLER
    resumes: str | None = None  # another job, as a kill after step RESUMED_FROM leaves it


JOBS = {
    "first": Job(0, changes=SAMPLED),
    "first_plain": Job(0, ranks=1, changes=PLAIN | SAMPLED),
    "second": Job(1, "first"),
    "third": Job(2, "second"),
    "third_plain": Job(2, "second", ranks=1, changes=PLAIN),
    "whole": Job(2, smaller=ONE_BLOCK),
    "whole_plain": Job(2, smaller=ONE_BLOCK, ranks=1, changes=PLAIN),
    "resumed": Job(2, smaller=ONE_BLOCK, resumes="whole"),
}


def small_recipe(smaller: tuple[str, ...] = SMALLER) -> Recipe:
    return load_recipe("nucleus_17b", smaller)


def stage_section(job: Job) -> TrainingStage:
    """The stage as the training task gets it."""
    recipe = small_recipe(job.smaller)
    stage = training_stages(recipe.model, recipe.train)[job.stage]
    return stage.model_copy(update={"train": stage.train.model_copy(update=job.changes)})


def write_latents(directory: Path, stage: int) -> None:
    """Images of every bucket of the stage and tier, with captions of many lengths that describe them."""
    recipe = small_recipe()
    config = recipe.train.stages[stage]
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(stage)
    patterns = torch.randn(4, 16, 1, 1, generator=generator)
    with LatentWriter(directory, text_dim=TEXT_DIM, rows_per_file=20, dtype=recipe.encoding.dtype) as writer:
        writer.add_text(torch.randn(8, TEXT_DIM, generator=generator))
        # Some batches need no mask: all their texts have the same length, and one that is not padded.
        lengths = [8 * (1 + i % 3) - (3 if i % 5 == 0 else 0) for i in range(20)]
        texts = [writer.add_text(torch.randn(length, TEXT_DIM, generator=generator)) for length in lengths]
        for b, bucket in enumerate(stage_buckets(config.image_size_px, config.aspect_ratios)):
            for i in range(10):
                noise = torch.randn(16, bucket.height // 8, bucket.width // 8, generator=generator)
                captions = [text for text in texts if text % 4 == i % 4][: 1 + i % 3]
                writer.add_image(f"{b:032x}{i:032x}", patterns[i % 4] + 0.1 * noise, f"A{1 + i % 5}", captions)


def with_backend(name: str) -> None:
    """Compiled blocks run on this backend of torch.compile; the recipe's is PyTorch's default, "inductor"."""
    train_config.CompileConfig = functools.partial(CompileConfig, backend=name)


def watch() -> dict[str, set]:
    """Notes the steps (from 0) and shapes of micro-batches."""
    seen = {"steps": set(), "shapes": set(), "texts": set()}
    forward = NucleusTrainer.forward_backward_step

    def forward_backward_step(self, *, batch, **options):
        seen["steps"].add(batch.plan.step)
        seen["shapes"].add(tuple(batch.latents.shape[-2:]))
        seen["texts"].add((batch.text.shape[1], batch.mask is not None))
        return forward(self, batch=batch, **options)

    NucleusTrainer.forward_backward_step = forward_backward_step
    return seen


def note_start(path: Path) -> None:
    """Saves the state before this process's first step, as whole tensors in every layout."""
    train_step = NucleusTrainer.train_step

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()

    def first_step(self, batches):
        begun = any(optimizer.state for optimizer in self.optimizers)
        state = {"optimizer": self.optimizers.state_dict() if begun else {}, "weights": self.model.state_dict()}
        state = {part: {name: whole(tensor) for name, tensor in tensors.items()} for part, tensors in state.items()}
        state |= {"lr_scheduler": self.lr_schedulers.state_dict(), "rates": self.lr_schedulers.get_metrics()}
        if dist.get_rank() == 0:
            torch.save(state, path)
        NucleusTrainer.train_step = train_step
        train_step(self, batches)

    NucleusTrainer.train_step = first_step


def sample(model: torch.nn.Module, path: Path) -> None:
    """As tasks.training.samples does, with text that is given."""
    generator = torch.Generator().manual_seed(0)
    text, negative = torch.randn(2, 8, TEXT_DIM, generator=generator), torch.randn(1, 8, TEXT_DIM, generator=generator)
    noise = torch.randn(2, 16, 64, generator=generator)
    torch.save(sample_latents(model, text, None, negative, None, noise, (1, 4, 4), 3, 2.0), path)


def train(folder: Path, name: str, rank: int) -> None:
    job, seen = JOBS[name], watch()
    stage, latents, here = stage_section(job), folder / f"latents{job.stage}", folder / name
    init_from = folder / job.init_from / "out" if job.init_from else None
    draw = lambda model, step, path: sample(model, here / f"sample{rank}-{step}.pt")  # noqa: E731
    note_start(here / "start.pt")
    train_stage(
        latents,
        stage,
        init_from,
        here / "work",
        here / "out",
        draw,
    )
    counters = torch._dynamo.utils.counters
    report = {what: sorted(values) for what, values in seen.items()}
    report |= {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}
    (here / f"rank{rank}.json").write_text(json.dumps(report))


def run(folder: Path, name: str) -> None:
    ranks, resumes = JOBS[name].ranks, JOBS[name].resumes
    (folder / name / "out").mkdir(parents=True)
    if resumes:
        shutil.copytree(folder / resumes / "work", folder / name / "work")
        (folder / name / "work" / "report.json").unlink()
        for lost in (f"checkpoints/step-{STEPS}", f"weights/step-{STEPS:08d}"):
            shutil.rmtree(folder / name / "work" / lost)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agent's

    def start(rank: int) -> None:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        train(folder, name, rank)

    fork_ranks(name, ranks, start)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    with_backend(sys.argv[2])
    for number in {JOBS[job_name].stage for job_name in sys.argv[3:]}:
        write_latents(root / f"latents{number}", number)
    for job_name in sys.argv[3:]:
        run(root, job_name)
