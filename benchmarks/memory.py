"""Compares peaks of training steps in PyTorch's allocator with the predictions of `model.plan.planner`.

    python benchmarks/memory.py [--case NAME]

Each case trains a small model with the real trainer, and tracks every allocation of some steps from the third on (the
profiler's memory events); the minimum over steps counts. Runs on a CPU with the eager code of an accelerator: without
the functions of model/kernels/elementwise.py. Cases with several ranks are processes over gloo; the first rank is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import TrainConfig, TransformerConfig
from model.data.latents import LatentWriter
from model.plan.memory import Layout, Shapes, moments
from model.plan.memory_trace import Step

PROFILED_STEPS = 3  # the minimum counts: memory that is freed late only adds
PAUSE_S = 0.01  # see `collectives_let_go`
MARKS = ("blocks done", "optimiser step")
TEXT_DIM = 96
CHANNELS = 16


@dataclass(frozen=True)
class Case:
    """A training to measure. `image_px`: 16 pixels are one token."""

    name: str
    dtype: str = "float32"
    checkpointing: str = "none"
    batch: int = 4  # of all ranks
    micro_batch: int = 4  # of one rank
    image_px: int = 256
    text_tokens: int = 24
    masked: bool = True
    ranks: int = 1
    expert_parallel: int = 1
    replicas: int = 1
    model: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("fp32"),
    Case("fp32_selective", checkpointing="selective"),
    Case("fp32_full", checkpointing="full", batch=8, micro_batch=8),
    Case("bf16", dtype="bfloat16", masked=False),
    Case("bf16_selective", dtype="bfloat16", checkpointing="selective", image_px=384),
    Case("bf16_full", dtype="bfloat16", checkpointing="full", batch=2, micro_batch=2, image_px=512),
    Case("accumulated", batch=8, micro_batch=4),
    Case("wide", batch=2, micro_batch=2, text_tokens=64, model={"num_attention_heads": 16, "capacity_factors": 4.0}),
    Case(
        "few_tokens", batch=1, micro_batch=1, model={"num_attention_heads": 16, "num_layers": 6}
    ),  # the optimiser's peak
    Case("sharded", ranks=2, batch=8),
    Case("sharded_bf16_full", ranks=2, batch=8, dtype="bfloat16", checkpointing="full"),
    Case("experts_bf16", ranks=2, batch=8, expert_parallel=2, dtype="bfloat16", checkpointing="selective"),
    Case(
        "sharded_few", ranks=2, batch=2, micro_batch=1, model={"num_attention_heads": 16, "num_experts": 3}
    ),  # cut experts
    Case("replicas", ranks=2, batch=4, micro_batch=2, replicas=2),
)


def transformer(case: Case) -> TransformerConfig:
    values = dict(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(8, 12, 12),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=8,
        moe_intermediate_dim=192,
        capacity_factors=2.0,
    )
    return TransformerConfig(**{**values, **case.model})


def train_config(case: Case) -> TrainConfig:
    stage = dict(
        name="measured",
        image_size_px=case.image_px,
        steps=4,
        batch_size=case.batch,
        capacity_factors=transformer(case).capacity_factors,
        wavelet=True,
    )
    return TrainConfig(
        stages=(stage,),
        optim={"muon_lr": 1e-3, "adamw_lr": 1e-3},
        losses={"router_z_loss": 1e-4, "router_orthogonality": 1e-4, "wavelet": 0.1},
        caption_dropout=0.0,
        local_batch_size=case.micro_batch,
        log_every_steps=1000,
        dtype=case.dtype,
        activation_checkpointing=case.checkpointing,
        expert_parallel=case.expert_parallel,
        data_parallel_replicate=case.replicas,
    )


def predict(case: Case) -> dict[str, float]:
    """Bytes that the planner predicts for the case."""
    config, train = transformer(case), train_config(case)
    layout = Layout(case.ranks, case.ranks // case.replicas, case.expert_parallel, case.micro_batch, case.checkpointing)
    step = Step(
        batch=case.micro_batch,
        tokens=(case.image_px // 16) ** 2,
        text_tokens=case.text_tokens,
        dtype=getattr(torch, case.dtype),
        checkpointing=case.checkpointing,
        accumulate=case.batch // case.ranks > case.micro_batch,
        masked=case.masked,
        losses=train.losses,
    )
    *passes, last = moments(Shapes(config), config, layout, step, device="cpu", ns_steps=train.optim.muon_ns_steps)
    loss = next(moment for moment in passes if moment.name == "loss")
    return {
        "weights": last.parts["weights"],
        "gradients": last.parts["gradients"],
        "optimizer": last.parts["optimizer_muon"] + last.parts["optimizer_adamw"],
        "activations": loss.parts["activations"],
        "passes": max(moment.total for moment in passes),
        "optimiser step": last.total,
        "peak": max(moment.total for moment in (*passes, last)),
    }


def measure(case: Case) -> dict[str, float]:
    """Bytes of one rank in a step, by a trainer in this process (or, under torchrun, in its group)."""
    from model.stages import training_stages
    from model.train.config import trainer_config
    from model.train.device import training_session

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # the trainer's log lines
        latents = Path(folder) / "latents"
        write_latents(latents, case)
        stack.enter_context(mock.patch("model.kernels.elementwise._eager_cpu", lambda x: False))
        stack.enter_context(training_session())
        train = train_config(case)
        (stage,) = training_stages(transformer(case), train)
        config = trainer_config(
            stage,
            latents_dir=latents,
            work_dir=Path(folder) / "work",
            init_from=None,
            ranks=case.ranks,
        )
        trainer = config.build()
        stack.callback(trainer.close)
        trainer.metrics_processor.start(0)
        batches = stack.enter_context(contextlib.closing(trainer.batch_generator(trainer.dataloader)))
        for trainer.step in (1, 2):
            trainer.train_step(batches)
        result = []
        if case.ranks > 1:
            stack.enter_context(collectives_let_go())
        for trainer.step in range(3, 3 + PROFILED_STEPS):
            result.append(_profiled_step(trainer, batches))
        return {name: min(step[name] for step in result) for name in result[0]}


class _AfterWaits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops._c10d_functional.wait_tensor.default:
            time.sleep(PAUSE_S)
        return out


@contextlib.contextmanager
def collectives_let_go() -> Iterator[None]:
    """Waits a moment after each collective until gloo's threads release its tensors.

    They hold tensors for a moment after the collective. If such a thread holds the last reference, a tensor lives
    longer, and the profiler, which sees only this thread, never sees it freed.
    """
    wait = dist.Work.wait

    def wait_and_stop(work: dist.Work, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(PAUSE_S)
        return done

    with mock.patch.object(dist.Work, "wait", wait_and_stop), _AfterWaits():
        yield


def _profiled_step(trainer: Any, batches: Iterator[Any]) -> dict[str, float]:
    norm = trainer.model.norm_out
    step = trainer.optimizers.step

    def mark_end_of_blocks(*_: Any) -> None:
        with record_function(MARKS[0]):
            pass

    def marked_step() -> None:
        with record_function(MARKS[1]):
            step()

    hook = norm.register_forward_pre_hook(mark_end_of_blocks)
    trainer.optimizers.step = marked_step
    state = {name: _bytes(tensors) for name, tensors in _state(trainer).items()}
    trainer.optimizers.zero_grad()  # the profiler does not report the release of memory whose allocation it did not see
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(batches)
    hook.remove()
    trainer.optimizers.step = step
    events = profiler.profiler.kineto_results.events()
    begins = {name: [e.start_ns() for e in events if e.name() == name] for name in MARKS}
    level = state["weights"] + state["optimizer"]
    done, optimiser, levels = begins[MARKS[0]][-1], begins[MARKS[1]][0], []
    for time, change in _changes(profiler):
        level += change
        levels.append((time, level))
    kept = [level for time, level in levels if time <= done][-1]
    accumulated = state["gradients"] if len(begins[MARKS[0]]) > 1 else 0
    return state | {
        "activations": kept - state["weights"] - state["optimizer"] - accumulated,
        "passes": max(level for time, level in levels if time < optimiser),
        "optimiser step": max(level for time, level in levels if time >= optimiser),
        "peak": max(level for _, level in levels),
    }


def _changes(profiler: profile) -> list[tuple[int, int]]:
    """(time, bytes allocated or freed) in order. Leaves out allocations inside a collective: gloo clones its inputs
    there, and frees the clones on threads that the profiler does not see."""
    events: list[tuple[int, int, int, bool]] = []

    def walk(nodes: list[Any], collective: bool) -> None:
        for node in nodes:
            if node.tag == _EventType.Allocation:
                events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, collective))
            walk(node.children, collective or node.name.startswith("c10d::"))

    walk(profiler.profiler.kineto_results.experimental_event_tree(), False)
    changes, left_out = [], set()
    for time, pointer, size, collective in sorted(events):
        if size > 0:
            (left_out.add if collective else left_out.discard)(pointer)
        if pointer not in left_out:
            changes.append((time, size))
    return changes


def _state(trainer: Any) -> dict[str, list[torch.Tensor]]:
    parameters = list(trainer.model.parameters())
    optimizers = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [tensor for state in optimizers for tensor in state.values() if tensor.dim()],
    }


def _bytes(tensors: list[torch.Tensor]) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def write_latents(directory: Path, case: Case, images: int = 16) -> None:
    directory.mkdir(parents=True)
    length = case.text_tokens - case.masked  # padded to the next multiple of 8, which makes a mask
    with LatentWriter(directory, text_dim=TEXT_DIM) as writer:
        writer.add_text(torch.zeros(length, TEXT_DIM))
        writer.add_text(torch.randn(length, TEXT_DIM))
        for i in range(images):
            writer.add_image(f"{i:064x}", torch.randn(CHANNELS, case.image_px // 8, case.image_px // 8), "A1", [1])


def measure_on_ranks(case: Case) -> dict[str, float]:
    """`measure`, in as many processes as the case has ranks."""
    if case.ranks == 1:
        return measure(case)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, __file__, "--worker", json.dumps(asdict(case)), str(out)], check=True, env=environment
        )
        return json.loads(out.read_text())


def compare(case: Case) -> dict[str, tuple[float, float]]:
    """(predicted, measured) bytes by name."""
    predicted, measured = predict(case), measure_on_ranks(case)
    return {name: (predicted[name], measured[name]) for name in predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measured = measure(Case(**json.loads(options.worker[0])))
        if os.environ["RANK"] == "0":
            Path(options.worker[1]).write_text(json.dumps(measured))
        return
    worst = 0.0
    print("megabytes, predicted / measured; difference of the peak")
    for case in CASES:
        if options.case is None or case.name in options.case:
            rows = compare(case)
            predicted, measured = rows["peak"]
            worst = max(worst, abs(predicted / measured - 1))
            parts = "  ".join(f"{name} {p / 1e6:.1f}/{m / 1e6:.1f}" for name, (p, m) in rows.items())
            print(f"{case.name:18} {parts}  {predicted / measured - 1:+.1%}", flush=True)
    print(f"largest difference of a peak: {worst:.1%}")


if __name__ == "__main__":
    main()
