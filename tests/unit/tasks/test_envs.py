"""What is asked of Flyte for the training task, by the environment in which workflows are registered."""

from __future__ import annotations

import importlib.util

import pytest

from tasks import envs

ALLOCATOR = "PYTORCH_ALLOC_CONF"
NAMES = ("NUCLEUS_TRAIN_RETRIES", "NUCLEUS_ACCELERATOR", ALLOCATOR, "NUCLEUS_TRAIN_NNODES", "NUCLEUS_TRAIN_NPROC")


@pytest.fixture
def trainer(monkeypatch):
    def options(**environment):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("tasks.envs_as_registered", envs.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.trainer()

    return options


def test_retries_are_for_weeks_of_preemptions_or_as_many_as_are_asked_for(trainer):
    assert trainer()["retries"] >= 14 * 24 / 4  # two weeks, of one every four hours
    assert trainer(NUCLEUS_TRAIN_RETRIES="3")["retries"] == 3


def test_memory_of_an_accelerator_is_in_segments_that_grow_unless_the_user_says_otherwise(trainer):
    """Of one process and of several; without an accelerator there is nothing to set."""
    for ranks in ("1", "2"):
        asked = {"NUCLEUS_TRAIN_NPROC": ranks}
        assert trainer(**asked)["environment"][ALLOCATOR] == "expandable_segments:True"
        assert trainer(**asked, PYTORCH_ALLOC_CONF="backend:native")["environment"][ALLOCATOR] == "backend:native"
        assert ALLOCATOR not in trainer(**asked, NUCLEUS_ACCELERATOR="none")["environment"]


def test_a_pod_with_accelerators_sets_what_is_read_when_a_process_starts(trainer):
    environment = trainer(NUCLEUS_TRAIN_NPROC="8")["environment"]
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert 8 * int(environment["TORCHINDUCTOR_COMPILE_THREADS"]) <= 96  # cores
