"""The Kubernetes manifests, as kustomize renders them, against the API's schemas and the rules for pods.

Built-in kinds: kubernetes-validate, strict. Custom resources: hand-written strict subsets in tests/fixtures/crds.
No API server has seen them here; tests/cluster sends them to one.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
K8S = ROOT / "k8s"
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
def test_every_document_passes_the_schemas_of_all_supported_versions(overlay):
    documents = rendered(overlay)
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
    specs = pod_specs(rendered(overlay))
    assert len(specs) >= 4
    for name, spec in specs:
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        for container in spec["containers"]:
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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traffic_is_closed_but_for_what_is_named_and_never_open_to_metadata_services(overlay):
    policies = {d["metadata"]["name"]: d["spec"] for d in rendered(overlay) if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("egress", []) + spec.get("ingress", []):
            peers = rule.get("to", []) + rule.get("from", [])
            assert peers, f"{name} opens everything"
            for peer in peers:
                if "ipBlock" in peer:
                    closed = [ipaddress.ip_network(inner) for inner in peer["ipBlock"]["except"]]
                    assert any(ipaddress.ip_address("169.254.169.254") in network for network in closed)


def test_training_has_efa_hugepages_and_time_to_save_in_its_template_of_the_namespace():
    """flytekit replaces a task's own resources: only a template of the namespace brings these into the pod."""
    templates = {d["metadata"]["name"]: d["template"] for d in rendered("eks") if d["kind"] == "PodTemplate"}
    template = templates["nucleus-trainer-efa"]
    primary = next(c for c in template["spec"]["containers"] if c["name"] == "primary")
    assert primary["resources"]["limits"] == {"vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    assert template["spec"]["terminationGracePeriodSeconds"] >= 330
    assert template["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert "nucleus-trainer-efa" not in {d["metadata"]["name"] for d in rendered("generic")}


def test_node_pools_do_not_overlap_and_training_pools_stay_in_one_zone_undisturbed():
    pools = {d["metadata"]["name"]: d["spec"] for d in rendered("eks") if d["kind"] == "NodePool"}
    types: list[str] = []
    for name, spec in pools.items():
        needs = {r["key"]: r["values"] for r in spec["template"]["spec"]["requirements"]}
        if "node.kubernetes.io/instance-type" in needs:
            types += needs["node.kubernetes.io/instance-type"]
            assert len(needs["topology.kubernetes.io/zone"]) == 1, name
            assert "spot" not in needs["karpenter.sh/capacity-type"], name
            assert spec["template"]["spec"]["expireAfter"] == "Never", name
            assert {"nodes": "0", "reasons": ["Drifted", "Underutilized"]} in spec["disruption"]["budgets"], name
    assert len(types) == len(set(types)) >= 3
    assert any("spot" in str(spec) for spec in pools.values())


def test_kueue_admits_pytorch_jobs_whole_into_flavors_that_exist():
    config = yaml.safe_load((K8S / "helm" / "kueue.yaml").read_text())
    manager = yaml.safe_load(config["managerConfig"]["controllerManagerConfigYaml"])
    assert "kubeflow.org/pytorchjob" in manager["integrations"]["frameworks"]
    documents = rendered("eks")
    flavors = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "ResourceFlavor"}
    topologies = {d["metadata"]["name"] for d in documents if d["kind"] == "Topology"}
    (queue,) = (d for d in documents if d["kind"] == "ClusterQueue")
    for group in queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert flavor["name"] in flavors and flavors[flavor["name"]]["topologyName"] in topologies
            assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


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


def test_the_dashboard_shows_hardware_queues_and_captions():
    dashboard = json.loads((K8S / "monitoring" / "nucleus.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for metric in ("PIPE_TENSOR_ACTIVE", "XID_ERRORS", "kueue_admission_wait_time", "vllm:request_success"):
        assert metric in queries
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_captioner_gets_arguments_that_vllm_0_11_and_later_know():
    documents = yaml.safe_load_all((K8S / "captioner" / "deployment.yaml").read_text())
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    names = {argument.split("=")[0] for argument in deployment["spec"]["template"]["spec"]["containers"][0]["args"]}
    assert names == {"--model", "--served-model-name", "--host", "--port", "--max-model-len", "--limit-mm-per-prompt"}
