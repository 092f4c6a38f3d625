"""The task that samples a part of the images: its state between attempts, and its output."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from flytekit.types.directory import FlyteDirectory
from PIL import Image

from eval.config import EvalConfig
from eval.generation import pipelines
from tasks import store
from tasks.artifacts import UserError
from tasks.evaluation import evaluate, task
from tasks.evaluation.plan import ImagesPart
from tasks.manifest import load_manifest, seal
from tasks.store import home

CONFIG = EvalConfig(images_per_prompt=1, image_size_px=16, batch_size=4, seeds=(0,))
PROMPT = {"tag": "colors", "include": [], "prompt": "a photo of a red circle"}


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Calls the task's function on sealed inputs, with a sampler in the pipeline's place."""
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "home"))
    inputs = {"config": CONFIG, "part": ImagesPart(seed=0)}
    for kind, name in (("merged", "file"), ("components", "file"), ("prompts", "prompts.jsonl")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text((json.dumps(PROMPT) + "\n") * 6)
        seal(tmp_path / kind, kind)
        inputs[kind] = FlyteDirectory(str(tmp_path / kind))
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: type("Pipeline", (), {"transformer": None}))

    def call(before_batch=lambda: None) -> Path:
        def sampler(prompts, *_):
            before_batch()
            return [Image.new("RGB", (16, 16), "red") for _ in prompts]

        monkeypatch.setattr(pipelines, "diffusers_sampler", lambda *_, **__: sampler)
        return Path(task.generate_part.task_function(**inputs).path)

    return call


def runs() -> list[Path]:
    return list((home() / "runs").iterdir())


def test_a_second_run_of_the_same_images_is_refused_and_a_finished_one_leaves_nothing(sample):
    refused = []

    def another():
        if not refused:
            refused.append(1)
            with pytest.raises(UserError, match="another run does the same work"):
                sample()

    sample(another)
    assert refused and runs() == []


def test_images_that_could_not_be_sealed_are_not_sampled_again(sample, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    batches = []
    with monkeypatch.context() as context:
        context.setattr(store, "seal", full)
        with pytest.raises(UserError, match="the disk under .* is full"):
            sample(lambda: batches.append(1))
    sample(lambda: batches.append(1))
    assert len(batches) == 2  # of six images


def test_a_kill_leaves_nothing_in_the_artifact(sample, monkeypatch, tmp_path):
    """The next attempt does not return a file that was half-written when the process was killed."""

    def attempt():
        real = os.replace
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        os.replace = lambda part, whole: (kill if str(whole).endswith(".png") else real)(part, whole)
        sample()

    killed = multiprocessing.get_context("fork").Process(target=attempt)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    (work_dir,) = runs()
    assert list(work_dir.rglob(".*.png.*"))
    artifact = sample()
    monkeypatch.setenv("NUCLEUS_HOME", str(tmp_path / "other"))
    assert load_manifest(artifact).digest == load_manifest(sample()).digest
