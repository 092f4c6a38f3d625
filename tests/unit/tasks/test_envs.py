"""The resources of the training task, which the environment at registration determines."""

from __future__ import annotations

import importlib.util
import sys
import types

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


def test_retries_suffice_for_weeks_of_preemptions_or_are_as_configured(trainer):
    assert trainer()["retries"] >= 14 * 24 / 4  # two weeks, of one every four hours
    assert trainer(NUCLEUS_TRAIN_RETRIES="3")["retries"] == 3


def test_memory_of_an_accelerator_is_in_segments_that_grow_unless_the_user_says_otherwise(trainer):
    """For one process and several; without an accelerator there is nothing to set."""
    for ranks in ("1", "2"):
        asked = {"NUCLEUS_TRAIN_NPROC": ranks}
        assert trainer(**asked)["environment"][ALLOCATOR] == "expandable_segments:True"
        assert trainer(**asked, PYTORCH_ALLOC_CONF="backend:native")["environment"][ALLOCATOR] == "backend:native"
        assert ALLOCATOR not in trainer(**asked, NUCLEUS_ACCELERATOR="none")["environment"]


SITE = (
    "NUCLEUS_PROFILE",
    "NUCLEUS_FABRIC",
    "NUCLEUS_QUEUE",
    "NUCLEUS_TOPOLOGY",
    "NUCLEUS_METRICS_PORT",
    "NUCLEUS_POD_TEMPLATES",
    "NUCLEUS_HUB_SECRET",
    "NUCLEUS_WANDB_SECRET",
)


@pytest.fixture
def site(monkeypatch):
    """tasks.envs as a registration with these settings imports it."""

    def module(**environment):
        for name in (*NAMES, *SITE, "NUCLEUS_ACCELERATOR_LABEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("tasks.envs_of_site", envs.__file__)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return module


def test_with_spark_the_tables_are_decided_by_a_spark_application_with_the_sites_settings(site, monkeypatch):
    from dataclasses import dataclass

    @dataclass
    class Spark:
        spark_conf: dict[str, str]

    plugin = types.ModuleType("flytekitplugins.spark")
    plugin.Spark = Spark
    monkeypatch.setitem(sys.modules, "flytekitplugins.spark", plugin)
    monkeypatch.delenv("NUCLEUS_SPARK", raising=False)
    plain = site().tables("curation")
    assert "task_config" not in plain
    monkeypatch.setenv("NUCLEUS_SPARK", '{"spark.executor.instances": "8"}')
    module = site()
    options = module.tables("curation")
    assert options.pop("task_config") == Spark({"spark.executor.instances": "8"})
    assert options == plain
    assert "task_config" not in module.gather("curation")  # no other task
    # A dynamic workflow's pod composes the tasks again.
    assert module.dynamic("curation")["environment"]["NUCLEUS_SPARK"] == '{"spark.executor.instances": "8"}'


def test_spark_without_its_plugin_is_an_error(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "flytekitplugins.spark", None)
    monkeypatch.setenv("NUCLEUS_SPARK", "{}")
    with pytest.raises(ImportError):
        site().tables("curation")


def _all(module):
    return [
        module.light("curation"),
        module.planner(),
        module.shard("curation"),
        module.gather("encoder"),
        module.publisher(),
        module.merger(),
        module.gpu_single("encoder"),
        module.trainer(),
    ]


@pytest.mark.parametrize("profile", ["cpu-small", "a10g", "l40s", "h100", "h200", "b200"])
def test_every_task_of_every_profile_has_a_timeout_scratch_space_and_equal_requests_and_limits(site, profile):
    for options in _all(site(NUCLEUS_PROFILE=profile)):
        assert options["timeout"].total_seconds() > 0
        assert options["requests"] == options["limits"] and options["requests"].ephemeral_storage
        assert options["pod_template_name"].startswith("nucleus-")


def test_without_accelerators_everything_fits_a_laptop(site):
    for options in _all(site(NUCLEUS_ACCELERATOR="none")):
        assert int(options["requests"].cpu) <= 2 and int(options["requests"].mem[:-2]) <= 8
        assert "accelerator" not in options and options["requests"].gpu is None


def test_one_rank_asks_for_its_share_of_a_node_and_eight_for_a_node(site):
    one = site(NUCLEUS_PROFILE="h100").trainer()["requests"]
    node = site(NUCLEUS_PROFILE="h100", NUCLEUS_TRAIN_NPROC="8").trainer()["requests"]
    assert (int(one.gpu), int(node.gpu)) == (1, 8)
    assert int(node.cpu) == 8 * int(one.cpu) <= 190 and int(node.mem[:-2]) == 8 * int(one.mem[:-2]) <= 1950


def test_the_sites_own_label_template_and_secret_are_used(site):
    module = site(
        NUCLEUS_PROFILE="h200", NUCLEUS_ACCELERATOR_LABEL="NVIDIA-H200", NUCLEUS_FABRIC="efa", NUCLEUS_HUB_SECRET="hub"
    )
    options = module.trainer()
    assert options["accelerator"].to_flyte_idl().device == "NVIDIA-H200"
    assert options["pod_template_name"] == "nucleus-trainer-efa-16"
    assert options["environment"]["FI_PROVIDER"] == "efa" and "secret_requests" not in options
    (secret,) = module.publisher()["secret_requests"]
    assert (secret.group, secret.env_var) == ("hub", "HF_TOKEN")
    for options in (module.shard("curation"), module.gpu_single("encoder"), module.gather("encoder")):
        assert "secret_requests" not in options  # they decode untrusted files
    assert "secret_requests" in module.gpu_single("encoder", reads_hub=True)
    (secret,) = site(NUCLEUS_WANDB_SECRET="metrics").trainer()["secret_requests"]
    assert (secret.group, secret.key, secret.env_var) == ("metrics", "WANDB_API_KEY", "WANDB_API_KEY")
    assert site(NUCLEUS_POD_TEMPLATES="off").trainer()["pod_template_name"] is None


@pytest.mark.parametrize("profile", ["cpu-small", "a10g", "l40s"])
def test_efa_is_refused_for_nodes_without_it(site, profile):
    with pytest.raises(ValueError, match=f"{profile} have no EFA: use h100, h200, b200"):
        site(NUCLEUS_PROFILE=profile, NUCLEUS_FABRIC="efa").trainer()


def test_a_job_of_several_processes_waits_in_the_queue_and_cleans_its_pods(site):
    options = site(
        NUCLEUS_PROFILE="h100", NUCLEUS_TRAIN_NNODES="8", NUCLEUS_TRAIN_NPROC="8", NUCLEUS_QUEUE="q"
    ).trainer()
    assert options["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert options["task_config"].run_policy.clean_pod_policy.name == "ALL"
    assert options["shared_memory"] == "64Gi"
    assert "labels" not in site(NUCLEUS_PROFILE="h100", NUCLEUS_TRAIN_NPROC="8").trainer()
    assert options["pod_template"].annotations is None


def test_a_job_is_placed_in_one_domain_of_the_topology_only_where_the_queue_has_one(site):
    eight = {"NUCLEUS_PROFILE": "h100", "NUCLEUS_TRAIN_NPROC": "8", "NUCLEUS_TOPOLOGY": "rack"}
    placed = site(**eight, NUCLEUS_QUEUE="q").trainer()["pod_template"]
    assert placed.annotations == {"kueue.x-k8s.io/podset-preferred-topology": "rack"}
    assert site(**eight).trainer()["pod_template"].annotations is None


def test_only_training_asks_for_the_devices_of_its_fabric(site):
    module = site(NUCLEUS_PROFILE="h100", NUCLEUS_FABRIC="efa", NUCLEUS_METRICS_PORT="9464")
    assert module.trainer()["pod_template_name"].startswith("nucleus-trainer-efa")
    assert module.trainer()["environment"]["NUCLEUS_METRICS_PORT"] == "9464"
    for options in (module.merger(), module.dynamic()):  # the latter runs on a node without accelerators
        assert options["pod_template_name"] == "nucleus-trainer"


@pytest.mark.parametrize(("name", "value"), [("NUCLEUS_PROFILE", "v100"), ("NUCLEUS_FABRIC", "infiniband")])
def test_an_unknown_setting_is_refused_with_the_valid_ones(site, name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}'.*use"):
        site(**{name: value}).trainer()


def test_a_pod_with_accelerators_sets_what_is_read_when_a_process_starts(trainer):
    environment = trainer(NUCLEUS_TRAIN_NPROC="8")["environment"]
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert 8 * int(environment["TORCHINDUCTOR_COMPILE_THREADS"]) <= 96  # cores
