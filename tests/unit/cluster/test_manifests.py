"""The Kubernetes manifests, as kustomize renders them, against the API's schemas and the rules for pods.

Built-in kinds: kubernetes-validate, strict. Custom resources: hand-written strict subsets in tests/fixtures/crds.
No API server has seen them here; tests/cluster sends them to one.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml
from object_store import s3_bucket

from containers.lock import ROLES
from model.plan.data_costs import Corpus
from tasks.curation import plan
from tasks.envs import TIMEOUTS
from tasks.preflight.cluster import FLYTE_DEPLOYMENTS, JOB_VERBS
from tasks.profiles import PROFILES, pod_template
from tasks.recipe import load_recipe
from tasks.store import num_groups

ROOT = Path(__file__).resolve().parents[3]
K8S = ROOT / "k8s"
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text()
APART = ("../captioner", "../preflight")  # applied on their own
PREFLIGHT = "Job/nucleus-preflight"
OVERLAYS = ("kind-cpu", "eks", "generic")
VERSIONS = ("1.35", "1.36", "1.37")
BUILT_IN = re.compile(r"^(v1|apps/v1|batch/v1|rbac.authorization.k8s.io/v1|scheduling.k8s.io/v1|networking.k8s.io/v1)$")
QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$")


@functools.cache
def rendered(overlay: str) -> list[dict]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: kustomize does not run")
    text = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=True
    ).stdout
    return [document for document in yaml.safe_load_all(text) if document]


@functools.cache
def custom_schemas() -> dict[str, dict]:
    """group/version/Kind -> schema of its spec."""
    schemas = {}
    for path in sorted((ROOT / "tests" / "fixtures" / "crds").glob("*.yaml")):
        file = yaml.safe_load(path.read_text())
        schemas |= {kind: schema | {"definitions": file["definitions"]} for kind, schema in file["kinds"].items()}
    return schemas


@functools.cache
def _checked(text: str, version: str) -> None:
    """Raises for a document that the API server would refuse, and for one without a schema here."""
    import jsonschema  # takes seconds to import
    import kubernetes_validate

    document = json.loads(text)
    if BUILT_IN.match(document["apiVersion"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kubernetes_validate.validate(document, version, strict=True)
        return
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}, f"{document['kind']} has {set(document)}"
    schema = custom_schemas()[f"{document['apiVersion']}/{document['kind']}"]
    jsonschema.validate(document["spec"], schema)


def check(document: dict, version: str) -> None:
    _checked(json.dumps(document, sort_keys=True), version)  # overlays share most documents


def pod_specs(documents: list[dict]) -> list[tuple[str, dict]]:
    result = []
    for document in documents:
        template = document.get("template") or document.get("spec", {}).get("template", {})
        if document["kind"] in ("PodTemplate", "Deployment", "Job", "StatefulSet", "DaemonSet"):
            result.append((f"{document['kind']}/{document['metadata']['name']}", template["spec"]))
    return result


def values_of(node, key):
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values_of(value, key)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.slow
def test_every_document_passes_the_schemas_of_all_supported_versions(overlay):
    documents = rendered(overlay) + rendered("../captioner") + rendered("../preflight")
    assert len(documents) > 20
    for version in VERSIONS:
        for document in documents:
            check(document, version)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d[0].update(kindd="x"),
        lambda d: next(x for x in d if x["kind"] == "NetworkPolicy")["spec"].update(podSelectr={}),
        lambda d: next(x for x in d if x["kind"] == "PodTemplate")["template"]["spec"].update(hostNetwrk=True),
        lambda d: next(x for x in d if x["kind"] == "ClusterQueue")["spec"].update(queueingStrategy="FIFO"),
        lambda d: next(x for x in d if x["kind"] == "NodePool")["spec"]["disruption"].update(consolidateAfter="soon"),
        lambda d: next(x for x in d if x["kind"] == "PodMonitor")["spec"].update(podMetricsEndpoint=[]),
    ],
)
def test_a_mistake_in_a_manifest_is_refused(break_it):
    from jsonschema import ValidationError
    from kubernetes_validate import ValidationError as BuiltInError

    documents = json.loads(json.dumps(rendered("eks")))
    break_it(documents)
    (changed,) = (now for was, now in zip(rendered("eks"), documents) if was != now)
    with pytest.raises((ValidationError, BuiltInError)):
        check(changed, VERSIONS[-1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_quantities_and_address_ranges_are_valid(overlay):
    for document in rendered(overlay):
        for key in ("requests", "limits", "hard"):
            for quantities in values_of(document, key):
                for name, quantity in quantities.items():
                    assert QUANTITY.match(str(quantity)), f"{document['metadata']['name']}: {name}={quantity}"
        for block in values_of(document, "ipBlock"):
            network = ipaddress.ip_network(block["cidr"])
            assert all(ipaddress.ip_network(inner).subnet_of(network) for inner in block.get("except", []))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_unprivileged_without_an_api_token_and_with_a_read_only_root(overlay):
    """Preflight's has a token, since it asks the API server."""
    specs = pod_specs([document for folder in (overlay, *APART) for document in rendered(folder)])
    assert len(specs) >= 6 and [name for name, _ in specs].count(PREFLIGHT) == 1
    for name, spec in specs:
        assert spec["automountServiceAccountToken"] is (name == PREFLIGHT), name
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/scratch" in mounts, f"{name}: the images write under /scratch alone"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_service_accounts_have_no_token_and_tasks_no_role(overlay):
    documents = rendered(overlay)
    accounts = [d for d in documents if d["kind"] == "ServiceAccount"]
    assert accounts and all(account["automountServiceAccountToken"] is False for account in accounts)
    bound = {s["name"] for d in documents if d["kind"].endswith("RoleBinding") for s in d["subjects"]}
    assert not bound & {"nucleus-curation", "nucleus-training", "nucleus-publisher", "default"}
    for role in (d for d in documents if d["kind"] in ("Role", "ClusterRole")):
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], role["metadata"]["name"]
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"] and rule["resourceNames"], "secrets are read one by one, by name"


@pytest.mark.parametrize("overlay", ["eks", "generic"])  # those with monitoring
def test_the_only_secret_with_a_token_is_that_of_kueues_metrics_and_may_read_them_alone(overlay):
    documents = [document for folder in (overlay, *APART) for document in rendered(folder)]
    secrets = [d for d in documents if d["kind"] == "Secret"]
    assert [d["metadata"]["name"] for d in secrets] == ["nucleus-kueue-metrics"]
    assert all("data" not in d and "stringData" not in d for d in secrets), "Kubernetes writes it"
    roles = {
        d["roleRef"]["name"]
        for d in documents
        if d["kind"].endswith("RoleBinding") and "nucleus-kueue-metrics" in {one["name"] for one in d["subjects"]}
    }
    assert roles == {"kueue-metrics-reader"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traffic_is_closed_but_for_what_is_named_and_never_open_to_metadata_services(overlay):
    documents = [document for folder in (overlay, *APART) for document in rendered(folder)]
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    assert {"default-deny", "allow-preflight"} < policies.keys()
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("egress", []) + spec.get("ingress", []):
            peers = rule.get("to", []) + rule.get("from", [])
            assert peers, f"{name} opens everything"
            for peer in peers:
                if "ipBlock" in peer:
                    closed = [ipaddress.ip_network(inner) for inner in peer["ipBlock"]["except"]]
                    assert any(ipaddress.ip_address("169.254.169.254") in network for network in closed)


def templates(overlay: str) -> dict[str, dict]:
    return {d["metadata"]["name"]: d["template"] for d in rendered(overlay) if d["kind"] == "PodTemplate"}


# EFA devices of p5.48xlarge, p5en.48xlarge and p6-b200.48xlarge.
DEVICES = {"h100": "32", "h200": "16", "b200": "8"}


@pytest.mark.parametrize("profile", DEVICES)
def test_training_asks_for_its_nodes_efa_devices_and_hugepages_in_its_template_of_the_namespace(profile):
    """flytekit replaces a task's own resources: only a template of the namespace brings these into the pod."""
    template = templates("eks")[PROFILES[profile].efa_template]
    primary = next(c for c in template["spec"]["containers"] if c["name"] == "primary")
    wanted = {"vpc.amazonaws.com/efa": DEVICES[profile], "hugepages-2Mi": "5120Mi"}
    assert primary["resources"] == {"requests": wanted, "limits": wanted}
    assert template["spec"]["terminationGracePeriodSeconds"] >= 330
    assert template["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_has_every_template_that_tasks_name(overlay, monkeypatch):
    monkeypatch.delenv("NUCLEUS_POD_TEMPLATES", raising=False)
    named = set()
    for fabric in ("", "efa") if overlay == "eks" else ("",):
        for profile in PROFILES.values():
            if profile.efa_template or not fabric:
                monkeypatch.setenv("NUCLEUS_PROFILE", profile.name)
                monkeypatch.setenv("NUCLEUS_FABRIC", fabric)
                named |= {pod_template(role) for role in ROLES}
    assert templates(overlay).keys() == named  # no other: a template with EFA would be of no use without its devices


def node_pools() -> dict[str, dict]:
    return {d["metadata"]["name"]: d["spec"] for d in rendered("eks") if d["kind"] == "NodePool"}


def test_node_pools_do_not_overlap_and_training_pools_stay_in_one_zone_undisturbed():
    types: list[str] = []
    cpu = []
    for name, spec in node_pools().items():
        needs = {r["key"]: r["values"] for r in spec["template"]["spec"]["requirements"]}
        if "node.kubernetes.io/instance-type" not in needs:
            cpu += needs["karpenter.sh/capacity-type"]
            continue
        types += needs["node.kubernetes.io/instance-type"]
        assert len(needs["topology.kubernetes.io/zone"]) == 1, name
        assert "spot" not in needs["karpenter.sh/capacity-type"], name
        assert spec["template"]["spec"]["expireAfter"] == "Never", name
        assert {"nodes": "0", "reasons": ["Drifted", "Underutilized"]} in spec["disruption"]["budgets"], name
    assert len(types) == len(set(types)) >= 5
    assert sorted(cpu) == ["on-demand", "on-demand", "spot"]


@pytest.mark.parametrize("profile", [p for p in PROFILES.values() if p.accelerator], ids=lambda p: p.name)
def test_every_profile_has_one_pool_whose_nodes_have_the_label_that_flyte_selects(profile):
    """Karpenter makes a node only from a pool that has a pod's node selector among its labels."""
    values = yaml.safe_load((K8S / "helm" / "flyte-binary.yaml").read_text())
    (label,) = values_of(values, "gpu-device-node-label")
    labels = [spec["template"]["metadata"]["labels"].get(label) for spec in node_pools().values()]
    assert labels.count(profile.accelerator) == 1


def test_tasks_that_plan_or_gather_have_a_pool_without_taint_spot_and_too_small_disks():
    pools = node_pools()
    open_pools = {name: spec for name, spec in pools.items() if not spec["template"]["spec"].get("taints")}
    assert open_pools.keys() == {"nucleus-cpu", "nucleus-tables"}
    for name, spec in open_pools.items():
        needs = {r["key"]: r["values"] for r in spec["template"]["spec"]["requirements"]}
        assert needs["karpenter.sh/capacity-type"] == ["on-demand"], name
    spec, tables = open_pools["nucleus-cpu"], open_pools["nucleus-tables"]
    classes = {d["metadata"]["name"]: d["spec"] for d in rendered("eks") if d["kind"] == "EC2NodeClass"}
    for pool in (spec, pools["nucleus-filtering"]):
        (disk,) = classes[pool["template"]["spec"]["nodeClassRef"]["name"]]["blockDeviceMappings"]
        assert int(disk["ebs"]["volumeSize"].removesuffix("Gi")) > PROFILES["h100"].gather.ephemeral_gib
    assert pools["nucleus-filtering"]["weight"] > spec["weight"]  # what may be interrupted goes there first
    assert spec["weight"] > tables.get("weight", 0)  # and what fits there does not take a larger node
    # Which decides about all records: NVMe, as pods' scratch space.
    assert classes[tables["template"]["spec"]["nodeClassRef"]["name"]]["instanceStorePolicy"] == "RAID0"
    needs = {r["key"]: r["values"] for r in tables["template"]["spec"]["requirements"]}
    (least,) = needs["karpenter.k8s.aws/instance-local-nvme"]
    # The kubelet keeps a tenth of the disk, and the images.
    assert 0.9 * int(least) * 10**9 >= PROFILES["h100"].tables.ephemeral_gib * 2**30


def test_kueue_admits_pytorch_jobs_whole_into_flavors_that_exist():
    config = yaml.safe_load((K8S / "helm" / "kueue.yaml").read_text())
    manager = yaml.safe_load(config["managerConfig"]["controllerManagerConfigYaml"])
    assert "kubeflow.org/pytorchjob" in manager["integrations"]["frameworks"]
    for overlay in ("eks", "generic"):
        documents = rendered(overlay)
        flavors = {d["metadata"]["name"] for d in documents if d["kind"] == "ResourceFlavor"}
        (queue,) = (d for d in documents if d["kind"] == "ClusterQueue")
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert flavor["name"] in flavors
                assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


def test_kueue_counts_existing_nodes_only_where_nodes_are_fixed():
    """With a topology, Kueue admits a job only if existing nodes have room; Karpenter makes none for pods that are not created."""
    for overlay, fixed in (("eks", False), ("generic", True)):
        documents = rendered(overlay)
        topologies = {d["metadata"]["name"] for d in documents if d["kind"] == "Topology"}
        used = {d["spec"].get("topologyName") for d in documents if d["kind"] == "ResourceFlavor"}
        assert used == (topologies if fixed else {None}) and bool(topologies) is fixed, overlay
        assert any(d["kind"] == "NodePool" for d in documents) is not fixed


@pytest.mark.parametrize(
    ("overlay", "values"), [("eks", ["flyte-binary"]), ("generic", ["flyte-binary", "flyte-generic"])]
)
def test_flyte_and_kueue_select_nodes_by_the_same_label(overlay, values):
    label = None
    for name in values:  # as helm merges them: the last wins
        (label,) = values_of(yaml.safe_load((K8S / "helm" / f"{name}.yaml").read_text()), "gpu-device-node-label")
    flavors = [d["spec"] for d in rendered(overlay) if d["kind"] == "ResourceFlavor"]
    assert flavors and all(flavor["nodeLabels"].keys() == {label} for flavor in flavors)


def test_preflights_pod_may_ask_the_api_server_and_is_otherwise_as_the_others():
    documents = rendered("../preflight")
    (job,) = (d for d in documents if d["kind"] == "Job")
    pod = job["spec"]["template"]
    assert pod["spec"]["serviceAccountName"] == "nucleus-preflight" and pod["spec"]["automountServiceAccountToken"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["spec"]["containers"]
    assert "nucleus-trainer@sha256:" in container["image"]  # the one image with kubernetes' client and boto3
    assert {"kubernetes", "boto3"} <= {
        line.split("==")[0] for line in (ROOT / "containers" / "requirements" / "trainer.txt").read_text().split()
    }
    (policy,) = (d["spec"] for d in documents if d["kind"] == "NetworkPolicy")
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    for role in (d for d in documents if d["kind"] == "Role"):
        assert all(
            set(rule["verbs"]) <= {"get", "list"} and rule["resources"] == ["configmaps"] for rule in role["rules"]
        )


def test_no_overlay_starts_the_captioner():
    """Its image and its weights are the site's own: k8s/captioner is applied by those who caption."""
    for overlay in OVERLAYS:
        assert not [d for d in rendered(overlay) if d["kind"] in ("Deployment", "PersistentVolumeClaim")], overlay


def test_flyte_may_manage_pytorch_jobs_in_all_namespaces_under_the_name_that_preflight_looks_for():
    values = yaml.safe_load((K8S / "helm" / "flyte-binary.yaml").read_text())
    assert values["fullnameOverride"] in FLYTE_DEPLOYMENTS
    allowed = {(r, verb) for rule in values["rbac"]["extraRules"] for r in rule["resources"] for verb in rule["verbs"]
               if rule["apiGroups"] == ["kubeflow.org"]}  # fmt: skip
    assert {("pytorchjobs", verb) for verb in JOB_VERBS} <= allowed
    assert re.search(
        r"^helm upgrade .* flyteorg/flyte-binary .* -f k8s/helm/flyte-binary\.yaml$", DOCUMENT, re.MULTILINE
    )
    for overlay in OVERLAYS:  # a Role of one namespace would not do: propeller watches all
        subjects = {s["name"] for d in rendered(overlay) if d["kind"].endswith("Binding") for s in d["subjects"]}
        assert subjects <= {"nucleus-preflight", "nucleus-kueue-metrics"}


# Keys of propeller's and admin's configuration, from Flyte's configuration reference (deployment/configuration/generated).
PLUGIN_KEYS = {
    "inject-finalizer", "default-cpus", "default-memory", "gpu-device-node-label", "resource-tolerations",
    "interruptible-tolerations", "enable-distributed-error-aggregation",
}  # fmt: skip
OFFLOADING_KEYS = {
    "enabled",
    "supported-sdk-versions",
    "min-size-in-mb-for-offloading",
    "max-size-in-mb-for-offloading",
}


@pytest.mark.parametrize("chart", ["flyte-binary", "flyte-core"])
def test_flyte_runs_pytorch_jobs_aggregates_their_errors_and_admits_large_tasks(chart):
    """The charts are not rendered here: keys are compared with the documented ones."""
    values = yaml.safe_load((K8S / "helm" / f"{chart}.yaml").read_text())
    config = values["configuration"]["inline"] if chart == "flyte-binary" else values["configmap"]
    (plugins,) = values_of(config, "enabled-plugins")
    assert {"container", "sidecar", "k8s-array", "pytorch"} <= set(plugins)
    (k8s,) = (result for result in values_of(config, "k8s") if "inject-finalizer" in result)
    assert k8s.keys() == PLUGIN_KEYS and k8s["enable-distributed-error-aggregation"] is True
    (offloading,) = values_of(config, "literal-offloading-config")
    assert offloading.keys() == OFFLOADING_KEYS and offloading["enabled"] is True
    (resources,) = values_of(config, "task_resources")
    assert int(resources["limits"]["cpu"]) >= 96 and int(resources["limits"]["gpu"]) >= 8
    assert list(values_of(config, "useOffloadedWorkflowClosure")) == [True]


def test_every_operator_is_installed_at_a_version_into_a_namespace_that_is_made():
    installs = re.findall(r"^helm upgrade --install .*$", DOCUMENT, flags=re.MULTILINE)
    assert len(installs) >= 8
    added = {"oci:"} | set(re.findall(r"^helm repo add (\S+) https://\S+$", DOCUMENT, flags=re.MULTILINE))
    used = set()
    for line in installs:
        words = line.split()
        assert words[4].split("/")[0] in added, f"{line}: its repository is not added"
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", words[words.index("--version") + 1]), line
        assert "--create-namespace" in words or words[words.index("--namespace") + 1] == "kube-system", line
        files = {words[i + 1] for i, word in enumerate(words) if word == "-f"} - {"YOUR_VALUES.yaml"}
        assert all((ROOT / file).is_file() for file in files), line
        used |= files
    named = set(re.findall(r"k8s/helm/[\w-]+\.yaml", DOCUMENT))
    assert {f"k8s/helm/{path.name}" for path in (K8S / "helm").glob("*.yaml")} == named >= used


def test_the_document_lists_every_value_that_a_site_replaces():
    (table,) = re.findall(r"^\| value \| where .*?\n\n", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
    for path in sorted(K8S.rglob("*.yaml")):
        text = re.sub(r"#.*", "", path.read_text())
        for value in re.findall(r"\b(?:ACCOUNT|CLUSTER|us-east-1[a-z]?|registry\.example|YOUR-BUCKET)\b", text):
            (row,) = (line for line in table.splitlines() if f"`{value}`" in line)
            assert path.relative_to(ROOT).as_posix() in row, f"{value} of {path.name}"


def test_the_document_counts_preflights_checks():
    import tasks.preflight.__main__  # noqa: F401  (registers them all)
    from tasks.preflight.checks import CHECKS

    assert f"\n{len(CHECKS)} checks: " in DOCUMENT


def test_the_dashboard_shows_hardware_queues_captions_and_training():
    dashboard = json.loads((K8S / "monitoring" / "nucleus.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for metric in ("PIPE_TENSOR_ACTIVE", "XID_ERRORS", "kueue_admission_wait_time", "vllm:request_success"):
        assert metric in queries
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    served = set(re.findall(r"nucleus_train_\w+", (K8S.parent / "model" / "train" / "metrics.py").read_text()))
    shown = set(re.findall(r"nucleus_train_\w+", queries))
    assert {"nucleus_train_loss", "nucleus_train_mfu_percent", "nucleus_train_images_per_second"} <= shown <= served


def test_prometheus_reaches_the_port_of_training_and_kueue_with_its_credentials():
    monitors = {
        m["metadata"]["name"]: m for m in yaml.safe_load_all((K8S / "monitoring" / "podmonitors.yaml").read_text())
    }
    port = yaml.safe_load((K8S.parent / "config" / "flyte.example.yaml").read_text())["nucleus"]["metrics_port"]
    (training,) = monitors["nucleus-training"]["spec"]["podMetricsEndpoints"]
    assert training["relabelings"][0]["replacement"] == f"$1:{port}"
    policies = yaml.safe_load_all((K8S / "base" / "networkpolicies.yaml").read_text())
    (opened,) = [p for p in policies if p["metadata"]["name"] == "allow-metrics"]
    assert port in {entry["port"] for rule in opened["spec"]["ingress"] for entry in rule["ports"]}
    (kueue,) = monitors["kueue"]["spec"]["podMetricsEndpoints"]
    kueue_config = yaml.safe_load((K8S / "helm" / "kueue.yaml").read_text())
    address = yaml.safe_load(kueue_config["managerConfig"]["controllerManagerConfigYaml"])["metrics"]["bindAddress"]
    assert kueue["scheme"] == "https" and kueue["relabelings"][0]["replacement"] == f"$1{address}"
    assert kueue["authorization"]["credentials"]["name"] == "nucleus-kueue-metrics"


def captioner() -> dict:
    (deployment,) = [document for document in rendered("../captioner") if document["kind"] == "Deployment"]
    return deployment["spec"]


def test_the_captioner_gets_arguments_that_vllm_0_11_and_later_know():
    (container,) = captioner()["template"]["spec"]["containers"]
    names = {argument.split("=")[0] for argument in container["args"]}
    assert names == {"--model", "--served-model-name", "--host", "--port", "--max-model-len", "--limit-mm-per-prompt"}


@pytest.mark.slow
def test_the_captioners_weights_come_from_the_store_into_the_folder_that_vllm_serves(tmp_path, monkeypatch):
    spec = captioner()["template"]["spec"]
    (copy,), (serve,) = spec["initContainers"], spec["containers"]
    assert "nucleus-curation@sha256:" in copy["image"] and copy["command"] == ["python", "-c"]
    (served,) = (word.removeprefix("--model=") for word in serve["args"] if word.startswith("--model="))
    mounts = [{m["name"]: m["mountPath"] for m in each["volumeMounts"]}["weights"] for each in (copy, serve)]
    assert mounts[0] == mounts[1] == str(Path(served).parent) == "/weights"
    assert {v["name"]: v for v in spec["volumes"]}["weights"].keys() == {"name", "emptyDir"}
    (script,) = copy["args"]
    assert script.count(f'"{served}"') == 1
    script = script.replace(served, str(tmp_path / "model"))
    with s3_bucket("captioner") as fs:
        monkeypatch.setenv("CAPTIONER_WEIGHTS", "s3://captioner/weights")
        with pytest.raises(SystemExit, match="s3://captioner/weights has no config.json"):
            exec(script, {})
        fs.pipe_file("captioner/weights/config.json", b"{}")
        fs.pipe_file("captioner/weights/part/model.safetensors", b"numbers")
        exec(script, {})
    assert (tmp_path / "model" / "part" / "model.safetensors").read_bytes() == b"numbers"


def test_the_captioner_starts_on_the_nodes_of_one_pool_with_one_gpu_a_node():
    selector = captioner()["template"]["spec"]["nodeSelector"]
    (pool,) = [p for p in node_pools().values() if selector.items() <= p["template"]["metadata"]["labels"].items()]
    types = {r["key"]: r["values"] for r in pool["template"]["spec"]["requirements"]}
    assert types["node.kubernetes.io/instance-type"] == ["g6e.8xlarge"]
    ((key, value),) = selector.items()
    assert f"| `{key}: {value}` | k8s/captioner/deployment.yaml |" in DOCUMENT


def test_every_container_of_the_namespace_requests_what_its_quota_counts():
    """With a quota of a resource, the API server refuses pods that do not name it."""
    (quota,) = [d for d in rendered("eks") if d["kind"] == "ResourceQuota"]
    counted = {name.removeprefix("requests.") for name in quota["spec"]["hard"] if name.startswith("requests.")}
    for folder in APART:
        for name, spec in pod_specs(rendered(folder)):
            for container in spec["containers"] + spec.get("initContainers", []):
                assert counted - {"nvidia.com/gpu"} <= container["resources"]["requests"].keys(), name


def test_the_document_says_how_many_replicas_a_concurrency_of_captions_needs():
    """From the plan's hours of an H100, and the peaks of both accelerators."""
    corpus, config, peaks = Corpus(), load_recipe("nucleus_17b").curation, {"L40S": 362, "H100": 989}
    groups = num_groups(corpus.shards, config.max_groups)
    hours = corpus.images / groups * plan._caption_seconds(config.captioner, plan.Rates()) / 3600
    limit = TIMEOUTS["captioner"].total_seconds() / 3600
    rows = re.findall(r"^\| (\d+) with an (L40S|H100)[^|]*\| (\d+) \| ([\d,]+) days \|$", DOCUMENT, flags=re.MULTILINE)
    assert len(rows) == 4
    for replicas, kind, concurrency, days in rows:
        of_a_group = hours * peaks["H100"] / peaks[kind]
        assert int(concurrency) == int(limit * int(replicas) / of_a_group), (replicas, kind)
        assert int(days.replace(",", "")) == round(of_a_group * groups / int(replicas) / 24), (replicas, kind)
        assert f" {of_a_group:.1f} " in DOCUMENT
    assert int(rows[0][0]) == captioner()["replicas"]
    started = int(re.search(r"--overrides curation.concurrency=(\d+)", DOCUMENT)[1])
    for kind, least in (("L40S", 13), ("H100", 5)):
        assert least == math.ceil(started * hours * peaks["H100"] / peaks[kind] / limit)
