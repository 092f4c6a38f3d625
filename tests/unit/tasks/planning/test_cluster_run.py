"""What a cluster adds to a recipe before a run, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionState

from model.plan.data_costs import Corpus, data_costs
from tasks import envs
from tasks.planning import task
from tasks.planning.cluster_run import check_download, check_engine, latent_bytes, with_shared_checkpoints
from tasks.planning.sections import stages
from tasks.recipe import load_recipe

COMMIT = f"curation.scorers.watermark.revision={'a' * 40}"
CORPUS = {"A1": 20_000_000, "A2": 80_000_000, "A3": 300_000_000, "A4": 200_000_000, "A5": 100_000_000}


@pytest.fixture
def pod(monkeypatch):
    """A pod of the shape 8x8."""
    monkeypatch.setattr(envs, "TRAIN_NNODES", 8)
    monkeypatch.setattr(envs, "TRAIN_NPROC", 8)
    monkeypatch.setenv("NUCLEUS_ENDPOINTS", "http://vllm-captioner:8000/v1")
    context = FlyteContextManager.current_context()
    state = context.new_execution_state().with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        yield


@pytest.fixture
def cluster(pod):
    """The function behind resolve_recipe."""
    return lambda *overrides: task.resolve_recipe.task_function(
        "nucleus_17b", list(overrides), "s3://bucket/images", "merged"
    )


@pytest.mark.slow
def test_a_pod_keeps_checkpoints_in_the_store_and_reads_latents_from_it(cluster, monkeypatch):
    monkeypatch.setenv("NUCLEUS_STORE", "s3://bucket/store")
    sections = cluster(COMMIT)
    assert len(sections.stages) == 3
    for stage in sections.stages:
        assert stage.train.train.checkpoint_uri == "s3://bucket/store/runs"
        assert stage.train.train.latents == "stream"
    assert "s3://bucket/store" not in sections.recipe_json  # which is published
    chosen = cluster(COMMIT, "train.checkpoint_uri=s3://other/runs").stages[0]
    assert chosen.train.train.checkpoint_uri == "s3://other/runs"


def test_several_nodes_without_a_shared_place_for_checkpoints_are_refused_before_any_work(cluster, monkeypatch):
    monkeypatch.delenv("NUCLEUS_STORE", raising=False)
    with pytest.raises(ValueError, match="checkpoint_uri is not set .* train.nnodes=8 nodes write one checkpoint"):
        cluster(COMMIT)
    one = load_recipe("tiny")
    assert with_shared_checkpoints(one, "/home/store") is one  # a single process may keep them on its own disk


def test_another_shape_than_the_registered_one_is_refused_before_any_work(cluster, monkeypatch):
    monkeypatch.setenv("NUCLEUS_STORE", "s3://bucket/store")
    with pytest.raises(ValueError, match="8 x 8 = 64 processes"):
        cluster(COMMIT, "train.nnodes=16", "train.nproc_per_node=4")


def test_a_download_of_more_latents_than_the_scratch_of_a_pod_is_refused_with_the_setting_that_streams():
    recipe = load_recipe("nucleus_17b", ["train.latents=download"])
    with pytest.raises(
        ValueError, match=r"latents of stage_256, about 2.,... GB .* may write 6,872 GB.*latents=stream"
    ):
        check_download(CORPUS, stages(recipe), 8 * 800)
    check_download(CORPUS, stages(load_recipe("nucleus_17b")), 8 * 800)
    check_download({"A1": 100_000}, stages(recipe), 8 * 800)  # a small corpus fits


def test_a_corpus_whose_latents_do_not_fit_is_refused_before_it_is_encoded(pod, monkeypatch):
    monkeypatch.setattr(task, "fetch", lambda *_: None)
    monkeypatch.setattr("tasks.curation.curated.images_by_tier", lambda _: CORPUS)
    check = task.check_curated.task_function
    with pytest.raises(ValueError, match="train.latents=download"):
        check(None, stages(load_recipe("nucleus_17b", ["train.latents=download"])))
    assert check(None, stages(load_recipe("nucleus_17b"))) == CORPUS


def test_the_size_of_latents_is_the_planners():
    recipe = load_recipe("nucleus_17b")
    costs = data_costs(recipe.train.stages, Corpus(), gpu_flops=1e15, training_days=1, gpus=64, text_width=4096)
    for stage, planned in zip(stages(recipe), costs["stages"], strict=True):
        drawn = {"A1": int(planned["images"])}  # one tier, which every stage draws: fractions of tiers do not matter
        assert latent_bytes(drawn, stage.train) == pytest.approx(planned["bytes"], rel=0.1)


def test_the_scratch_of_a_training_pod_is_what_its_task_requests():
    assert envs.trainer()["requests"].ephemeral_storage == f"{envs.training_scratch_gib()}Gi"


@pytest.mark.slow
def test_the_download_is_checked_in_an_image_without_torch():
    """check_curated runs in curation's image."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tasks.planning.cluster_run import latent_bytes\n"
        "from tasks.planning.sections import stages\n"
        "from tasks.recipe import load_recipe\n"
        "print(latent_bytes({'A1': 1000}, stages(load_recipe('smoke'))[0].train) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_spark_is_refused_before_scoring_where_no_spark_application_is_registered(monkeypatch):
    with pytest.raises(ValueError, match="not registered as Spark applications: register with NUCLEUS_SPARK"):
        check_engine("spark", None)
    check_engine("spark", '{"spark.executor.instances": "8"}')
    check_engine("duckdb", None)
    monkeypatch.setattr(task, "is_local", lambda: False)
    monkeypatch.delenv("NUCLEUS_SPARK", raising=False)
    with pytest.raises(ValueError, match="not registered as Spark applications"):
        task.resolve_recipe.task_function(
            recipe="smoke", overrides=["curation.engine=spark"], source="", ends_in="curated"
        )
