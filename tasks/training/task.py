"""One training stage. Retries and restarts go on from the last checkpoint; SIGTERM makes one and asks for a retry, if
the grace time lets it (`envs.trainer` says how long that is). So do faults of machines and networks (`faults`).

Flyte caches by the whole section: with other ranks, or another cadence of logs, it calls the task again. That goes on
with the same work, or hands on again what it made, as long as nothing of what is trained is another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from flytekit import Deck, task
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory

from model import storage
from tasks import envs
from tasks.artifacts import CheckpointsDir, ComponentsDir, LatentsDir, exclusive, fetch, produce, source, work_path
from tasks.manifest import MANIFEST
from tasks.planning.sections import TrainStage


@contextlib.contextmanager
def retried() -> Iterator[None]:
    """Flyte retries what is recoverable, and nothing else that a task raises."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception by its type

    from tasks.training.faults import comes_again

    try:
        yield
    except FlyteRecoverableException:
        raise
    except (Exception, CheckpointException) as error:
        if not comes_again(error):
            raise FlyteRecoverableException(f"{type(error).__name__}: {error}") from error
        if isinstance(error, CheckpointException):
            raise RuntimeError(str(error)) from error
        raise


def earlier_checkpoints(trained: FlyteDirectory) -> tuple[str, ...]:
    """The files of all checkpoints but the last, by their paths in the artifact. They are for the merge: the next stage
    starts from the last one, and at 17B each has 67.7 GB, which every node would download."""
    manifest = storage.read_bytes(storage.join(source(trained), MANIFEST))
    if manifest is None:
        return ()  # `fetch` says what is wrong
    step_of = {name: re.match(r"step-(\d+)/", name) for name in json.loads(manifest)["files"]}
    steps = {name: int(match[1]) for name, match in step_of.items() if match}
    return tuple(name for name, step in steps.items() if step < max(steps.values()))


@task(cache=envs.cache("training"), enable_deck=True, **envs.trainer())
def train_stage(
    latents: LatentsDir, components: ComponentsDir, stage: TrainStage, init: Optional[CheckpointsDir] = None
) -> CheckpointsDir:
    """Trains one stage from the last checkpoint of the stage before, or from scratch."""
    from model.ranks import FREE_KEYS
    from model.train.run import prune_run
    from model.train.run import train_stage as run
    from tasks.training import plots as figures
    from tasks.training import samples

    with retried():
        streamed = stage.train.latents == "stream"
        latents_path = fetch(latents, "latents", without=(".safetensors",) if streamed else ())
        components_path = fetch(components, "components")
        parents = [latents_path, components_path]
        init_path = None
        if init is not None:
            init_path = fetch(init, "checkpoints", without=earlier_checkpoints(init))
            parents.append(init_path)
        trained = stage.model_dump(mode="json", exclude={"train": set(FREE_KEYS)})
        work_dir = work_path(stage.stage.name, "training", trained, parents)

        def train(out: Path) -> dict:
            return run(
                latents_path,
                stage.model,
                stage.train,
                0,
                init_from=init_path,
                work_dir=work_dir,
                out_dir=out,
                sample_fn=samples.sampler(components_path, latents_path, stage),
                hand_on_optimizer=stage.hand_on_optimizer,
                latents_uri=source(latents) if streamed else None,
            )

        if int(os.environ.get("RANK", "0")):
            train(work_dir)
            return FlyteDirectory(str(work_dir), remote_directory=False)  # rank 0's is the one that Elastic hands on
        with exclusive(work_dir):
            artifact, final, _ = produce("checkpoints", train, parents=parents, config=stage)
            prune_run(stage.train, work_dir)
        Deck(f"Training {stage.stage.name}", figures.training_html(Path(final)))
        return artifact
