"""One training stage. Retries and restarts resume from the last checkpoint. SIGTERM saves one and requests a retry, if
the grace time is long enough (`envs.trainer`). Faults of machines and networks also request a retry (`faults`).

Flyte's cache key is the whole stage: with other ranks, or another interval of logs, it calls the task again. The task
then resumes the same work, or returns the finished result, unless a setting that determines the weights has changed.
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
from model.config import FREE_KEYS
from model.stages import TrainingStage
from tasks import envs
from tasks.artifacts import (
    CheckpointsDir,
    ComponentsDir,
    LatentsDir,
    TextsDir,
    exclusive,
    fetch,
    once_per_pod,
    plain_errors,
    produce,
    source,
    work_path,
)
from tasks.manifest import MANIFEST


@contextlib.contextmanager
def retried() -> Iterator[None]:
    """Converts errors that another attempt may not have to recoverable ones, which Flyte retries."""
    from torch.distributed.checkpoint.api import CheckpointException  # not a subclass of Exception

    from tasks.training.faults import is_permanent

    try:
        yield
    except FlyteRecoverableException:
        raise
    except (Exception, CheckpointException) as error:
        if not is_permanent(error):
            raise FlyteRecoverableException(f"{type(error).__name__}: {error}") from error
        if isinstance(error, CheckpointException):
            raise RuntimeError(str(error)) from error
        raise


def earlier_checkpoints(trained: FlyteDirectory) -> tuple[str, ...]:
    """Paths of all checkpoints but the last in the artifact. Only the merge needs them: the next stage starts from the
    last one, and at 17B every node would download 67.7 GB for each."""
    manifest = storage.read_bytes(storage.join(source(trained), MANIFEST))
    if manifest is None:
        return ()  # `fetch` reports the error
    step_of = {name: re.match(r"step-(\d+)/", name) for name in json.loads(manifest)["files"]}
    steps = {name: int(match[1]) for name, match in step_of.items() if match}
    return tuple(name for name, step in steps.items() if step < max(steps.values()))


@task(cache=envs.cache("training"), enable_deck=True, **envs.trainer())
def train_stage(
    latents: LatentsDir,
    texts: TextsDir,
    components: ComponentsDir,
    stage: TrainingStage,
    init: Optional[CheckpointsDir] = None,
) -> CheckpointsDir:
    """Trains one stage from the last checkpoint of the previous stage, or from scratch."""
    from model.train.run import LOGS, prune_run
    from model.train.run import train_stage as run
    from tasks.encoding.open_latents import open_latents, text_settings
    from tasks.encoding.text.prompts import OnlineText
    from tasks.training import plots, samples

    with retried():
        streamed = stage.train.latents == "stream"
        latents_path, texts_path = fetch(latents, "latents"), fetch(texts, "texts")
        components_path = fetch(components, "components")
        parents = [latents_path, texts_path, components_path]
        init_path = None
        if init is not None:
            init_path = fetch(init, "checkpoints", without=earlier_checkpoints(init))
            parents.append(init_path)
        trained = stage.model_dump(mode="json", exclude={"train": set(FREE_KEYS)})
        with plain_errors():
            index = once_per_pod(
                f"{latents_path} {texts_path} {streamed}", lambda: open_latents(latents_path, texts_path, streamed)
            )
        text = text_settings(texts_path)
        work_dir = work_path(stage.stage.name, "training", trained, parents)

        def train(out: Path) -> dict:
            return run(
                index,
                stage,
                init_from=init_path,
                work_dir=work_dir,
                out_dir=out,
                sample_fn=samples.sampler(components_path, text.max_tokens, stage),
                latents_uri=str(index) if streamed else None,
                text_fn=OnlineText(components_path, text) if text.form == "tokens" else None,
            )

        if int(os.environ.get("RANK", "0")):
            train(work_dir)
            return FlyteDirectory(str(work_dir), remote_directory=False)  # Elastic returns the directory of rank 0
        with exclusive(work_dir):
            artifact, final, _ = produce("checkpoints", train, parents=parents, config=trained, logs=LOGS)
            prune_run(stage.train, work_dir)
        Deck(f"Training {stage.stage.name}", plots.training_html(Path(final)))
        return artifact
