"""One training stage. Retries and restarts go on from the last checkpoint; SIGTERM makes one and asks for a retry, if
the grace time lets it (`envs.trainer` says how long that is)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from flytekit import Deck, task
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.directory import FlyteDirectory

from tasks import envs
from tasks.artifacts import CheckpointsDir, ComponentsDir, LatentsDir, fetch, held, produce, work_path
from tasks.planning.sections import TrainStage


@task(cache=envs.cache("training"), enable_deck=True, **envs.trainer())
def train_stage(
    latents: LatentsDir, components: ComponentsDir, stage: TrainStage, init: Optional[CheckpointsDir] = None
) -> CheckpointsDir:
    """Trains one stage from the last checkpoint of the stage before, or from scratch."""
    from torch.distributed import DistError

    from model.train.preemption import Preempted
    from model.train.run import prune_run, train_stage as run
    from tasks.training import figures, samples

    latents_path, components_path = fetch(latents), fetch(components)
    parents = [latents_path, components_path]
    init_path = None
    if init is not None:
        init_path = fetch(init)
        parents.append(init_path)
    work_dir = work_path(stage.stage.name, "training", stage.model_dump(mode="json"), parents)

    def train(out: Path) -> dict:
        try:
            return run(
                latents_path,
                stage.model,
                stage.train,
                0,
                init_from=init_path,
                work_dir=work_dir,
                out_dir=out,
                sample_fn=samples.sampler(components_path, latents_path, stage),
            )
        except (Preempted, DistError) as error:  # or other ranks are gone
            # Flyte retries what is recoverable, and nothing else that a task raises.
            raise FlyteRecoverableException(str(error)) from error

    if int(os.environ.get("RANK", "0")):
        train(work_dir)
        return FlyteDirectory(str(work_dir), remote_directory=False)  # rank 0's is the one that Elastic hands on
    with held(work_dir):
        artifact, final, _ = produce("checkpoints", train, parents=parents, config=stage)
        prune_run(stage.train, work_dir)
    Deck(f"Training {stage.stage.name}", figures.training_html(Path(final)))
    return artifact
