"""A latent set small enough to train on in seconds, and the configuration of such a training."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from model.config import TrainConfig, TransformerConfig
from model.data.latents import LatentWriter
from model.stages import TrainingStage, training_stages

TEXT_DIM = 12


def write_latents(directory: Path, images: int = 64, text_dim: int = TEXT_DIM) -> Path:
    """Latents in two buckets; their prompt determines them, so that there is something to learn."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 16, 1, 1, generator=generator)
    with LatentWriter(directory, text_dim=text_dim, rows_per_file=20) as writer:
        writer.add_text(torch.zeros(3, text_dim))
        for i in range(4):
            writer.add_text(torch.randn(5 + i, text_dim, generator=generator))
        for i in range(images):
            height, width = (8, 8) if i % 3 else (4, 8)
            latent = patterns[i % 4] + 0.1 * torch.randn(16, height, width, generator=generator)
            writer.add_image(f"{i:064x}", latent, f"A{1 + i % 5}", [1 + i % 4])
    return directory


def write_artifacts(folder: Path, images: Sequence[int] = (64,), store: str | None = None) -> dict[str, Path]:
    """Latents and texts as sealed artifacts: the indices "latents" and "texts" below `folder`.

    Args:
        images: the number of images of each part.
        store: a URI to which the parts are moved, as map tasks of a cluster leave them; None: they stay below `folder`.
    """
    from model import storage
    from tasks.manifest import load_manifest, seal
    from tasks.store import LOCATIONS, Part, write_index

    parts: dict[str, list[Part]] = {"latents": [], "texts": []}

    def add(kind: str, name: str, path: Path, rows: int) -> None:
        seal(path, kind)
        uri, digest = str(path), load_manifest(path).digest
        if store is not None:
            uri = storage.join(store, "artifacts", kind, digest)
            for file in path.rglob("*"):
                if file.is_file():
                    storage.upload(file, storage.join(uri, file.relative_to(path).as_posix()))
            shutil.rmtree(path)
        parts[kind].append(Part(name, kind, digest, uri, rows))

    for number, count in enumerate(images):
        whole = write_latents(folder / f"part{number}", count)
        if number == 0:
            add("texts", "prefix", whole / "prefix", 1)
        for kind in parts:
            add(kind, f"shard{number}", whole / kind, count)
    indices = {kind: folder / kind for kind in parts}
    for kind, index in indices.items():
        index.mkdir()
        write_index(index, parts[kind])
        (index / "report.json").write_text("{}")
        seal(index, kind, logs=(LOCATIONS,))
    return indices


def transformer_config(**changes) -> TransformerConfig:
    values = dict(
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )
    return TransformerConfig(**{**values, **changes})


def train_config(steps: int = 20, stage: dict | None = None, **changes) -> TrainConfig:
    stage = {
        "name": "small",
        "image_size_px": 64,
        "steps": steps,
        "batch_size": 8,
        "capacity_factors": 2.0,
        "wavelet": True,
        **(stage or {}),
    }
    values = dict(
        stages=(stage,),
        optim={"muon_lr": 0.01, "adamw_lr": 0.01, "warmup_steps": 3},
        losses={"router_z_loss": 1e-4, "router_orthogonality": 1e-4, "wavelet": 0.1},
        checkpoint_every_steps=5,
        keep_checkpoints=3,
        log_every_steps=2,
    )
    return TrainConfig(**{**values, **changes})


def training_stage(
    train: TrainConfig | None = None, model: TransformerConfig | None = None, index: int = 0, **changes
) -> TrainingStage:
    """One stage of a training of the small model; `changes` are fields of it."""
    stages = training_stages(model or transformer_config(), train or train_config())
    return stages[index].model_copy(update=changes)


def read_weights(out: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Step -> weights of every checkpoint of a stage, read without the model."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    result = {}
    for path in sorted(out.glob("step-*")):
        state: dict[str, torch.Tensor] = {}
        _load_state_dict(
            state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True
        )
        result[int(path.name.split("-")[1])] = state
    return result


def fork_ranks(job: str, ranks: int, train: Callable[[int], None]) -> None:
    """Calls `train(rank)` in a fork of this process for each rank. Exits if one fails."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                train(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"{job}: ranks ended with {codes}")


def logged_steps(path: Path) -> list[int]:
    """The steps in metrics.jsonl, which a run may still be writing."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]
