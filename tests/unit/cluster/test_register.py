"""`make register` against a stand-in flyteadmin: what a cluster is sent, and what is refused before."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flyteadmin import STOCK_LIMITS, flyteadmin

from containers.lock import ROLES
from tasks.site import load_site
from tools import register

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "sha256:" + "ab" * 32


def helm_limits() -> dict[str, str]:
    values = yaml.safe_load((ROOT / "k8s" / "helm" / "flyte-binary.yaml").read_text())
    return values["configuration"]["inline"]["task_resources"]["limits"]


def head() -> str:
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


@pytest.fixture(scope="module")
def lock(tmp_path_factory) -> Path:
    """A lock whose images have the working tree's code, committed or not."""
    tree = subprocess.check_output(["git", "stash", "create"], cwd=ROOT, text=True).strip() or head()
    images = {role: {"image": f"registry.example/nucleus-{role}", "digest": DIGEST} for role in ROLES}
    path = tmp_path_factory.mktemp("lock") / "images.lock.json"
    path.write_text(json.dumps({"revision": tree, "variant": "cuda", "images": images}))
    return path


def config(folder: Path, endpoint: str, **section: str) -> Path:
    path = folder / "flyte.yaml"
    nucleus = {"project": "nucleus", "domain": "production"} | section
    path.write_text(yaml.safe_dump({"admin": {"endpoint": f"dns:///{endpoint}", "insecure": True}, "nucleus": nucleus}))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.register", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def registered(lock, tmp_path_factory):
    """(what flyteadmin was sent, seconds of CPU that it took), for the shape 8x8 on H100 with EFA, a queue and a secret."""
    with flyteadmin(helm_limits()) as (endpoint, admin):
        site = {"profile": "h100", "fabric": "efa", "queue": "training", "hub_secret": "nucleus-huggingface"}
        path = config(tmp_path_factory.mktemp("config"), endpoint, **site)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--config", str(path), "--lock", str(lock), "--shape", "8x8")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return admin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_everything_is_registered_by_digest_in_the_project_and_domain_at_the_commit(registered):
    admin, _ = registered
    assert (
        {"workflows.reproduce.reproduce", "workflows.pretrain.pretrain"} <= admin.workflows.keys() <= admin.plans.keys()
    )
    for request in (*admin.tasks.values(), *admin.workflows.values(), *admin.plans.values()):
        assert (request.id.project, request.id.domain) == ("nucleus", "production")
        assert request.id.version == f"{head()}-8x8"
    for name, request in admin.tasks.items():
        template = request.spec.template
        image = template.container.image or template.k8s_pod.pod_spec["containers"][0]["image"]
        assert re.fullmatch(rf"registry\.example/nucleus-({'|'.join(ROLES)})@{DIGEST}", image), name


def test_the_shapes_launch_plan_is_registered_with_its_recipe(registered):
    admin, _ = registered
    plan = admin.plans["pretrain-nucleus_17b-8x8"].spec
    assert plan.fixed_inputs.literals["recipe"].scalar.primitive.string_value == "nucleus_17b"
    assert plan.max_parallelism == 64 and "reproduce-smoke" not in admin.plans


def test_nothing_that_is_sent_names_a_path_of_the_machine_that_registers(registered):
    admin, _ = registered
    for request in (*admin.tasks.values(), *admin.workflows.values(), *admin.plans.values()):
        for text in (str(ROOT), str(Path.home()), "/root", sys.prefix):
            assert text.encode() not in request.SerializeToString(), f"{request.id.name} has {text}"


def test_every_task_has_a_timeout_retries_a_template_and_no_code_to_fetch(registered):
    admin, _ = registered
    for name, request in admin.tasks.items():
        metadata = request.spec.template.metadata
        assert metadata.timeout.seconds > 0, name
        assert metadata.retries.retries >= 3, name
        assert metadata.pod_template_name.startswith("nucleus-"), name
        assert "pyflyte-fast-execute" not in request.spec.template.container.args, name


def test_a_training_job_is_sized_queued_cleaned_up_and_has_efa(registered):
    admin, _ = registered
    template = admin.tasks["tasks.training.task.train_stage"].spec.template
    assert template.type == "pytorch" and template.metadata.pod_template_name == "nucleus-trainer-efa"
    assert template.custom["runPolicy"]["cleanPodPolicy"] == "CLEANPOD_POLICY_ALL"
    assert template.custom["elasticConfig"]["maxReplicas"] == 8
    assert template.metadata.metadata.labels["kueue.x-k8s.io/queue-name"] == "training"
    assert template.extended_resources.gpu_accelerator.device == "nvidia-h100"


def test_only_tasks_that_reach_the_hub_declare_its_token(registered):
    admin, _ = registered
    declared = {n for n, r in admin.tasks.items() if r.spec.template.security_context.secrets}
    assert "tasks.publishing.task.publish_pipeline" in declared
    assert not any(name.startswith(("tasks.curation", "tasks.training", "tasks.planning")) for name in declared)


def test_registration_takes_seconds(registered):
    _, seconds = registered
    assert seconds < 30  # of CPU, so that a busy machine does not matter; importing torch for Elastic is most of it


def test_stock_limits_refuse_large_tasks_and_a_small_profile_says_less(lock, tmp_path):
    with flyteadmin(STOCK_LIMITS) as (endpoint, _):
        done = run("--config", str(config(tmp_path, endpoint, profile="h100")), "--lock", str(lock))
    assert done.returncode != 0 and "greater than current limit" in done.stdout + done.stderr


def test_images_of_other_code_are_refused(tmp_path):
    first = subprocess.check_output(["git", "rev-list", "--max-parents=0", "HEAD"], cwd=ROOT, text=True).split()[0]
    images = {role: {"image": "r/x", "digest": DIGEST} for role in ROLES}
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"revision": first, "variant": "cuda", "images": images}))
    with pytest.raises(ValueError, match="the code differs"):
        register.images(path)
    path.write_text(json.dumps({"revision": first, "variant": "cuda", "images": {"trainer": images["trainer"]}}))
    with pytest.raises(ValueError, match="no image of curation"):
        register.images(path)
    with pytest.raises(ValueError, match="does not exist: make images"):
        register.images(tmp_path / "none.json")


def test_a_config_without_an_endpoint_or_with_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"copy config/flyte\.example\.yaml"):
        load_site(tmp_path / "none.yaml")
    path = config(tmp_path, "127.0.0.1:1", profil="h100")
    with pytest.raises(ValueError, match="nucleus.profil is unknown"):
        load_site(path)


def test_the_example_config_is_one_that_loads():
    assert load_site(ROOT / "config" / "flyte.example.yaml")["nucleus"]["profile"] == "h100"


@pytest.mark.parametrize("text", ["8", "0x8", "8x", "x8", "8x8x8"])
def test_a_shape_is_nodes_times_processes(text, capsys):
    with pytest.raises(SystemExit):
        register.main(["--shape", text])
    assert "NODESxPROCESSES" in capsys.readouterr().err
