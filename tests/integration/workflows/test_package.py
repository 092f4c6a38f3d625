"""The package of workflows that a cluster gets, decoded."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import tasks_pb2
from google.protobuf.json_format import MessageToDict

from tasks.envs import CACHE_VERSIONS

ROOT = Path(__file__).resolve().parents[3]
KINDS = {"_1.pb": task_pb2.TaskSpec, "_2.pb": workflow_pb2.WorkflowSpec}
PLAN = "_3.pb"
ROLES = ("curation", "scorer", "encoder", "trainer", "evaluator", "publisher")


def package(out: Path, **environment: str) -> dict[str, task_pb2.TaskSpec | workflow_pb2.WorkflowSpec]:
    """Name of a task or workflow -> its specification. The package stays at `out`, for `plans_of`."""
    images = [part for role in ROLES for part in ("--image", f"{role}=registry.example/{role}:v1")]
    subprocess.run(
        [
            str(Path(sys.executable).with_name("pyflyte")),
            "--pkgs",
            "workflows",
            "package",
            *images,
            "--output",
            str(out),
            "-f",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | environment,
    )
    result = {}
    with tarfile.open(out) as tar:
        for member in tar:
            kind = KINDS.get(member.name[-5:])
            if kind and "arraynode" not in member.name:
                spec = kind.FromString(tar.extractfile(member).read())
                result[spec.template.id.name] = spec
    return result


def plans_of(out: Path) -> dict[str, launch_plan_pb2.LaunchPlan]:
    """Name -> launch plan, of a package."""
    with tarfile.open(out) as tar:
        result = [
            launch_plan_pb2.LaunchPlan.FromString(tar.extractfile(m).read()) for m in tar if m.name.endswith(PLAN)
        ]
    return {plan.id.name: plan for plan in result}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    """The package of one process, with a nightly evaluation."""
    return tmp_path_factory.mktemp("package") / "package.tgz"


@pytest.fixture(scope="module")
def specs(packaged) -> dict[str, task_pb2.TaskSpec | workflow_pb2.WorkflowSpec]:
    return package(packaged, NUCLEUS_NIGHTLY_MODEL="s3://bucket/pipeline", NUCLEUS_NOTIFY="a@example.com")


@pytest.mark.parametrize(
    ("task", "role", "cache"),
    [
        ("tasks.encoding.task.make_components", "encoder", "components"),
        ("tasks.training.task.train_stage", "trainer", "training"),
        ("tasks.merging.task.merge_checkpoints", "trainer", "merging"),
        ("tasks.evaluation.task.generate_part", "evaluator", "evaluation"),
        ("tasks.evaluation.task.generate_from_model", "evaluator", "evaluation"),
        ("tasks.evaluation.task.make_prompts", "evaluator", "prompts"),
        ("tasks.evaluation.task.judge_images", "evaluator", "evaluation"),
        ("tasks.publishing.task.publish_pipeline", "publisher", "publishing"),
    ],
)
def test_each_task_has_its_roles_image_equal_requests_and_limits_and_a_cache_version(specs, task, role, cache):
    template = specs[task].template
    assert template.container.image == f"registry.example/{role}:v1"
    requests = {entry.name: entry.value for entry in template.container.resources.requests}
    assert requests and requests == {entry.name: entry.value for entry in template.container.resources.limits}
    assert template.metadata.discoverable and template.metadata.discovery_version == CACHE_VERSIONS[cache]
    assert template.metadata.retries.retries >= 3


def test_tasks_that_read_the_recipe_and_print_the_summary_are_not_cached(specs):
    for task in ("tasks.planning.task.resolve_recipe", "tasks.publishing.task.show_results"):
        assert not specs[task].template.metadata.discoverable


@pytest.mark.parametrize("task", ["list_corpus", "score_group", "decide_corpus", "select_group", "gather_curated"])
def test_curation_is_cached_part_by_part_and_not_by_flyte(specs, task):
    name = f"tasks.curation.task.{task}"
    mapped = [spec for result, spec in specs.items() if result == name]
    assert mapped, sorted(specs)
    template = mapped[0].template
    role = "scorer" if task == "score_group" else "curation"
    assert not template.metadata.discoverable and template.container.image == f"registry.example/{role}:v1"
    requests = {entry.name: entry.value for entry in template.container.resources.requests}
    assert requests and requests == {entry.name: entry.value for entry in template.container.resources.limits}


@pytest.mark.parametrize(
    ("name", "after", "outputs"),
    [
        ("pretrain", [], {"merged", "components", "curated"}),
        ("ablate", ["score_merged"], {"scorecard", "merged"}),
        ("reproduce", ["score_merged", "score_further", "publish_pipeline", "show_results"],
         {"pipeline", "scorecard", "merged", "curated"}),
    ],
)  # fmt: skip
def test_workflows_share_the_way_to_merged_weights(specs, name, after, outputs):
    template = specs[f"workflows.{name}.{name}"].template
    assert calls(template) == [
        "resolve_recipe", "curate_source", "check_curated", "make_components", "train_stages", *after,
    ]  # fmt: skip
    assert set(template.interface.outputs.variables) == outputs
    nodes = {node.id: node for node in template.nodes}
    ends_in = {binding.var: binding.binding for binding in nodes["n0"].inputs}["ends_in"].scalar.primitive.string_value
    assert ends_in == {"pretrain": "merged", "ablate": "scorecard", "reproduce": "pipeline"}[name]
    # A corpus that leaves a stage without images must not be encoded.
    assert "n2" in nodes["n3"].upstream_node_ids


@pytest.mark.parametrize(
    ("name", "called", "artifacts"),
    [
        ("train", ["resolve_recipe", "check_curated", "make_components", "train_stages"], {"curated"}),
        ("encode", ["resolve_recipe", "check_curated", "make_components", "encode_stages"], {"curated"}),
        ("publish", ["resolve_recipe", "publish_pipeline", "show_results"],
         {"merged", "components", "scorecard", "curated"}),
        ("study", ["plan_study", "run_study"], set()),
    ],
)  # fmt: skip
def test_each_workflow_starts_from_a_recipe_and_artifacts(specs, name, called, artifacts):
    template = specs[f"workflows.{name}.{name}"].template
    assert calls(template) == called
    inputs = template.interface.inputs.variables
    assert {key for key, variable in inputs.items() if variable.type.HasField("blob")} == artifacts
    assert {"recipe", "overrides"} <= set(inputs)


@pytest.mark.parametrize(
    ("name", "called", "needed"),
    [
        ("evaluate", ["resolve_model", "plan_benchmarks", "score_benchmarks"], {"model", "benchmarks"}),
        ("choose_candidate", ["resolve_incumbent", "plan_candidates", "score_candidates"],
         {"model", "benchmark", "candidates"}),
        ("evaluate_nightly", ["resolve_model", "plan_benchmarks", "find_changed", "score_changed"], set()),
    ],
)  # fmt: skip
def test_evaluation_starts_from_a_model_and_names_of_benchmarks(packaged, specs, name, called, needed):
    path = f"workflows.{name}.{name}"
    assert calls(specs[path].template) == called
    inputs = plans_of(packaged)[path].spec.default_inputs.parameters
    assert {key for key, given in inputs.items() if given.required} == needed


def test_a_place_is_looked_at_each_time_and_images_are_known_by_the_digest_of_their_model(specs):
    for task in ("resolve_model", "resolve_incumbent", "find_changed", "store_score", "gate_scores"):
        assert not specs[f"tasks.evaluation.task.{task}"].template.metadata.discoverable
    metadata = specs["tasks.evaluation.task.generate_from_model"].template.metadata
    assert metadata.discoverable and list(metadata.cache_ignore_input_vars) == ["model"]
    for name in ("evaluate.score_benchmarks", "choose_candidate.score_candidates", "evaluate_nightly.score_changed"):
        assert specs[f"workflows.{name}"].template.container.image == "registry.example/evaluator:v1"


def test_the_nightly_plan_is_scheduled_and_inactive_and_mails_when_it_fails(packaged, specs):
    plan = plans_of(packaged)["evaluate-nightly"]
    assert plan.spec.workflow_id.name == "workflows.evaluate_nightly.evaluate_nightly"
    assert plan.spec.entity_metadata.schedule.cron_schedule.schedule == "0 3 * * *"
    assert plan.closure.state == launch_plan_pb2.INACTIVE
    (mail,) = plan.spec.entity_metadata.notifications
    assert list(mail.email.recipients_email) == ["a@example.com"] and len(mail.phases) == 2
    given = {
        key: value.default.scalar.primitive.string_value for key, value in plan.spec.default_inputs.parameters.items()
    }
    assert (given["model"], given["benchmarks"]) == ("s3://bucket/pipeline", "")  # those of the published pipeline


def calls(template) -> list[str]:
    """Names of the tasks and workflows that a workflow calls, in order."""
    nodes = [node for node in template.nodes if node.id != "start-node"]
    called = [node.task_node.reference_id.name or node.workflow_node.sub_workflow_ref.name for node in nodes]
    return [path.split(".")[-1] for path in called]


def test_training_asks_for_accelerators_and_may_be_preempted(specs):
    template = specs["tasks.training.task.train_stage"].template
    assert template.metadata.interruptible
    requests = {entry.name: entry.value for entry in template.container.resources.requests}
    assert requests[tasks_pb2.Resources.GPU] == "1"
    assert template.extended_resources.gpu_accelerator.device


def test_training_on_several_nodes_is_a_job_whose_pods_find_the_same_task_and_have_time_to_save(tmp_path):
    asked = {"NUCLEUS_TRAIN_NNODES": "8", "NUCLEUS_TRAIN_NPROC": "4", "NUCLEUS_TRAIN_GRACE_S": "120"}
    specs = package(tmp_path / "package.tgz", **asked, NUCLEUS_TRAIN_RETRIES="7")
    planner = specs["tasks.planning.task.resolve_recipe"].template.container
    template = specs["tasks.training.task.train_stage"].template
    assert template.type == "pytorch"
    elastic = MessageToDict(template.custom)["elasticConfig"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == 8 and elastic["nprocPerNode"] == 4
    pod = MessageToDict(template.k8s_pod.pod_spec)
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment.items() >= asked.items() and template.metadata.retries.retries == 7
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert {entry.key: entry.value for entry in planner.env}.items() >= dict(list(asked.items())[:2]).items()
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120" and pod["terminationGracePeriodSeconds"] > 120
    assert container["image"] == "registry.example/trainer:v1"
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["resources"]["limits"]["gpu"] == "4"
    # The pod of a dynamic workflow writes down the training task again, so it must see the same settings.
    for name in ("workflows.train.train_stages", "workflows.study.run_study"):
        container = specs[name].template.container
        assert container.image == "registry.example/trainer:v1"
        registered = asked | {"NUCLEUS_TRAIN_RETRIES": "7"}
        assert {entry.key: entry.value for entry in container.env}.items() >= registered.items()
