"""The training loop: torchtitan's Trainer with rectified flow on latents instead of next-token prediction.

Local tensors take shape suffixes: B batch, S image tokens, C channels of a token.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.fx.experimental._config
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model import flow, losses
from model.config import GuidanceConfig
from model.data.latents import EMPTY_TEXT_ROW
from model.data.order import Batch, BatchPlan
from model.kernels import use_kernels
from model.layers.attention import use_attention
from model.layers.moe import local_part
from model.stages import TrainingStage
from model.train.compiled import inductor_settings
from model.train.data import to_device
from model.train.device import DEVICE_TYPE, PATIENCE
from model.train.guard import Diverged, LossGuard
from model.train.parallel.parallelize import fsdp_meshes, is_replicated
from model.train.preemption import Preempted, StopFlag, sigterm_sets
from model.train.torch_private import set_group_timeout
from model.transformer import RouterTrace

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.trainer import Trainer

LOSS_BINS = 5
BLOCK_VARIANTS = 32
SAMPLES = "samples"
SKIPPED = "skipped.json"
NAMED_IDS = 16  # record ids in an error message; SKIPPED has all of them


class NoTokenizer(BaseTokenizer):
    """torchtitan requires a tokenizer. None is called here, since text is encoded before training, so its methods raise."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise TypeError("text is encoded before training: the trainer has no tokenizer")

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise TypeError("text is encoded before training: the trainer has no tokenizer")

    def get_vocab_size(self) -> int:
        return 0


class NucleusTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        stage: TrainingStage
        sample_fn: Callable[[torch.nn.Module, int, Path], Any] | None = None
        text_fn: Callable[[torch.Tensor, torch.Tensor | None, torch.device], torch.Tensor] | None = None

    def __init__(self, config: Config):
        self.settings = config.stage.train
        use_attention(self.settings.attention_backend)
        use_kernels(self.settings.kernels)
        super().__init__(config)
        for group in self._groups():  # they do not inherit the timeout of the default group
            set_group_timeout(PATIENCE, group)
        self.model = self.model_parts[0]
        self.loss_weights = config.stage.losses
        self.patch = self.model.config.patch_size
        self.writes = torch.distributed.get_rank() == 0
        self.weaker_model: torch.nn.Module | None = None  # for autoguidance
        self.routing: RouterTrace | None = None  # of a logged step's last micro-batch, if this rank writes metrics
        self.guard = LossGuard(self.settings.skip)
        self.stop = StopFlag()
        self.bin_sums = torch.zeros(LOSS_BINS, device=self.device)
        self.bin_counts = torch.zeros(LOSS_BINS, device=self.device)
        self.compiled = config.compile.enable
        self.autocast = contextlib.nullcontext
        dtype = TORCH_DTYPE_MAP[self.settings.dtype]
        if dtype != torch.float32 and self.parallel_dims.dp_shard == 1:  # with FSDP, FSDP casts
            self.autocast = lambda: torch.autocast(DEVICE_TYPE, dtype)

    def init_distributed(self) -> ParallelDims:
        """Does nothing: the process group exists already (`training_session`)."""
        return ParallelDims.from_config(self.config.parallelism, torch.distributed.get_world_size())

    def _groups(self) -> set[torch.distributed.ProcessGroup]:
        """The groups of all meshes. FSDP's two meshes may have separate groups for the same axis (`dp_replicate`)."""
        dims = self.parallel_dims
        groups = {mesh.get_group() for mesh in dims.get_all_one_dimensional_meshes().values()}
        if dims.dp_shard_enabled:
            groups |= {group for mesh in fsdp_meshes(dims) for group in mesh.get_all_groups()}
        return groups

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        metrics, ranks = self.metrics_processor, self.dataloader.ranks
        iterator = iter(data_iterable)
        while True:
            begin = time.perf_counter()
            batch = next(iterator)
            metrics.data_loading_times.append(time.perf_counter() - begin)
            tokens = batch.latents[:, 0].numel() // self.patch**2
            metrics.ntokens_since_last_log += tokens
            metrics.images_since_last_log += len(batch.plan) * ranks
            metrics.tokens_since_last_log += tokens * ranks
            self.ntokens_seen += tokens
            yield batch

    def forward_backward_step(
        self, *, batch: Batch, keep_routing: bool = False, guidance: GuidanceConfig | None = None, **_: Any
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch. With `guidance`, more forwards, without gradient: `_guidance`.

        Returns:
            a scalar, its share of the global batch's mean loss (without the extra losses): the shares of all
            micro-batches and ranks add up to that mean.
        """
        plan = batch.plan
        tokens = batch.latents[0, 0].numel() // self.patch**2
        # Timesteps are drawn for the global batch, then sliced: they must not depend on the number of ranks.
        generator = torch.Generator().manual_seed(plan.timestep_seed)
        t_all = flow.sample_timesteps(plan.global_batch, tokens, generator, self.settings.timesteps)
        t_B = to_device(t_all[plan.start : plan.start + len(plan)], self.device)
        example = losses.noised(
            to_device(batch.latents, self.device), to_device(batch.noise, self.device), t_B, self.patch
        )
        trace = RouterTrace() if keep_routing or losses.needs_trace(self.loss_weights) else None
        text, mask = self._text(batch.text, batch.mask)
        with self.train_context():
            velocity_BSC = self._velocity(example, text, mask, trace)
            if guidance is not None:
                example.guidance_BSC = self._guidance(guidance, velocity_BSC, example, text, mask, plan)
            total, mean, loss_B, _kept = losses.objective(example, velocity_BSC, trace, self.loss_weights)
            share = len(plan) / plan.global_batch
            (total * share).backward()
        if keep_routing:
            self.routing = trace
        bins_B = (t_B * LOSS_BINS).long().clamp_(0, LOSS_BINS - 1)
        self.bin_sums.index_add_(0, bins_B, loss_B)
        self.bin_counts.index_add_(0, bins_B, torch.ones_like(t_B))
        return mean.detach() * share

    def _velocity(
        self,
        example: losses.Example,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        trace: RouterTrace | None = None,
        model: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """The prediction [B, S, C] of the model that is trained, or of another, in fp32."""
        with self.autocast():
            velocity_BSC = (model or self.model)(
                hidden_states=example.noisy_BSC,
                img_shapes=(1, example.rows, example.columns),
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                timestep=example.t_B,
                collect=trace,
            )
        return velocity_BSC.float()

    @torch.no_grad()
    def _guidance(
        self,
        guidance: GuidanceConfig,
        velocity_BSC: torch.Tensor,
        example: losses.Example,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        plan: BatchPlan,
    ) -> torch.Tensor:
        """`losses.guidance` away from the prediction for the empty prompt, and from the weaker model's; 0 for samples whose
        caption is dropped, so that the prediction without text stays that of the data."""
        away_from = []
        if guidance.scale > 1.0:
            empty, padding = self._text(*self.dataloader.dataset.text([EMPTY_TEXT_ROW], plan.text_tokens))
            empty = empty.expand(len(plan), -1, -1)
            padding = None if padding is None else padding.expand(len(plan), -1)
            away_from.append((self._velocity(example, empty, padding), guidance.scale))
        if guidance.autoguidance > 1.0:
            away_from.append((self._velocity(example, text, mask, model=self.weaker_model), guidance.autoguidance))
        kept_B = to_device(torch.from_numpy(plan.text_rows != EMPTY_TEXT_ROW), self.device)
        return losses.guidance(velocity_BSC, away_from) * kept_B.view(-1, 1, 1)

    @torch.no_grad()
    def _load_weaker_model(self) -> torch.nn.Module:
        """The model with the weights that the stage started from, laid out over the ranks as the one that is trained."""
        config = self.config
        with torch.device("meta"):
            model = config.model_spec.model.build()
        model = config.model_spec.parallelize_fn(
            model,
            parallel_dims=self.parallel_dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=config.compile,
            ac_config=config.activation_checkpoint,
            dump_folder=config.dump_folder,
        )
        model.to_empty(device=self.device)
        self.checkpointer.load_initial_weights(model)
        return model.requires_grad_(False)

    def _text(self, texts: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States [B, T, D] float32 of a batch's texts (states, or token ids), and their mask [B, T] or None, on the device."""
        mask = None if mask is None else to_device(mask, self.device)
        if texts.is_floating_point():
            text = to_device(texts, self.device).float()
        else:  # token ids: the text encoder runs here
            text = self.config.text_fn(texts, mask, self.device)
        if mask is None and self.compiled:
            # Without a mask, blocks would be compiled again for the first batch that has one.
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=self.device)
        return text, mask

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimiser step, logged at the configured interval. A skipped step (`LossGuard`) does not change weights
        and optimisers, and has no line in the metrics; the schedule and the sample order advance.

        Raises:
            Diverged: too many steps were skipped.
        """
        self.optimizers.zero_grad()
        learning_rates = self.lr_schedulers.get_metrics()
        logged = self.metrics_processor.should_log(self.step) or self.step == self.config.training.steps
        bins = self.bin_sums.clone(), self.bin_counts.clone()
        loss = torch.zeros((), device=self.device)
        guidance = self.config.stage.guidance_at(self.step)
        for micro in range(self.gradient_accumulation_steps):
            last = micro == self.gradient_accumulation_steps - 1
            if isinstance(self.model, FSDPModule):
                # Before the last micro-batch, FSDP reduces over a replica's shard ranks only.
                self.model.set_requires_all_reduce(last)
            keep_routing = logged and last and self.writes
            loss += self.forward_backward_step(batch=next(data_iterator), keep_routing=keep_routing, guidance=guidance)
        if self.parallel_dims.dp_enabled:
            self._sum_gradients()
        mean_loss, norm = self._clip_gradients(loss)
        reason = self.guard.judge(mean_loss, norm)
        if reason is not None:
            self.lr_schedulers.step()
            self.bin_sums, self.bin_counts = bins
            self.routing = None
            self._note_skipped(reason)
            return
        self.optimizers.step()
        self.lr_schedulers.step()
        losses.apply_after_step(self.model, self.loss_weights)
        if logged:
            self._log(mean_loss, norm, learning_rates)

    def _clip_gradients(self, loss: torch.Tensor) -> tuple[float, float]:
        """Clips the gradients by their global norm.

        One all-reduce of three numbers and one synchronisation with the device in each step: the host must know whether
        the gradients are finite before it starts Muon and AdamW.

        The norm is averaged over the ranks. Each rank sums squares in its own order, among the ranks of its replica;
        with norms that differ by rounding, replicated weights would drift apart.

        Returns:
            (loss of the global batch, gradient norm before clipping), the same on every rank. `stop.agreed` is set on every
            rank if `stop.raised` is set on one.
        """
        by_mesh: dict[DeviceMesh | None, list[torch.nn.Parameter]] = {}  # DTensor operations take one mesh
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                by_mesh.setdefault(mesh, []).append(parameter)
        norms = [torch.nn.utils.get_total_norm([p.grad for p in of_mesh], foreach=True) for of_mesh in by_mesh.values()]
        norm = functools.reduce(torch.hypot, (x.full_tensor() if isinstance(x, DTensor) else x for x in norms))
        ranks = self.parallel_dims.get_optional_mesh("loss")
        sums = torch.stack([loss, norm, torch.full_like(loss, float(self.stop.raised))])
        if ranks is not None:
            sums[1] /= ranks.size()
            sums = dist_utils.dist_sum_tensor(sums, ranks)
        for of_mesh in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(of_mesh, self.config.training.max_norm, sums[1], foreach=True)
        mean_loss, grad_norm, stop = sums.tolist()
        self.stop.agreed = stop > 0
        return mean_loss, grad_norm

    def _note_skipped(self, reason: str) -> None:
        config, guard = self.config, self.guard
        window = f"{guard.recently_skipped} of the last {len(guard.recent)} steps were skipped"
        self.metrics_processor.note(f"step {self.step} skipped: {reason}; {window}", logging.WARNING)
        if not guard.exhausted:
            return
        plan = self.dataloader.order.batch(self.step - 1)  # of all ranks
        ids = self.dataloader.dataset.record_ids(plan.rows)
        path = Path(config.dump_folder) / SKIPPED
        if self.writes:
            path.write_text(json.dumps({"step": self.step, "reason": reason, "record_ids": ids}) + "\n")
        named = ", ".join(ids[:NAMED_IDS]) + (f" and {len(ids) - NAMED_IDS} more, in {path}" if ids[NAMED_IDS:] else "")
        raise Diverged(
            f"stage {config.stage.stage.name}: {reason} at step {self.step}; {window} (train.skip.max_skipped="
            f"{self.settings.skip.max_skipped}). Lower train.optim.muon_lr and adamw_lr, lengthen warmup_steps, or look "
            f"at the records of this batch: {named}"
        )

    def _sum_gradients(self) -> None:
        """Sums over the ranks, in one all-reduce, the gradients that FSDP does not sum: of plain replicas and of
        routers. Each rank has divided its loss by the global batch."""
        gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None and is_replicated(p)]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat, group=self.parallel_dims.get_mesh("loss").get_group())
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))

    def _log(self, mean_loss: float, grad_norm: float, extra: dict[str, float]) -> None:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        sums, counts = self.bin_sums, self.bin_counts
        if mesh is not None:
            sums, counts = (dist_utils.dist_sum_tensor(x, mesh) for x in (sums, counts))
        for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist())):
            if count:
                extra[f"loss_t/{i / LOSS_BINS:.1f}-{(i + 1) / LOSS_BINS:.1f}"] = total / count
        self.bin_sums.zero_()
        self.bin_counts.zero_()
        extra["images_seen"] = self.step * self.config.stage.stage.batch_size
        extra["skipped_steps"] = self.guard.skipped
        if self.routing is not None:
            extra |= {f"expert/{name}": value for name, value in self.routing.statistics().items()}
        self.routing = None
        self.metrics_processor.log_step(self.step, mean_loss, grad_norm, extra)

    def train(self) -> int:
        """Trains from the last checkpoint, or from the start, to the last step.

        Returns:
            the step that it resumed from (0: the start).

        Raises:
            Preempted: a rank received SIGTERM; the current step was finished and saved.
        """
        config = self.config
        self.checkpointer.load()
        if config.stage.stage.needs_weaker_model:
            self.weaker_model = self._load_weaker_model()
        first = self.step
        self.lr_schedulers.begin_stage(first)
        batches = self.batch_generator(self.dataloader)
        compiled = self._compiled() if self.compiled else contextlib.nullcontext()
        with sigterm_sets() as self.stop, contextlib.closing(batches), compiled:
            self.metrics_processor.start(first)
            while self.should_continue_training():
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(batches)
                self.checkpointer.save(self.step, last_step=self.step == config.training.steps)
                if self.stop.agreed and self.should_continue_training():
                    where = self.checkpointer.save_to_resume(self.step)
                    raise Preempted(
                        f"stage {config.stage.stage.name}: SIGTERM after step {self.step}; it goes on from {where}"
                    )
                every = self.settings.sample_every_steps
                if config.sample_fn and every and (self.step % every == 0 or self.step == config.training.steps):
                    self._sample(config.sample_fn)
        return first

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Compiles the blocks on one micro-batch of each bucket, in a fixed order, whatever step training resumes from.

        A compiler chooses tile sizes, and with them the order of sums, for the first shapes, and may compile further
        variants for later ones. In a fixed order every attempt gets the same kernels. All ranks wait here for the
        slowest, instead of in their first steps.

        The limit leaves room for the variants of a block in this stage (dense, and each capacity factor; in training
        and in sampling). Beyond it PyTorch would silently run blocks uncompiled, so it is an error.
        """
        torch.compiler.reset()
        with (
            torch._dynamo.config.patch(recompile_limit=BLOCK_VARIANTS, fail_on_recompile_limit_hit=True),
            torch._inductor.config.patch(inductor_settings(self.settings.deterministic, self.parallel_dims.ep_enabled)),
            torch.fx.experimental._config.patch(use_duck_shape=False),  # as many text as image tokens: a coincidence
        ):
            guidance = self.config.stage.guidance_at(self.config.training.steps)  # the last step's, if any has one
            for step in self.dataloader.order.first_steps():
                batch = next(self.dataloader.micro_batches(step))
                self.forward_backward_step(batch=batch, keep_routing=True, guidance=guidance)
                self.optimizers.zero_grad()
            self.routing = None
            self.bin_sums.zero_()
            self.bin_counts.zero_()
            yield

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.guard.load_state_dict(state_dict["guard"])

    @torch.no_grad()
    def _sample(self, sample_fn: Callable[[torch.nn.Module, int, Path], Any]) -> None:
        """Calls `sample_fn(model, step, path)` on every rank, in the compute dtype of training. It must use its own
        random generators."""
        path = Path(self.config.dump_folder) / SAMPLES / f"step-{self.step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        begin = time.perf_counter()
        self.model.eval()
        try:
            with self.autocast():
                sample_fn(self.model, self.step, path)
        finally:
            self.model.train()
        self.metrics_processor.time_last_log += time.perf_counter() - begin  # the rates count training alone
