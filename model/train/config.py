"""Converts a recipe's sections to a torchtitan configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.constants import VAE_SCALE
from model.ranks import local_batch_size, rank_degrees
from model.stages import TrainingStage
from model.storage import join
from model.train.activation import activation_config
from model.train.checkpoint import CHECKPOINTS, StageCheckpointer, checkpoint_root
from model.train.data import LatentDataLoader
from model.train.device import DEVICE_TYPE
from model.train.metrics import StageMetrics
from model.train.optimizer import NucleusOptimizers, StageSchedule
from model.train.spec import model_spec
from model.train.trainer import NoTokenizer, NucleusTrainer

from torchtitan.components.loss import MSELoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig


def trainer_config(
    stage: TrainingStage,
    *,
    latents_dir: Path,
    latents_uri: str | None = None,
    work_dir: Path,
    init_from: Path | None,
    optimizer_from: Path | None = None,
    ranks: int,
    sample_fn: Callable[..., Any] | None = None,
    text_fn: Callable[..., Any] | None = None,
) -> NucleusTrainer.Config:
    """The whole configuration of one stage.

    Args:
        latents_uri: read latents and texts by ranges; relative locations of parts start there. None: they are mapped.
        init_from: a finished checkpoint whose weights the stage starts from.
        optimizer_from: the optimiser state of that step.
        ranks: total number of processes; they share the global batch.

    Raises:
        ValueError: the batch or the weights cannot be divided as configured.
    """
    train, values = stage.train, stage.stage
    local = local_batch_size(values, train, ranks)
    degrees = rank_degrees(stage.model, train, ranks)
    tokens = (values.image_size_px // (VAE_SCALE * stage.model.patch_size)) ** 2
    return NucleusTrainer.Config(
        model_spec=model_spec(stage.model, values.name),
        dump_folder=str(work_dir),
        stage=stage,
        sample_fn=sample_fn,
        text_fn=text_fn,
        loss=MSELoss.Config(),
        tokenizer=NoTokenizer.Config(),
        dataloader=LatentDataLoader.Config(
            directory=str(latents_dir),
            stream_from=latents_uri,
            global_batch_size=values.batch_size,
            seed=stage.seed,
            tier_weights=dict(values.tier_weights),
            episode_weights=dict(values.bucket_weights),
            caption_weights=tuple((entry.up_to_tokens, entry.weight) for entry in values.caption_weights),
            caption_dropout=train.caption_dropout,
            num_workers=train.num_workers,
        ),
        optimizer=NucleusOptimizers.Config(optim=train.optim, dist_muon=train.muon_implementation == "torchtitan"),
        lr_scheduler=StageSchedule.Config(warmup_steps=train.optim.warmup_steps, decay=values.decay),
        training=TrainingConfig(
            local_batch_size=local,
            global_batch_size=values.batch_size,
            seq_len=tokens,
            max_norm=train.optim.max_grad_norm,
            steps=values.steps,
            dtype="float32",  # dtype of weights; train.dtype is the compute dtype
            mixed_precision_param=train.dtype,
            disable_cuda_graphs=True,  # the shapes change with the bucket
            gc_freq=1000,
        ),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor",
            data_parallel_replicate_degree=degrees.replicate,
            data_parallel_shard_degree=degrees.shard,
            expert_parallel_degree=degrees.expert_parallel,
        ),
        activation_checkpoint=activation_config(train.activation_checkpointing),
        compile=CompileConfig(enable=train.compile, components=["model"]),
        checkpoint=StageCheckpointer.Config(
            enable=True,
            folder=join(checkpoint_root(train, work_dir), CHECKPOINTS),
            interval=train.checkpoint_every_steps,
            initial_load_path=str(Path(init_from).resolve()) if init_from else None,
            initial_load_model_only=init_from is not None,
            last_save_model_only=False,
            keep_latest_k=0,  # torchtitan's own pruning is off: it cannot keep a single checkpoint
            keep_full=train.keep_full_checkpoints,
            keep_weights=train.keep_checkpoints,
            optimizer_from=str(Path(optimizer_from).resolve()) if optimizer_from else None,
            hand_on_optimizer=stage.hand_on_optimizer,
            async_mode="async" if train.async_checkpoint else "disabled",
        ),
        metrics=StageMetrics.Config(
            log_freq=train.log_every_steps,
            enable_tensorboard=True,
            disable_color_printing=True,
            label=values.name,
            total_steps=values.steps,
            settings=stage.model_dump(mode="json"),
        ),
        debug=DebugConfig(
            seed=stage.seed,
            # On a CPU nothing depends on timing. No warn_only: it lets memory-efficient attention add up its gradients
            # in any order.
            deterministic=train.deterministic and DEVICE_TYPE != "cpu",
            enable_structured_logging=False,
        ),
    )
