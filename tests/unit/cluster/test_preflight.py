"""Preflight against a scripted API server, moto's S3 and a stand-in flyteadmin: each defect fails its own check."""

from __future__ import annotations

import base64
import copy
import json

import boto3
import pytest
import yaml
from flyteadmin import flyteadmin
from object_store import OWN, s3_server
from scripted_api import scripted_api

from tasks.preflight import checks
from tasks.preflight.__main__ import main

BUCKET = "nucleus-preflight"
TOKEN = "hf_plantedtoken"
NS = "/api/v1/namespaces/nucleus-production"
LABEL = "k8s.amazonaws.com/accelerator"
ALLOCATABLE = {
    "cpu": "191",
    "memory": "2000Gi",
    "nvidia.com/gpu": "8",
    "ephemeral-storage": "28Ti",
    "vpc.amazonaws.com/efa": "32",
    "hugepages-2Mi": "10Gi",
}
FLYTE = {
    "tasks": {"task-plugins": {"enabled-plugins": ["container", "sidecar", "k8s-array", "pytorch"]}},
    "plugins": {"k8s": {"gpu-device-node-label": LABEL, "enable-distributed-error-aggregation": True}},
}
KUEUE = {"integrations": {"frameworks": ["batch/job", "kubeflow.org/pytorchjob"]}}


def named(*names, **more):
    return [{"metadata": {"name": name}} | more for name in names]


def crd(name, *versions):
    return {
        "metadata": {"name": name},
        "spec": {
            "group": "g",
            "scope": "Namespaced",
            "names": {"kind": "K", "plural": "p"},
            "versions": [{"name": version, "served": True, "storage": True} for version in versions],
        },
    }


def deployment(name, image):
    return {
        "metadata": {"name": name},
        "spec": {
            "selector": {},
            "template": {"metadata": {}, "spec": {"containers": [{"name": "c", "image": image}]}},
        },
        "status": {"availableReplicas": 1},
    }


def node(index):
    return {
        "metadata": {"name": f"node-{index}", "labels": {LABEL: "nvidia-h100"}},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {"allocatable": dict(ALLOCATABLE), "conditions": [{"type": "Ready", "status": "True"}]},
    }


def healthy():
    """Path -> object of a cluster on which nucleus_17b could start."""
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    kueue = "/apis/kueue.x-k8s.io/v1beta1"
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    accounts = named("nucleus-curation", "nucleus-training", "nucleus-publisher", automountServiceAccountToken=False)
    quota = {"requests.nvidia.com/gpu": "72", "requests.cpu": "4000", "requests.memory": "24Ti"}
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    queue = {
        "metadata": {"name": "nucleus-training"},
        "spec": {
            "resourceGroups": [
                {"flavors": [{"name": "h100", "resources": [{"name": "nvidia.com/gpu", "nominalQuota": "64"}]}]}
            ]
        },
        "status": {"conditions": [{"type": "Active", "status": "True"}]},
    }
    return {
        "/version/": dict.fromkeys(("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform"), "")
        | {"major": "1", "minor": "35+", "gitVersion": "v1.35.2"},
        f"{crds}/pytorchjobs.kubeflow.org": crd("pytorchjobs.kubeflow.org", "v1"),
        f"{crds}/clusterqueues.kueue.x-k8s.io": crd("clusterqueues.kueue.x-k8s.io", "v1beta1"),
        f"{crds}/localqueues.kueue.x-k8s.io": crd("localqueues.kueue.x-k8s.io", "v1beta1"),
        "/apis/apps/v1/namespaces/kubeflow/deployments/training-operator": deployment(
            "t", "r/training-operator:v1.9.4"
        ),
        "/apis/apps/v1/namespaces/flyte/deployments/flyte-binary": deployment("f", "r/flyte-binary:v1.16.8"),
        "/api/v1/namespaces/flyte/configmaps": named("flyte", data={"000-core.yaml": yaml.safe_dump(FLYTE)}),
        "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config": {"data": {"c.yaml": yaml.safe_dump(KUEUE)}},
        f"{kueue}/namespaces/nucleus-production/localqueues/training": {"spec": {"clusterQueue": "nucleus-training"}},
        f"{kueue}/clusterqueues/nucleus-training": queue,
        "/api/v1/nodes": [node(index) for index in range(8)],
        NS: {"metadata": {"name": "nucleus-production", "labels": labels}},
        f"{NS}/podtemplates": named("nucleus-curation", "nucleus-gpu", "nucleus-publisher", "nucleus-trainer-efa"),
        f"{NS}/serviceaccounts": accounts,
        "/apis/networking.k8s.io/v1/namespaces/nucleus-production/networkpolicies": named("default-deny", spec=closed),
        f"{NS}/resourcequotas": named("nucleus", spec={}, status={"hard": quota, "used": {}}),
        "/apis/scheduling.k8s.io/v1/priorityclasses": named("nucleus-training", "nucleus-batch", value=1),
        "/apis/storage.k8s.io/v1/storageclasses": [
            {
                "metadata": {"name": "gp3", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
                "provisioner": "p",
            }
        ],
        f"{NS}/secrets/nucleus-wandb": {"data": {"WANDB_API_KEY": base64.b64encode(TOKEN.encode()).decode()}},
        f"{NS}/secrets/nucleus-huggingface": {"data": {"HF_TOKEN": base64.b64encode(TOKEN.encode()).decode()}},
    }


@pytest.fixture(scope="module")
def services():
    with s3_server() as store, flyteadmin({}) as (endpoint, _):
        yield store, endpoint


@pytest.fixture
def preflight(services, tmp_path, monkeypatch, capsys):
    """Runs preflight against these objects: (exit code, name -> result, the scripted server)."""
    store, endpoint = services
    for key, value in (OWN | {"AWS_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(key, value)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    site = {
        "admin": {"endpoint": f"dns:///{endpoint}", "insecure": True},
        "nucleus": {
            "project": "nucleus",
            "domain": "production",
            "store": f"s3://{BUCKET}/store",
            "profile": "h100",
            "fabric": "efa",
            "queue": "training",
            "hub_secret": "nucleus-huggingface",
            "wandb_secret": "nucleus-wandb",
            "bucket": f"s3://{BUCKET}/prefix",
        },
    }
    for name in (
        "PROFILE",
        "FABRIC",
        "QUEUE",
        "HUB_SECRET",
        "WANDB_SECRET",
        "ACCELERATOR_LABEL",
        "POD_TEMPLATES",
        "ACCELERATOR",
        "STORE",
    ):
        monkeypatch.setenv(f"NUCLEUS_{name}", "")  # so that what main sets is undone
        monkeypatch.delenv(f"NUCLEUS_{name}")
    lock = {"images": {"trainer": {"image": "127.0.0.1:1/nucleus-trainer", "digest": "sha256:" + "0" * 64}}}
    (tmp_path / "lock.json").write_text(json.dumps(lock))

    def run(objects, *words, denied=(), **changes):
        section = site | {"nucleus": site["nucleus"] | changes}
        (tmp_path / "flyte.yaml").write_text(yaml.safe_dump(section))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        with scripted_api(objects, tmp_path / "kubeconfig") as api:
            api.denied = set(denied)
            paths = ["--config", str(tmp_path / "flyte.yaml"), "--lock", str(tmp_path / "lock.json")]
            code = main(["--recipe", "nucleus_17b", "--shape", "8x8", *paths, "--json", *words])
        out, err = capsys.readouterr()
        assert out, err
        results = {entry["name"]: entry for entry in json.loads(out)}
        run.printed = out
        return code, results, api

    run.s3 = s3
    return run


# Expected failures: the recipe's example source is refused, and no registry listens at port 1.
EXPECTED = {"recipe's source", "images can be pulled"}


def failed(results):
    return {name for name, entry in results.items() if entry["status"] == "failed"} - EXPECTED


@pytest.mark.slow
def test_a_healthy_cluster_passes_more_than_twenty_checks(preflight):
    code, results, _ = preflight(healthy())
    assert not failed(results), {name: results[name]["detail"] for name in failed(results)}
    assert sum(entry["status"] == "ok" for entry in results.values()) >= 30
    assert code == 1  # for the example source


def test_it_only_reads_the_cluster_and_leaves_nothing_in_the_bucket(preflight):
    _, _, api = preflight(healthy())
    assert {method for method, _ in api.requests} == {"GET"}
    assert not preflight.s3.list_objects_v2(Bucket=BUCKET).get("Contents")
    assert not preflight.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_no_secret_is_printed(preflight):
    preflight(healthy())
    for secret in (TOKEN, base64.b64encode(TOKEN.encode()).decode(), "planted-token"):
        assert secret not in preflight.printed


def _set(objects, path, change):
    change(objects[path])


DEFECTS = {
    "api server": lambda o: o["/version/"].update(minor="20", gitVersion="v1.20.1"),
    "pytorchjob definition": lambda o: o.pop(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/pytorchjobs.kubeflow.org"
    ),
    "training operator": lambda o: o.update(
        {"/apis/apps/v1/namespaces/kubeflow/deployments/training-operator": deployment("t", "r/training-operator:v2.0")}
    ),
    "flyte deployment": lambda o: o["/apis/apps/v1/namespaces/flyte/deployments/flyte-binary"]["status"].clear(),
    "flyte plugins": lambda o: o.update(
        {
            "/api/v1/namespaces/flyte/configmaps": named(
                "flyte",
                data={
                    "c": yaml.safe_dump(
                        FLYTE | {"tasks": {"task-plugins": {"enabled-plugins": ["container", "k8s-array"]}}}
                    )
                },
            )
        }
    ),
    "flyte error aggregation": lambda o: o.update(
        {
            "/api/v1/namespaces/flyte/configmaps": named(
                "flyte", data={"c": yaml.safe_dump(FLYTE | {"plugins": {"k8s": {"gpu-device-node-label": LABEL}}})}
            )
        }
    ),
    "kueue definitions": lambda o: o.pop(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/localqueues.kueue.x-k8s.io"
    ),
    "kueue pytorchjob integration": lambda o: o[
        "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"
    ].update(data={"c": yaml.safe_dump({"integrations": {"frameworks": ["batch/job"]}})}),
    "queue": lambda o: o["/apis/kueue.x-k8s.io/v1beta1/clusterqueues/nucleus-training"]["status"]["conditions"][
        0
    ].update(status="False", message="flavor h100 is missing"),
    "queue quota": lambda o: o["/apis/kueue.x-k8s.io/v1beta1/clusterqueues/nucleus-training"]["spec"]["resourceGroups"][
        0
    ]["flavors"][0]["resources"][0].update(nominalQuota="63"),
    "accelerator nodes": lambda o: o["/api/v1/nodes"][0]["spec"].update(unschedulable=True),
    "accelerators of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update({"nvidia.com/gpu": "7"}),
    "cpu and memory of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update(cpu="95"),
    "scratch space of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update(
        {"ephemeral-storage": "100Gi"}
    ),
    "efa and hugepages of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].pop(
        "vpc.amazonaws.com/efa"
    ),
    "taints of the nodes": lambda o: o["/api/v1/nodes"][3]["spec"]["taints"].append(
        {"key": "maintenance", "effect": "NoSchedule"}
    ),
    "namespace": lambda o: o[NS]["metadata"].update(labels={}),
    "pod templates": lambda o: o[f"{NS}/podtemplates"].pop(),
    "service accounts": lambda o: o[f"{NS}/serviceaccounts"][0].pop("automountServiceAccountToken"),
    "network policies": lambda o: o["/apis/networking.k8s.io/v1/namespaces/nucleus-production/networkpolicies"][0][
        "spec"
    ].update(ingress=[{}]),
    "resource quota": lambda o: o[f"{NS}/resourcequotas"][0]["status"].update(used={"requests.nvidia.com/gpu": "16"}),
    "priority classes": lambda o: o["/apis/scheduling.k8s.io/v1/priorityclasses"].pop(),
    "storage class": lambda o: o["/apis/storage.k8s.io/v1/storageclasses"].clear(),
    "hub secret": lambda o: o[f"{NS}/secrets/nucleus-huggingface"].update(data={"OTHER": "eA=="}),
    "metrics secret": lambda o: o[f"{NS}/secrets/nucleus-wandb"].update(data={"OTHER": "eA=="}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_fails_only_its_check_and_names_a_remedy(preflight, name):
    objects = copy.deepcopy(healthy())
    DEFECTS[name](objects)
    code, results, _ = preflight(objects)
    assert failed(results) == {name}, {n: results[n]["detail"] for n in failed(results)}
    assert code == 1 and results[name]["remedy"] and results[name]["detail"]


def test_what_may_not_be_looked_at_is_said_and_stops_nothing_else(preflight):
    _, results, _ = preflight(healthy(), denied=[f"{NS}/podtemplates"])
    assert "not allowed" in results["pod templates"]["detail"]
    assert results["service accounts"]["status"] == "ok"


def test_a_bucket_that_is_not_there_and_a_foreign_project_fail(preflight):
    _, results, _ = preflight(healthy(), bucket="s3://nucleus-none/x")
    assert {"bucket", "bucket write, read, delete", "bucket multipart"} <= failed(results)
    _, results, _ = preflight(healthy(), project="other")
    assert "there is no project 'other'" in results["flyte project and domain"]["detail"]


def test_a_recipe_on_another_shape_fails(preflight):
    _, results, _ = preflight(healthy(), "--shape", "4x8")
    assert "trains on 8x8, not on 4x8" in results["recipe and shape"]["detail"]


def test_a_cluster_without_accelerators_skips_what_does_not_apply(preflight):
    objects = healthy() | {"/api/v1/nodes": []}
    _, results, _ = preflight(
        objects,
        "--recipe",
        "smoke",
        "--shape",
        "1x1",
        profile="cpu-small",
        fabric="",
        queue="",
        hub_secret="",
        wandb_secret="",
    )
    skipped = {name for name, entry in results.items() if entry["status"] == "skipped"}
    assert {"accelerator nodes", "queue", "pytorchjob definition", "hub secret", "metrics secret"} <= skipped
    assert failed(results) == {"pod templates"}  # the namespace has training's template for EFA alone


def test_karpenter_counts_as_nodes_to_come(preflight):
    pool = {"metadata": {"name": "h100"}, "spec": {"template": {"metadata": {"labels": {LABEL: "nvidia-h100"}}}}}
    objects = healthy() | {"/api/v1/nodes": [], "/apis/karpenter.sh/v1/nodepools": [pool]}
    _, results, _ = preflight(objects)
    assert (
        results["accelerator nodes"]["status"] == "ok"
        and "h100 would make more" in results["accelerator nodes"]["detail"]
    )


def test_an_unknown_recipe_or_shape_is_one_line_and_exit_code_2(preflight, capsys):
    assert main(["--recipe", "nucleus_17b", "--shape", "8"]) == 2
    assert "use NODESxPROCESSES" in capsys.readouterr().err


def test_the_table_has_the_remedy_under_its_failure():
    results = [checks.Result("a", "ok", "fine"), checks.Result("b", "failed", "missing", "install it")]
    text = checks.table(results)
    assert text.splitlines()[-1] == "2 checks: 1 failed, 0 skipped"
    assert "-> install it" in text.split("missing")[1]
