"""Trains one small stage: `python train_cuda_worker.py FOLDER JOB [STEP]`. With STEP it waits before that step, to be killed.

FOLDER/latents
FOLDER/JOB/work/, FOLDER/JOB/out/       of model.train.run.train_stage
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from train_helpers import train_config, training_stage, transformer_config

from model.train.run import train_stage
from model.train.trainer import NucleusTrainer

STEPS, SAVED_EVERY = 16, 5
WAIT_S = 600
# The smallest widths that tensor cores and flash attention take.
MODEL = {
    "attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24), "moe_intermediate_dim": 64,
}  # fmt: skip
# As recipes/nucleus_17b.yaml trains.
FULL = {
    "dtype": "bfloat16", "compile": True, "activation_checkpointing": "selective", "async_checkpoint": True,
    "num_workers": 2,
}  # fmt: skip
JOBS = {
    "reference": {},
    "whole": FULL,
    "killed": FULL,
    "sharded": FULL,
    "spread": {**FULL, "expert_parallel": 2},
}


def train(folder: Path, job: str) -> None:
    out = folder / job / "out"
    out.mkdir(parents=True, exist_ok=True)
    config = train_config(
        steps=STEPS,
        log_every_steps=1,
        checkpoint_every_steps=SAVED_EVERY,
        **JOBS[job],
    )
    stage = training_stage(config, transformer_config(**MODEL))
    train_stage(folder / "latents", stage, None, folder / job / "work", out)


def wait_before(step: int) -> None:
    real = NucleusTrainer.train_step

    def train_step(self, batches):
        if self.step == step:
            time.sleep(WAIT_S)
        real(self, batches)

    NucleusTrainer.train_step = train_step


if __name__ == "__main__":
    if sys.argv[3:]:
        wait_before(int(sys.argv[3]))
    train(Path(sys.argv[1]), sys.argv[2])
