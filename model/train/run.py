"""Trains one stage: latent shards in, checkpoints out. Killed at any moment and called again, it goes on.

    work_dir/                            stays between attempts
      run.json                           what is trained here; another configuration is refused
      checkpoints/step-{n}/              to resume from (the last two)
      weights/step-{n:08d}/              the model alone (the last keep_checkpoints)
      metrics.jsonl tensorboard/ samples/
      report.json                        when the stage is done, by the attempt that finished it
    out_dir/                             filled when the stage is done
      step-{n:08d}/ metrics.jsonl tensorboard/ samples/ report.json

Between stages only the model is carried: optimiser state starts afresh, and so does the warm-up, since moments
gathered at one resolution and capacity factor say little about another's gradients.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.train.device import training_session

import torch
import torch.distributed as dist

from model.config import StageConfig, TrainConfig, TransformerConfig
from model.latents import LatentDataset
from model.train.checkpoint import WEIGHTS, finished_checkpoints, last_checkpoint
from model.train.config import stage_transformer, trainer_config
from model.train.metrics import METRICS, TENSORBOARD
from model.train.spec import count_parameters
from model.train.trainer import SAMPLES

REPORT = "report.json"
SampleFn = Callable[[torch.nn.Module, int, Path], Any]


def train_stage(
    latents_dir: str | Path,
    transformer: TransformerConfig,
    train: TrainConfig,
    stage_index: int,
    init_from: str | Path | None,
    work_dir: str | Path,
    out_dir: str | Path,
    sample_fn: SampleFn | None = None,
) -> dict[str, Any]:
    """Trains stage `stage_index` of `train`.

    Args:
        latents_dir: this stage's latents.
        init_from: checkpoints of the stage before (its last is taken), or None to start from scratch.
        work_dir: where the run lives; the same for every attempt at this stage. Not removed here.
        out_dir: an empty directory.
        sample_fn: called as `sample_fn(model, step, path)` every `sample_every_steps` steps and at the last, in
            eval mode without gradients, on every rank; it writes an image to `path` and draws its random numbers
            from generators of its own.

    Returns:
        the report. out_dir/report.json is that of the attempt which finished the training: filled again from the same
        work_dir, out_dir is the same to the byte, and so is its digest.

    Raises:
        ValueError: latents, configuration and work_dir do not fit together.
        RuntimeError: the loss is not finite.
    """
    latents_dir, work_dir, out_dir = Path(latents_dir), Path(work_dir), Path(out_dir)
    stage = train.stages[stage_index]
    _check_latents(latents_dir, transformer)
    init_checkpoint = last_checkpoint(init_from) if init_from is not None else None
    work_dir.mkdir(parents=True, exist_ok=True)
    _claim(work_dir, latents_dir, transformer, train, stage, init_checkpoint)
    begin = time.perf_counter()
    with training_session():
        config = trainer_config(
            transformer,
            stage,
            train,
            latents_dir=latents_dir,
            work_dir=work_dir,
            init_from=init_checkpoint,
            ranks=dist.get_world_size(),
            sample_fn=sample_fn,
        )
        trainer = config.build()
        try:
            resumed_from = trainer.train()
        finally:
            trainer.close()
        parameters, active = count_parameters(trainer.model, stage_transformer(transformer, stage))
        last = trainer.metrics_processor.last
        report = {
            "stage": stage.name,
            "steps": stage.steps,
            "resumed_from_step": resumed_from,
            "images_seen": stage.steps * stage.batch_size,
            "parameters": parameters,
            "active_parameters": active,
            "loss": last.get("loss"),
            "images_per_s": last.get("images_per_s"),
            "train_s": round(time.perf_counter() - begin, 3),
            "ranks": dist.get_world_size(),
            "device": trainer.device.type,
            "torch": torch.__version__,
        }
        if dist.get_rank() == 0:
            _publish(work_dir, out_dir, report)
        dist.barrier()
    return report


def _check_latents(latents_dir: Path, transformer: TransformerConfig) -> None:
    meta = LatentDataset(latents_dir).meta
    channels = meta.latent_channels * meta.patch_size**2
    for name, have, want in (
        ("patch_size", meta.patch_size, transformer.patch_size),
        ("in_channels", channels, transformer.in_channels),
        ("out_channels", meta.latent_channels, transformer.out_channels or transformer.in_channels),
        ("joint_attention_dim", meta.text_dim, transformer.joint_attention_dim),
    ):
        if have != want:
            raise ValueError(f"the latents in {latents_dir} need model.{name}={have}, got {want}")


def _claim(
    work_dir: Path,
    latents_dir: Path,
    transformer: TransformerConfig,
    train: TrainConfig,
    stage: StageConfig,
    init_checkpoint: Path | None,
) -> None:
    """Writes down what this directory trains, or compares it with what was written."""
    run = {
        "transformer": transformer.model_dump(mode="json"),
        "train": train.model_dump(mode="json", exclude={"stages"}),
        "stage": stage.model_dump(mode="json"),
        "latents": _digest(latents_dir / "index.parquet", latents_dir / "meta.json"),
        "init_from": _digest(init_checkpoint / ".metadata") if init_checkpoint else None,
    }
    path = work_dir / "run.json"
    if path.is_file():
        known = json.loads(path.read_text())
        differing = [name for name in run if known.get(name) != run[name]]
        if differing:
            raise ValueError(
                f"{work_dir} holds a run with another {', '.join(differing)}: give a directory of its own, or remove it"
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(run, indent=2) + "\n")
        os.replace(temporary, path)


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _publish(work_dir: Path, out_dir: Path, report: dict[str, Any]) -> None:
    """Fills out_dir from work_dir, which keeps its files: a lost out_dir is filled again without training."""
    kept = finished_checkpoints(work_dir / WEIGHTS)
    report["checkpoints"] = list(kept)
    done = work_dir / REPORT
    if report["resumed_from_step"] == report["steps"] and done.is_file():
        # Nothing was trained: only the first report knows the loss and the times.
        report |= {**json.loads(done.read_text()), "resumed_from_step": report["resumed_from_step"]}
    else:
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, done)
    for step, path in kept.items():
        shutil.copytree(path, out_dir / f"step-{step:08d}")
    for name in (TENSORBOARD, SAMPLES):
        if (work_dir / name).is_dir():
            shutil.copytree(work_dir / name, out_dir / name)
    shutil.copy2(work_dir / METRICS, out_dir / METRICS)
    shutil.copy2(done, out_dir / REPORT)
