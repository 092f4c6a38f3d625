"""Preflight against a scripted API server, moto's S3 and a stand-in flyteadmin: each defect fails its own check."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json

import boto3
import pytest
import yaml
from flyteadmin import flyteadmin
from image_registry import registry
from object_store import OWN, s3_server
from scripted_api import scripted_api

from tasks import profiles
from tasks.preflight import checks
from tasks.preflight.__main__ import main

pytestmark = pytest.mark.slow

BUCKET = "nucleus-preflight"
TOKEN = "hf_plantedtoken"
NS = "/api/v1/namespaces/nucleus-production"
LABEL = "k8s.amazonaws.com/accelerator"
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
ALLOCATABLE = {
    "cpu": "191",
    "memory": "2000Gi",
    "nvidia.com/gpu": "8",
    "ephemeral-storage": "28Ti",
    "vpc.amazonaws.com/efa": "32",
    "hugepages-2Mi": "10Gi",
}
QUEUES = "/apis/kueue.x-k8s.io/v1beta1"
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
CONFIG = "/api/v1/namespaces/flyte/configmaps"
NODE_POOLS = "/apis/karpenter.sh/v1/nodepools"
NODE_CLASSES = "/apis/karpenter.k8s.aws/v1/ec2nodeclasses"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
FLYTE = {
    "task_resources": {"limits": {"cpu": "192", "memory": "2Ti", "gpu": "8"}},
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


def deployment(name, image, account="default"):
    return {
        "metadata": {"name": name},
        "spec": {
            "selector": {},
            "template": {
                "metadata": {},
                "spec": {"containers": [{"name": "c", "image": image}], "serviceAccountName": account},
            },
        },
        "status": {"availableReplicas": 1},
    }


def node(index):
    return {
        "metadata": {"name": f"node-{index}", "labels": {LABEL: "nvidia-h100"}},
        "spec": {"taints": [dict(GPU_TAINT)]},
        "status": {"allocatable": dict(ALLOCATABLE), "conditions": [{"type": "Ready", "status": "True"}]},
    }


def cpu_node():
    allocatable = {"cpu": "31", "memory": "250Gi", "ephemeral-storage": "1700Gi"}
    return {
        "metadata": {"name": "cpu-0", "labels": {}},
        "spec": {},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def efa_template(name, devices):
    limits = {"vpc.amazonaws.com/efa": devices, "hugepages-2Mi": "5120Mi"}
    containers = [{"name": "default"}, {"name": "primary", "resources": {"limits": limits}}]
    return {"metadata": {"name": name}, "template": {"spec": {"containers": containers}}}


def flavor(name, label):
    return {"metadata": {"name": name}, "spec": {"nodeLabels": {LABEL: label}}}


def quota_of(name, gpus):
    return {"name": name, "resources": [{"name": "nvidia.com/gpu", "nominalQuota": gpus}]}


def node_class(name, volume="", **more):
    volumes = [{"deviceName": "/dev/xvda", "ebs": {"volumeSize": volume}}] if volume else []
    return {"metadata": {"name": name}, "spec": {"blockDeviceMappings": volumes} | more}


NVME = node_class("nvme", instanceStorePolicy="RAID0")


def cpu_pool():
    return {"metadata": {"name": "cpu"}, "spec": {"template": {"spec": {"nodeClassRef": {"name": "root"}}}}}


def nvme_pool(gigabytes):
    disk = {"key": "karpenter.k8s.aws/instance-local-nvme", "operator": "Gt", "values": [gigabytes]}
    spec = {"nodeClassRef": {"name": "nvme"}, "requirements": [disk]}
    return {"metadata": {"name": "tables"}, "spec": {"template": {"spec": spec}}}


def configured(**changes):
    """Configuration maps as flyte-core splits them, with these sections changed."""
    whole = FLYTE | changes
    files = {f"{key}.yaml": yaml.safe_dump({key: value}) for key, value in whole.items()}
    return named("flyte-core", data=files) + named("z-logs", data={"logs.yaml": "plugins: {logs: {enabled: false}}"})


def healthy():
    """Path -> object of a cluster on which nucleus_17b could start."""
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    accounts = named("nucleus-curation", "nucleus-training", "nucleus-publisher", automountServiceAccountToken=False)
    quota = {"requests.nvidia.com/gpu": "72", "requests.cpu": "4000", "requests.memory": "24Ti"}
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    queue = {
        "metadata": {"name": "nucleus-training"},
        "spec": {"resourceGroups": [{"flavors": [quota_of("h100", "64"), quota_of("h200", "1000")]}]},
        "status": {"conditions": [{"type": "Active", "status": "True"}]},
    }
    return {
        "/version/": dict.fromkeys(("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform"), "")
        | {"major": "1", "minor": "35+", "gitVersion": "v1.35.2"},
        f"{CRDS}/pytorchjobs.kubeflow.org": crd("pytorchjobs.kubeflow.org", "v1"),
        f"{CRDS}/clusterqueues.kueue.x-k8s.io": crd("clusterqueues.kueue.x-k8s.io", "v1beta1"),
        f"{CRDS}/localqueues.kueue.x-k8s.io": crd("localqueues.kueue.x-k8s.io", "v1beta1"),
        f"{CRDS}/resourceflavors.kueue.x-k8s.io": crd("resourceflavors.kueue.x-k8s.io", "v1beta1", "v1beta2"),
        "/apis/apps/v1/namespaces/kueue-system/deployments/kueue-controller-manager": deployment(
            "k", "registry.k8s.io/kueue/kueue:v0.14.8"
        ),
        f"{QUEUES}/resourceflavors": [flavor("h100", "nvidia-h100"), flavor("h200", "nvidia-h200")],
        REVIEWS: {"spec": {}, "status": {"allowed": True}},
        "/apis/apps/v1/namespaces/kubeflow/deployments/training-operator": deployment(
            "t", "r/training-operator:v1.9.4"
        ),
        "/apis/apps/v1/namespaces/flyte/deployments/flyte-binary": deployment(
            "f", "r/flyte-binary:v1.16.8", "flyte-binary"
        ),
        CONFIG: configured(),
        "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config": {"data": {"c.yaml": yaml.safe_dump(KUEUE)}},
        f"{QUEUES}/namespaces/nucleus-production/localqueues/training": {"spec": {"clusterQueue": "nucleus-training"}},
        f"{QUEUES}/clusterqueues/nucleus-training": queue,
        "/api/v1/nodes": [node(index) for index in range(8)] + [cpu_node()],
        NS: {"metadata": {"name": "nucleus-production", "labels": labels}},
        f"{NS}/podtemplates": [
            *named("nucleus-curation", "nucleus-gpu", "nucleus-publisher", "nucleus-trainer", template={}),
            efa_template("nucleus-trainer-efa", "32"),
        ],
        f"{NS}/serviceaccounts": accounts,
        "/apis/networking.k8s.io/v1/namespaces/nucleus-production/networkpolicies": named("default-deny", spec=closed),
        f"{NS}/resourcequotas": named("nucleus", spec={}, status={"hard": quota, "used": {}}),
        "/apis/scheduling.k8s.io/v1/priorityclasses": named("nucleus-training", "nucleus-batch", value=1),
        f"{NS}/secrets/nucleus-wandb": {"data": {"WANDB_API_KEY": base64.b64encode(TOKEN.encode()).decode()}},
        f"{NS}/secrets/nucleus-huggingface": {"data": {"HF_TOKEN": base64.b64encode(TOKEN.encode()).decode()}},
    }


@pytest.fixture(scope="module")
def services():
    with s3_server() as store, flyteadmin({}) as (endpoint, admin), registry() as (address, images):
        yield store, endpoint, admin, address, images


@pytest.fixture
def preflight(services, tmp_path, monkeypatch, capsys):
    """Runs preflight against these objects: (exit code, name -> result, the scripted server)."""
    store, endpoint, admin, address, images = services
    admin.project_limits = {}
    images.login = None
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
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
    lock = {"images": {"trainer": {"image": f"{address}/nucleus-trainer", "digest": "sha256:" + "0" * 64}}}
    (tmp_path / "lock.json").write_text(json.dumps(lock))

    def run(objects, *words, denied=(), **changes):
        section = site | {"nucleus": site["nucleus"] | changes}
        (tmp_path / "flyte.yaml").write_text(yaml.safe_dump(section))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        with scripted_api(objects, tmp_path / "kubeconfig") as api:
            api.denied = set(denied)
            paths = ["--config", str(tmp_path / "flyte.yaml"), "--lock", str(tmp_path / "lock.json")]
            source = ["--overrides", "source.path=s3://images/"]  # instead of the example's
            code = main(["--recipe", "nucleus_17b", *source, "--shape", "8x8", *paths, "--json", *words])
        out, err = capsys.readouterr()
        assert out, err
        results = {entry["name"]: entry for entry in json.loads(out)}
        run.printed = out
        return code, results, api

    run.s3, run.admin, run.images, run.folder, run.address = s3, admin, images, tmp_path, address
    return run


def failed(results):
    return {name for name, entry in results.items() if entry["status"] == "failed"}


@pytest.mark.slow
def test_a_healthy_cluster_passes_more_than_twenty_checks(preflight):
    code, results, _ = preflight(healthy())
    assert not failed(results), {name: results[name]["detail"] for name in failed(results)}
    assert sum(entry["status"] == "ok" for entry in results.values()) >= 30
    assert not [name for name, entry in results.items() if entry["status"] == "skipped"]
    assert code == 0


def test_it_only_reads_the_cluster_and_leaves_nothing_in_the_bucket(preflight):
    _, _, api = preflight(healthy())
    assert {path for method, path in api.requests if method != "GET"} == {REVIEWS}  # a question: nothing is stored
    assert not preflight.s3.list_objects_v2(Bucket=BUCKET).get("Contents")
    assert not preflight.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_no_secret_is_printed(preflight):
    preflight(healthy())
    for secret in (TOKEN, base64.b64encode(TOKEN.encode()).decode(), "planted-token"):
        assert secret not in preflight.printed


DEFECTS = {
    "api server": lambda o: o["/version/"].update(minor="20", gitVersion="v1.20.1"),
    "pytorchjob definition": lambda o: o.pop(f"{CRDS}/pytorchjobs.kubeflow.org"),
    "training operator": lambda o: o.update(
        {"/apis/apps/v1/namespaces/kubeflow/deployments/training-operator": deployment("t", "r/training-operator:v2.0")}
    ),
    "flyte deployment": lambda o: o["/apis/apps/v1/namespaces/flyte/deployments/flyte-binary"]["status"].clear(),
    "flyte rights on pytorchjobs": lambda o: o[REVIEWS].update(status={"allowed": False}),
    "flyte plugins": lambda o: o.update(
        {CONFIG: configured(tasks={"task-plugins": {"enabled-plugins": ["container", "k8s-array"]}})}
    ),
    "flyte error aggregation": lambda o: o.update(
        {CONFIG: configured(plugins={"k8s": {"gpu-device-node-label": LABEL}})}
    ),
    "flyte task limits": lambda o: o.update({CONFIG: configured(task_resources={"limits": {"cpu": "100"}})}),
    "kueue deployment": lambda o: o.update(
        {
            "/apis/apps/v1/namespaces/kueue-system/deployments/kueue-controller-manager": deployment(
                "k", "registry.k8s.io/kueue/kueue:v0.20.0"
            )
        }
    ),
    "kueue definitions": lambda o: o.pop(f"{CRDS}/localqueues.kueue.x-k8s.io"),
    "kueue pytorchjob integration": lambda o: o[
        "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"
    ].update(data={"c": yaml.safe_dump({"integrations": {"frameworks": ["batch/job"]}})}),
    "queue": lambda o: o[f"{QUEUES}/clusterqueues/nucleus-training"]["status"]["conditions"][0].update(
        status="False", message="flavor h100 is missing"
    ),
    "queue quota": lambda o: o[f"{QUEUES}/clusterqueues/nucleus-training"]["spec"]["resourceGroups"][0]["flavors"][0][
        "resources"
    ][0].update(nominalQuota="63"),
    "accelerator nodes": lambda o: o["/api/v1/nodes"][0]["spec"].update(unschedulable=True),
    "accelerators of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update({"nvidia.com/gpu": "7"}),
    "cpu and memory of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update(cpu="95"),
    "scratch space of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update(
        {"ephemeral-storage": "100Gi"}
    ),
    "efa and hugepages of a node": lambda o: o["/api/v1/nodes"][3]["status"]["allocatable"].update(
        {"vpc.amazonaws.com/efa": "31"}
    ),
    "nodes for cpu tasks": lambda o: o["/api/v1/nodes"][8]["status"]["allocatable"].update(
        {"ephemeral-storage": "20Gi"}
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
    "resource quota ": lambda o: o[f"{NS}/resourcequotas"][0]["status"]["hard"].update({"limits.cpu": "5"}),
    "priority classes": lambda o: o["/apis/scheduling.k8s.io/v1/priorityclasses"].pop(),
    "hub secret": lambda o: o[f"{NS}/secrets/nucleus-huggingface"].update(data={"OTHER": "eA=="}),
    "metrics secret": lambda o: o[f"{NS}/secrets/nucleus-wandb"].update(data={"OTHER": "eA=="}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_fails_only_its_check_and_names_a_remedy(preflight, name):
    objects = copy.deepcopy(healthy())
    DEFECTS[name](objects)
    code, results, _ = preflight(objects)
    name = name.strip()
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
    objects = healthy() | {"/api/v1/nodes": [cpu_node()]}
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
    assert not failed(results), {name: results[name]["detail"] for name in failed(results)}


def test_a_node_on_which_training_fits_and_the_merge_does_not_fails(preflight):
    objects = healthy()
    for each in objects["/api/v1/nodes"][:8]:
        each["status"]["allocatable"]["ephemeral-storage"] = "1000Gi"  # of one rank: 800, of a merge: 1600
    words = ("--recipe", "smoke", "--shape", "1x1")
    _, results, _ = preflight(objects, *words, fabric="", queue="")
    assert failed(results) == {"nodes for tasks on one accelerator"}
    detail = results["nodes for tasks on one accelerator"]["detail"]
    assert "none of 8 nodes takes a task of merging" in detail and "1600Gi" in detail
    objects["/api/v1/nodes"][0]["status"]["allocatable"]["ephemeral-storage"] = "1600Gi"
    _, results, _ = preflight(objects, *words, fabric="", queue="")
    assert not failed(results), {name: results[name]["detail"] for name in failed(results)}


def test_a_node_on_which_the_decisions_of_the_profile_do_not_fit_fails(preflight):
    objects = healthy()
    objects["/api/v1/nodes"][8]["status"]["allocatable"]["ephemeral-storage"] = "640Gi"
    _, results, _ = preflight(objects)
    assert failed(results) == {"nodes for cpu tasks"}
    assert "a task of deciding (cpu 16, memory 128Gi" in results["nodes for cpu tasks"]["detail"]


def test_without_accelerators_merges_must_fit_on_a_node_of_the_cpu_tasks(preflight, monkeypatch):
    small = dataclasses.replace(profiles.PROFILES["cpu-small"], merge=profiles.Size(2, 300, 5))
    monkeypatch.setitem(profiles.PROFILES, "cpu-small", small)
    site = {"profile": "cpu-small", "fabric": "", "queue": "", "hub_secret": "", "wandb_secret": ""}
    objects = healthy() | {"/api/v1/nodes": [cpu_node()]}
    _, results, _ = preflight(objects, "--recipe", "smoke", "--shape", "1x1", **site)
    assert failed(results) == {"nodes for cpu tasks"}
    assert "a task of merging (cpu 2, memory 300Gi" in results["nodes for cpu tasks"]["detail"]


def test_karpenter_counts_as_nodes_to_come(preflight):
    pool = {
        "metadata": {"name": "h100"},
        "spec": {"template": {"metadata": {"labels": {LABEL: "nvidia-h100"}}, "spec": {"taints": [GPU_TAINT]}}},
    }
    objects = healthy() | {
        "/api/v1/nodes": [],
        NODE_POOLS: [pool, cpu_pool(), nvme_pool("1910")],
        NODE_CLASSES: [node_class("root", "700Gi"), NVME],
    }
    _, results, _ = preflight(objects)
    assert not failed(results), {name: results[name]["detail"] for name in failed(results)}
    assert "planning: NodePool cpu, tables; " in results["nodes for cpu tasks"]["detail"]
    assert "deciding: NodePool tables; " in results["nodes for cpu tasks"]["detail"]
    assert (
        results["accelerator nodes"]["status"] == "ok"
        and "h100 would make more" in results["accelerator nodes"]["detail"]
    )


@pytest.mark.parametrize("gigabytes", ["", "1800"])
def test_a_pool_whose_disk_does_not_hold_the_tables_does_not_count_for_deciding(preflight, gigabytes):
    pools = [cpu_pool(), *([nvme_pool(gigabytes)] if gigabytes else [])]
    objects = healthy() | {NODE_POOLS: pools, NODE_CLASSES: [node_class("root", "700Gi"), NVME]}
    objects["/api/v1/nodes"] = objects["/api/v1/nodes"][:8]  # those with GPUs, whose taint these tasks do not tolerate
    _, results, _ = preflight(objects)
    assert failed(results) == {"nodes for cpu tasks"}
    assert "no node takes a task of deciding" in results["nodes for cpu tasks"]["detail"]
    assert "nucleus-tables" in results["nodes for cpu tasks"]["remedy"]


@pytest.mark.parametrize(
    ("classes", "status", "detail"),
    [
        # Pods get nine tenths of a disk, and a task that gathers needs 500 GiB.
        ([node_class("root", "560Gi"), NVME], "ok", "gathering: NodePool cpu, tables; "),
        ([node_class("root", "550Gi"), NVME], "ok", "gathering: NodePool tables; "),
        ([node_class("root", "700Gi"), node_class("nvme", "700Gi")], "failed", "no node takes a task of deciding"),
        ([NVME], "ok", "planning: NodePool tables; "),
        ([node_class("root", "700Gi")], "skipped", "deciding: no node, and the disk of NodePool tables is not known"),
        ([node_class("root"), node_class("nvme")], "skipped", "the disk of NodePool cpu, tables is not known"),
        (None, "skipped", "the disk of NodePool cpu, tables is not known"),
    ],
)
def test_the_disk_of_a_pool_is_what_its_node_class_says(preflight, classes, status, detail):
    """classes: None if this identity may not look at them."""
    objects = healthy() | {NODE_POOLS: [cpu_pool(), nvme_pool("1910")], NODE_CLASSES: classes}
    objects["/api/v1/nodes"] = objects["/api/v1/nodes"][:8]
    _, results, _ = preflight(objects, denied=[] if classes else [NODE_CLASSES])
    assert results["nodes for cpu tasks"]["status"] == status, results["nodes for cpu tasks"]["detail"]
    assert detail in results["nodes for cpu tasks"]["detail"]


def test_tasks_that_may_not_be_interrupted_do_not_fit_on_tainted_nodes_alone(preflight):
    taint = {"key": "flyte.org/interruptible", "value": "true", "effect": "NoSchedule"}
    spot = {"metadata": {"name": "spot"}, "spec": {"template": {"spec": {"taints": [taint]}}}}
    objects = healthy() | {NODE_POOLS: [spot]}
    objects["/api/v1/nodes"].pop()
    _, results, _ = preflight(objects)
    assert failed(results) == {"nodes for cpu tasks"}
    assert "no node takes a task of planning" in results["nodes for cpu tasks"]["detail"]


def test_flyte_is_asked_about_for_its_own_account_and_all_namespaces(preflight):
    _, results, api = preflight(healthy())
    reviews = [body["spec"] for path, body in api.sent if path == REVIEWS]
    assert {review["user"] for review in reviews} == {"system:serviceaccount:flyte:flyte-binary"}
    asked = [review["resourceAttributes"] for review in reviews]
    assert {each["verb"] for each in asked} >= {"create", "list", "watch", "delete"}
    assert not any(each.get("namespace") for each in asked)
    assert "flyte/flyte-binary" in results["flyte rights on pytorchjobs"]["detail"]


def test_a_label_that_no_node_has_fails(preflight):
    objects = healthy() | {CONFIG: configured(plugins={"k8s": {"enable-distributed-error-aggregation": True,
                                                              "gpu-device-node-label": "nvidia.com/gpu.product"}})}  # fmt: skip
    _, results, _ = preflight(objects)
    assert "no node and no NodePool has" in results["flyte accelerator label"]["detail"]
    assert "no flavor of the queue has nodes with nvidia.com/gpu.product" in results["queue quota"]["detail"]
    assert {"flyte accelerator label", "queue quota", "accelerator nodes"} == failed(results)


def test_only_the_quota_of_the_profiles_own_flavor_counts(preflight):
    objects = healthy()
    for each in objects["/api/v1/nodes"][:8]:
        each["metadata"]["labels"] = {LABEL: "nvidia-h200"}
        each["status"]["allocatable"]["vpc.amazonaws.com/efa"] = "16"
    objects[f"{NS}/podtemplates"].append(efa_template("nucleus-trainer-efa-16", "16"))
    code, results, _ = preflight(objects, profile="h200")
    assert code == 0 and "1000 GPUs of h200" in results["queue quota"]["detail"]
    assert "vpc.amazonaws.com/efa 16" in results["efa and hugepages of a node"]["detail"]
    groups = objects[f"{QUEUES}/clusterqueues/nucleus-training"]["spec"]["resourceGroups"][0]
    groups["flavors"] = [quota_of("h100", "64"), quota_of("h200", "0")]
    _, results, _ = preflight(objects, profile="h200")
    assert failed(results) == {"queue quota"} and "0 GPUs of h200" in results["queue quota"]["detail"]


def test_a_projects_own_limits_come_before_flytes_configuration(preflight):
    preflight.admin.project_limits = {"cpu": "192", "memory": "100Gi", "gpu": "8"}
    _, results, _ = preflight(healthy())
    assert failed(results) == {"flyte task limits"}
    assert "memory 100Gi (project nucleus)" in results["flyte task limits"]["detail"]
    preflight.admin.project_limits = {"cpu": "192", "memory": "2Ti", "gpu": "8"}
    code, _, _ = preflight(healthy() | {CONFIG: configured(task_resources={})})
    assert code == 0


def test_without_any_configured_limit_flytes_stock_limits_count(preflight):
    _, results, _ = preflight(healthy() | {CONFIG: configured(task_resources={})})
    assert failed(results) == {"flyte task limits"} and "cpu 2 " in results["flyte task limits"]["detail"]


def test_a_store_that_pods_do_not_share_fails(preflight):
    _, results, _ = preflight(healthy(), store="s3://nucleus-none/store")
    assert failed(results) == {"store"}
    _, results, _ = preflight(healthy(), store="/var/nucleus")
    assert "pods cannot see each other's parts" in results["store"]["detail"]


@pytest.mark.parametrize("kind", ["Basic", "Bearer"])
def test_a_private_registry_is_asked_with_the_login_of_docker(preflight, kind):
    login = base64.b64encode(b"me:planted-password").decode()
    preflight.images.login, preflight.images.kind = login, kind
    _, results, _ = preflight(healthy())
    assert results["images can be pulled"]["status"] == "skipped"
    (preflight.folder / "config.json").write_text(json.dumps({"auths": {preflight.address: {"auth": login}}}))
    code, results, _ = preflight(healthy())
    assert code == 0 and results["images can be pulled"]["status"] == "ok"
    assert login not in preflight.printed and "planted-password" not in preflight.printed


def test_an_image_that_was_not_pushed_fails(preflight):
    lock = {"images": {"trainer": {"image": f"{preflight.address}/absent", "digest": "sha256:" + "0" * 64}}}
    (preflight.folder / "lock.json").write_text(json.dumps(lock))
    _, results, _ = preflight(healthy())
    assert failed(results) == {"images can be pulled"}


def test_an_unknown_recipe_or_shape_is_one_line_and_exit_code_2(preflight, capsys):
    assert main(["--recipe", "nucleus_17b", "--shape", "8"]) == 2
    assert "use NODESxPROCESSES" in capsys.readouterr().err


def test_the_table_has_the_remedy_under_its_failure():
    results = [checks.Result("a", "ok", "fine"), checks.Result("b", "failed", "missing", "install it")]
    text = checks.table(results)
    assert text.splitlines()[-1] == "2 checks: 1 failed, 0 skipped"
    assert "-> install it" in text.split("missing")[1]
