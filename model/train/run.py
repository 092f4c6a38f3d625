"""Trains one stage: reads latents, writes checkpoints. If it is killed, a second call resumes it.

    work_dir/                            kept between attempts
      run.json                           configuration of the run; a call with another configuration is an error
      checkpoints/step-{n}/              full checkpoints to resume from (the last keep_full_checkpoints); `prune_run`
                                         deletes them once the stage is sealed
      weights/step-{n:08d}/              model weights only (the last keep_checkpoints)
      optimizer/step-{n:08d}/            optimiser state and schedule of the last step, for a next stage that continues
      metrics.jsonl tensorboard/ samples/
      skipped.json                       written if too many steps were skipped: the records of the last one
      report.json                        written by the attempt that finishes the stage
    out_dir/                             filled when the stage is finished
      step-{n:08d}/ optimizer/           the result: the same bytes however often the run was interrupted
      metrics.jsonl tensorboard/ samples/ report.json        logs (`LOGS`), with times, speeds and attempt counts

With train.checkpoint_uri, run.json, all checkpoints, report.json and a copy of metrics.jsonl are stored there, under the
name of the work_dir. A pod on another node then finds everything except the TensorBoard and sample files.

A stage starts from the weights of the previous stage. With train.carry_optimizer it also takes over momentum, moments and
learning rate; otherwise it starts with a warm-up. The data, their order and noise, the counts of steps and images, and the
loss window of `LossGuard` always start again, because losses differ in level at another resolution and capacity.

See docs/decisions/checkpoints.md.
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

import torch
import torch.distributed as dist

from model import storage
from model.config import FREE_KEYS, TrainSettings, TransformerConfig
from model.data.index import read_index_meta
from model.stages import TrainingStage
from model.train.checkpoint import CHECKPOINTS, OPTIMIZER, WEIGHTS, checkpoint_root
from model.train.config import trainer_config
from model.train.device import training_session
from model.train.metrics import METRICS, TENSORBOARD
from model.train.spec import count_parameters
from model.train.trainer import SAMPLES
from model.weights.checkpoints import METADATA, canonical_metadata, finished_checkpoints, last_checkpoint
from model.weights.export import released_weights
from model.weights.load import load_weights

REPORT = "report.json"
# Log files of out_dir. They depend on the machine and its clock, so an artifact's digest leaves them out.
LOGS = (METRICS, REPORT, f"{TENSORBOARD}/*", f"{SAMPLES}/*")
HANDED_ON = {"checkpoints": WEIGHTS, "optimizer": OPTIMIZER}  # report key -> folder whose steps it lists
VISIBLE_WITHIN_S = 10.0  # a network file system may show another node's writes late
SampleFn = Callable[[torch.nn.Module, int, Path], Any]
TextFn = Callable[[torch.Tensor, torch.Tensor | None, torch.device], torch.Tensor]


def train_stage(
    latents_dir: str | Path,
    stage: TrainingStage,
    init_from: str | Path | None,
    work_dir: str | Path,
    out_dir: str | Path,
    sample_fn: SampleFn | None = None,
    latents_uri: str | None = None,
    text_fn: TextFn | None = None,
) -> dict[str, Any]:
    """Trains one stage.

    Args:
        latents_dir: the index of this stage's latents and texts (model/data/index.py).
        init_from: checkpoints of the previous stage (the last one is loaded), or None to start from train.init_from or
            from scratch.
        work_dir: the state of the run; the same for every attempt at this stage. Not removed here.
        out_dir: an empty directory.
        sample_fn: called as `sample_fn(model, step, path)` every `sample_every_steps` steps and at the last step, in
            eval mode without gradients, on every rank. It writes an image to `path` and must use its own random
            generators.
        latents_uri: with train.latents "stream", the base of relative part locations; None: latents_dir.
        text_fn: called as `text_fn(ids, mask, device)` if texts are stored as tokens, with ids [B, T - P] on the host and
            mask [B, T] or None on the device. Returns states [B, T, D] float32 on the device, without gradients.

    Returns:
        the report. out_dir/report.json is the report of the attempt that finished the training. Filling out_dir again
        from the same work_dir gives the same bytes.

    Raises:
        ValueError: latents, configuration and work_dir do not match.
        Diverged: too many steps were skipped (train.skip), or weights are not finite.
        ConnectionError: the object store of checkpoints, or of streamed latents, does not answer.
        Preempted: the process received SIGTERM; call again to resume.
    """
    latents_dir, work_dir, out_dir = Path(latents_dir), Path(work_dir), Path(out_dir)
    transformer, train, steps = stage.model, stage.train, stage.stage.steps
    _check_latents(latents_dir, transformer, text_fn)
    init_checkpoint = last_checkpoint(init_from) if init_from is not None else None
    released = released_weights(train.init_from, transformer) if train.init_from and init_from is None else None
    work_dir.mkdir(parents=True, exist_ok=True)
    root = checkpoint_root(train, work_dir)
    storage.check_writable_place(root)
    carried = _optimizer_of(init_checkpoint) if init_checkpoint and train.carry_optimizer else None
    _claim(root, latents_dir, stage, init_checkpoint, carried)
    if (done := _done(root)) is not None:
        if _rank() == 0:
            _fill(root, work_dir, out_dir, done)
        return {**json.loads(done), "resumed_from_step": steps}
    if _rank() == 0:
        _restore_metrics(root, work_dir)
    begin = time.perf_counter()
    with training_session(train.deterministic):
        _check_one_place(root)
        config = trainer_config(
            stage,
            latents_dir=latents_dir,
            latents_uri=(latents_uri or str(latents_dir)) if train.latents == "stream" else None,
            work_dir=work_dir,
            init_from=init_checkpoint,
            optimizer_from=carried,
            ranks=dist.get_world_size(),
            sample_fn=sample_fn,
            text_fn=text_fn,
        )
        trainer = config.build()
        if released is not None:
            load_weights(trainer.model, released)  # a checkpoint to resume from is loaded later and replaces them
        trainer.metrics_processor.note(_describe_start(train, init_checkpoint, carried))
        try:
            resumed_from = trainer.train()
        finally:
            trainer.close()
        parameters, active = count_parameters(trainer.model, transformer)
        last = trainer.metrics_processor.last
        report = {
            "stage": stage.stage.name,
            "steps": steps,
            "resumed_from_step": resumed_from,
            "images_seen": steps * stage.stage.batch_size,
            "parameters": parameters,
            "active_parameters": active,
            "skipped_steps": trainer.guard.skipped,
            "loss": last.get("loss"),
            "images_per_s": last.get("images_per_s"),
            "train_s": round(time.perf_counter() - begin, 3),
            "ranks": dist.get_world_size(),
            "device": trainer.device.type,
            "torch": torch.__version__,
            **{name: list(finished_checkpoints(storage.join(root, folder))) for name, folder in HANDED_ON.items()},
        }
        done = (json.dumps(report, indent=2) + "\n").encode()
        if dist.get_rank() == 0:
            storage.write_bytes(storage.join(root, REPORT), done)
        dist.barrier()
    if _rank() == 0:  # outside of the process group: copying may take longer than its timeout
        _fill(root, work_dir, out_dir, done)
    return report


def prune_run(train: TrainSettings, work_dir: str | Path) -> None:
    """Removes the full checkpoints once out_dir is sealed. Weights and optimiser state stay, so that a lost out_dir can be
    filled again; they take no extra space while out_dir has hard links to them."""
    root = checkpoint_root(train, Path(work_dir))
    if _done(root) is not None:
        storage.remove(storage.join(root, CHECKPOINTS))


def _done(root: str) -> bytes | None:
    """The report of a finished run whose checkpoints are complete, else None."""
    report = storage.read_bytes(storage.join(root, REPORT))
    if report is None:
        return None
    steps = json.loads(report)
    complete = all(
        steps[name] == list(finished_checkpoints(storage.join(root, folder))) for name, folder in HANDED_ON.items()
    )
    return report if complete else None


def _optimizer_of(checkpoint: str | Path) -> Path:
    """The optimiser state that the previous stage saved with its last weights.

    Raises:
        ValueError: it saved none.
    """
    weights = Path(checkpoint)
    state = weights.parent / OPTIMIZER / weights.name
    if not (state / METADATA).is_file():
        raise ValueError(
            f"train.carry_optimizer=true continues with the optimiser state of the previous stage, but {state} does not "
            "exist: train that stage again with the same key, or set train.carry_optimizer=false for a warm-up"
        )
    return state


def _describe_start(train: TrainSettings, init_checkpoint: str | Path | None, carried: Path | None) -> str:
    if carried is not None:
        return f"continues from {init_checkpoint} with the optimiser state of that step"
    start = ""
    if init_checkpoint is not None:
        start = f", from the weights {init_checkpoint}"
    elif train.init_from is not None:
        start = f", from the weights {train.init_from} (without optimiser state)"
    return f"begins with {train.optim.warmup_steps} steps of warm-up{start}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _check_latents(latents_dir: Path, transformer: TransformerConfig, text_fn: TextFn | None) -> None:
    meta = read_index_meta(latents_dir)
    if meta.text_form == "tokens" and text_fn is None:
        raise ValueError(f"the texts of {latents_dir} are stored as tokens: training needs a text encoder (text_fn)")
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
    root: str, latents_dir: Path, stage: TrainingStage, init_checkpoint: Path | None, carried: Path | None
) -> None:
    """Writes the run's configuration to run.json, or compares it with the one recorded there."""
    values = stage.model_dump(mode="json")
    run = {
        "transformer": values["model"],
        "train": {key: value for key, value in values["train"].items() if key not in FREE_KEYS},
        "stage": values["stage"],
        "seed": stage.seed,
        "latents": read_index_meta(latents_dir).content,
        "init_from": _content(Path(init_checkpoint)) if init_checkpoint else None,
        "optimizer_from": _content(carried) if carried else None,
        "hand_on_optimizer": stage.hand_on_optimizer,
    }
    path = storage.join(root, "run.json")
    if (claimed := storage.read_bytes(path)) is not None:
        known = json.loads(claimed)
        known["train"] = {key: value for key, value in known["train"].items() if key not in FREE_KEYS}
        differing = [name for name in run if known.get(name) != run[name]]
        if differing:
            raise ValueError(
                f"{root} holds a run with another {', '.join(differing)}: use another directory, or remove it"
            )
    elif _rank() == 0:
        storage.write_bytes(path, (json.dumps(run, indent=2) + "\n").encode())


def _content(directory: Path) -> str:
    """A digest of a directory: the digest of the sealed artifact that contains it plus the relative path, else a digest of
    all its bytes."""
    for sealed in (directory, *directory.parents[:2]):
        if (digest := storage.sealed_digest(sealed)) is not None:
            return f"{digest}/{directory.relative_to(sealed).as_posix()}".removesuffix("/.")
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(directory)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _check_one_place(root: str) -> None:
    """Checks that all ranks see the same folder, as each rank writes its part of a checkpoint. With local disks on several
    nodes, each would get a part, and the error would appear only when a checkpoint is read.

    Raises:
        ValueError: a rank does not see a file that rank 0 has just written.
    """
    if dist.get_world_size() == 1:
        return
    name = [f".{os.urandom(8).hex()}"]
    if dist.get_rank() == 0:
        storage.write_bytes(storage.join(root, *name), b"")
    dist.broadcast_object_list(name)
    mark = storage.join(root, *name)
    seen = [False] * dist.get_world_size()
    dist.all_gather_object(seen, _appears(mark))
    if dist.get_rank() == 0:
        storage.remove(mark)
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise ValueError(
            f"{root} is not shared: rank 0 wrote a file there that ranks {blind} do not see. Set train.checkpoint_uri "
            "to an object store, or NUCLEUS_WORK to a folder that all nodes share"
        )


def _appears(path: str) -> bool:
    """Whether a file exists, or appears within VISIBLE_WITHIN_S."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while (content := storage.read_bytes(path)) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return content is not None


def _restore_metrics(root: str, work_dir: Path) -> None:
    """Copies metrics.jsonl from the checkpoints' folder if work_dir has none, as on a new node."""
    path = work_dir / METRICS
    if not path.is_file() and (content := storage.read_bytes(storage.join(root, METRICS))) is not None:
        path.write_bytes(content)


def _fill(root: str, work_dir: Path, out_dir: Path, report: bytes) -> None:
    """Copies a finished run into out_dir. The run keeps its files, so that a lost out_dir can be filled again."""
    _restore_metrics(root, work_dir)
    for kind, target in ((WEIGHTS, out_dir), (OPTIMIZER, out_dir / OPTIMIZER)):
        for step, path in finished_checkpoints(storage.join(root, kind)).items():
            copied = target / f"step-{step:08d}"
            storage.copy_folder(path, copied)
            canonical_metadata(copied)
    for name in (TENSORBOARD, SAMPLES):
        if (work_dir / name).is_dir():
            # Hidden files are incomplete: a kill interrupted their writing.
            shutil.copytree(work_dir / name, out_dir / name, ignore=shutil.ignore_patterns(".*"))
    shutil.copy2(work_dir / METRICS, out_dir / METRICS)
    (out_dir / REPORT).write_bytes(report)
