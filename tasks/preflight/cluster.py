"""Checks of the Kubernetes API: operators, queues, nodes, quotas, and the objects of k8s/base."""

from __future__ import annotations

import re
from typing import Any

import yaml
from kubernetes import client
from kubernetes.utils import parse_quantity

from tasks.preflight.checks import Failed, Skipped, Target, check
from tasks.profiles import pod_template

OLDEST = (1, 30)
TOLERATED = {"nvidia.com/gpu", "flyte.org/interruptible"}
TEMPLATES_OF = ("curation", "encoder", "trainer", "publisher")
PRIORITIES = ("nucleus-training", "nucleus-batch")
ACCOUNTS = ("nucleus-curation", "nucleus-training", "nucleus-publisher")
GPU = "nvidia.com/gpu"


def _core(target: Target) -> client.CoreV1Api:
    return client.CoreV1Api(target.api)


def _needs_gpus(target: Target) -> None:
    if not target.gpus:
        raise Skipped(f"profile {target.profile.name} has no accelerators")


def _needs_queue(target: Target) -> None:
    if not target.queue:
        raise Skipped("no queue is configured (nucleus.queue)")


def _needs_job(target: Target) -> None:
    if target.nnodes * target.nproc == 1:
        raise Skipped("one process trains in a plain pod")


@check("api server", "Use a kubeconfig of the cluster, and a Kubernetes of 1.30 or later.")
def api_server(target: Target) -> str:
    version = client.VersionApi(target.api).get_code()
    numbers = tuple(int(re.sub(r"\D", "", part)) for part in (version.major, version.minor))
    if numbers < OLDEST:
        raise Failed(f"Kubernetes {version.git_version} is older than {OLDEST[0]}.{OLDEST[1]}")
    return f"Kubernetes {version.git_version}"


def _crd(target: Target, name: str, version: str) -> str:
    try:
        definition = client.ApiextensionsV1Api(target.api).read_custom_resource_definition(name)
    except client.ApiException as error:
        if error.status == 404:
            raise Failed(f"there is no {name}") from None
        raise
    served = [each.name for each in definition.spec.versions if each.served]
    if version not in served:
        raise Failed(f"{name} is served as {', '.join(served)}, not {version}")
    return f"{name} {version}"


@check("pytorchjob definition", "Install training-operator 1.9.4 (k8s/helm/training-operator.md).")
def pytorchjob(target: Target) -> str:
    _needs_job(target)
    return _crd(target, "pytorchjobs.kubeflow.org", "v1")


@check("training operator", "Install training-operator 1.9.4 and wait for its deployment to be available.")
def training_operator(target: Target) -> str:
    _needs_job(target)
    return _deployment(target, "kubeflow", "training-operator", r"1\.9\.")


def _deployment(target: Target, namespace: str, name: str, version: str) -> str:
    try:
        deployment = client.AppsV1Api(target.api).read_namespaced_deployment(name, namespace)
    except client.ApiException as error:
        if error.status == 404:
            raise Failed(f"there is no deployment {namespace}/{name}") from None
        raise
    image = deployment.spec.template.spec.containers[0].image
    if not (deployment.status and deployment.status.available_replicas):
        raise Failed(f"{namespace}/{name} ({image}) has no available replica")
    if not re.search(version, image):
        raise Failed(f"{namespace}/{name} runs {image}; tested is {version.replace(chr(92), '')}x")
    return image


@check("flyte deployment", "Install flyte-binary or flyte-core 1.16.8 with the values of k8s/helm.")
def flyte_deployment(target: Target) -> str:
    findings = []
    for name in ("flyte-binary", "flytepropeller"):
        try:
            return _deployment(target, "flyte", name, r"1\.16\.")
        except Failed as finding:
            findings.append(str(finding))
    raise Failed("; ".join(findings))


def _flyte_config(target: Target) -> dict[str, Any]:
    """All of Flyte's configuration maps, merged at the top."""
    merged: dict[str, Any] = {}
    for config in _core(target).list_namespaced_config_map("flyte").items:
        for text in (config.data or {}).values():
            try:
                parsed = yaml.safe_load(text)
            except yaml.YAMLError:
                continue
            merged |= parsed if isinstance(parsed, dict) else {}
    if not merged:
        raise Failed("namespace flyte has no configuration map with YAML in it")
    return merged


@check("flyte plugins", "Merge k8s/helm/flyte-binary.yaml or flyte-core.yaml into the chart's values: enabled-plugins.")
def flyte_plugins(target: Target) -> str:
    tasks = _flyte_config(target).get("tasks", {}).get("task-plugins", {})
    enabled = {name.lower() for name in tasks.get("enabled-plugins", [])}
    wanted = {"container", "sidecar", "k8s-array"} | ({"pytorch"} if target.nnodes * target.nproc > 1 else set())
    if missing := wanted - enabled:
        raise Failed(f"not enabled: {', '.join(sorted(missing))}")
    return ", ".join(sorted(wanted))


@check("flyte error aggregation", "Set plugins.k8s.enable-distributed-error-aggregation (k8s/helm).")
def error_aggregation(target: Target) -> str:
    _needs_job(target)
    if not _flyte_config(target).get("plugins", {}).get("k8s", {}).get("enable-distributed-error-aggregation"):
        raise Failed("off: a job's retries would depend on whichever pod's error is seen first")
    return "on"


@check("flyte accelerator label", "Set plugins.k8s.gpu-device-node-label to the nodes' label (k8s/helm).")
def accelerator_label(target: Target) -> str:
    _needs_gpus(target)
    return _label(target)


def _label(target: Target) -> str:
    k8s = _flyte_config(target).get("plugins", {}).get("k8s", {})
    return k8s.get("gpu-device-node-label", "k8s.amazonaws.com/accelerator")


@check("kueue definitions", "Install Kueue 0.14 (k8s/helm/kueue.yaml), or leave nucleus.queue out.")
def kueue_crds(target: Target) -> str:
    _needs_queue(target)
    return ", ".join(_crd(target, f"{name}.kueue.x-k8s.io", "v1beta1") for name in ("clusterqueues", "localqueues"))


@check("kueue pytorchjob integration", "Add kubeflow.org/pytorchjob to integrations.frameworks (k8s/helm/kueue.yaml).")
def kueue_integration(target: Target) -> str:
    _needs_queue(target)
    config = _core(target).read_namespaced_config_map("kueue-manager-config", "kueue-system")
    manager = yaml.safe_load(next(iter(config.data.values())))
    if "kubeflow.org/pytorchjob" not in manager.get("integrations", {}).get("frameworks", []):
        raise Failed("off: training jobs would start pod by pod, past the queue")
    return "on"


def _queue(target: Target) -> dict[str, Any]:
    custom = client.CustomObjectsApi(target.api)
    local = custom.get_namespaced_custom_object(
        "kueue.x-k8s.io", "v1beta1", target.namespace, "localqueues", target.queue
    )
    name = local["spec"]["clusterQueue"]
    return custom.get_cluster_custom_object("kueue.x-k8s.io", "v1beta1", "clusterqueues", name)


@check("queue", "kubectl apply -k k8s/kueue, and see kubectl describe clusterqueue for what it lacks.")
def queue(target: Target) -> str:
    _needs_queue(target)
    cluster_queue = _queue(target)
    conditions = {c["type"]: c for c in cluster_queue.get("status", {}).get("conditions", [])}
    active = conditions.get("Active", {})
    if active.get("status") != "True":
        raise Failed(
            f"cluster queue {cluster_queue['metadata']['name']} is not active: {active.get('message', 'no status')}"
        )
    return f"{target.queue} -> {cluster_queue['metadata']['name']}"


@check("queue quota", "Raise nominalQuota of the cluster queue (k8s/kueue/queues.yaml), or train on fewer nodes.")
def queue_quota(target: Target) -> str:
    _needs_queue(target)
    _needs_gpus(target)
    total = sum(
        parse_quantity(resource["nominalQuota"])
        for group in _queue(target)["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == GPU
    )
    if total < target.gpus:
        raise Failed(f"{total} GPUs in all, and the job needs {target.gpus}")
    return f"{total} GPUs"


def _nodes(target: Target) -> list[Any]:
    """Nodes with the accelerator that are ready and not cordoned."""
    wanted = target.accelerator or target.profile.accelerator
    selector = f"{_label(target)}={wanted}"
    nodes = _core(target).list_node(label_selector=selector).items
    return [
        node
        for node in nodes
        if not node.spec.unschedulable
        and any(c.type == "Ready" and c.status == "True" for c in node.status.conditions or [])
    ]


@check(
    "accelerator nodes", "Add nodes of the profile's kind, label them, or let a NodePool of k8s/karpenter make them."
)
def accelerator_nodes(target: Target) -> str:
    _needs_gpus(target)
    nodes = _nodes(target)
    selector = f"{_label(target)}={target.accelerator or target.profile.accelerator}"
    if len(nodes) >= target.nnodes:
        return f"{len(nodes)} ready with {selector}"
    pools = _pools(target)
    if pools:
        return f"{len(nodes)} ready with {selector}; Karpenter's {', '.join(pools)} would make more"
    raise Failed(f"{len(nodes)} ready with {selector}, and the job needs {target.nnodes}")


def _pools(target: Target) -> list[str]:
    label, value = _label(target), target.accelerator or target.profile.accelerator
    try:
        pools = client.CustomObjectsApi(target.api).list_cluster_custom_object("karpenter.sh", "v1", "nodepools")[
            "items"
        ]
    except client.ApiException:
        return []
    return [
        pool["metadata"]["name"]
        for pool in pools
        if pool["spec"]["template"].get("metadata", {}).get("labels", {}).get(label) == value
    ]


def _fits(target: Target, needed: dict[str, Any], of: str) -> str:
    nodes = _nodes(target)
    if not nodes:
        raise Skipped("no such node is up yet")
    good = [
        node
        for node in nodes
        if all(parse_quantity(node.status.allocatable.get(n, "0")) >= parse_quantity(v) for n, v in needed.items())
    ]
    text = ", ".join(f"{name} {value}" for name, value in needed.items())
    if len(good) < min(len(nodes), target.nnodes):
        least = {n: nodes[0].status.allocatable.get(n, "0") for n in needed}
        raise Failed(
            f"{len(good)} of {len(nodes)} nodes have {text} allocatable {of}; {nodes[0].metadata.name} has {least}"
        )
    return f"{len(good)} nodes with {text}"


@check(
    "accelerators of a node", "Start the device plugin (k8s/helm/nvidia-device-plugin.yaml), or choose another shape."
)
def node_gpus(target: Target) -> str:
    _needs_gpus(target)
    return _fits(target, {GPU: str(target.nproc)}, "for a training pod")


@check(
    "cpu and memory of a node", "Choose the profile of these nodes (tasks/profiles.py): a training pod would not fit."
)
def node_size(target: Target) -> str:
    _needs_gpus(target)
    share = target.profile.train
    needed = {"cpu": str(share.cpu * target.nproc), "memory": f"{share.memory_gib * target.nproc}Gi"}
    return _fits(target, needed, "for a training pod")


@check("scratch space of a node", "Put the kubelet's directory on the nodes' NVMe (instanceStorePolicy: RAID0).")
def node_scratch(target: Target) -> str:
    _needs_gpus(target)
    return _fits(target, {"ephemeral-storage": f"{target.profile.train.ephemeral_gib * target.nproc}Gi"}, "for scratch")


@check(
    "efa and hugepages of a node", "Install the EFA device plugin and reserve hugepages, or leave nucleus.fabric out."
)
def node_fabric(target: Target) -> str:
    if not target.fabric:
        raise Skipped("no fabric is configured (nucleus.fabric)")
    return _fits(target, {"vpc.amazonaws.com/efa": "1", "hugepages-2Mi": "5120Mi"}, "for a training pod")


@check("taints of the nodes", "Remove the taint, or add its toleration to Flyte's resource-tolerations (k8s/helm).")
def taints(target: Target) -> str:
    _needs_gpus(target)
    foreign = {
        f"{taint.key} ({node.metadata.name})"
        for node in _nodes(target)
        for taint in node.spec.taints or []
        if taint.effect != "PreferNoSchedule" and taint.key not in TOLERATED
    }
    if foreign:
        raise Failed(f"not tolerated: {', '.join(sorted(foreign))}")
    return "tolerated"


@check("namespace", "Create the project in Flyte, and kubectl apply -k k8s/overlays/YOURS.")
def namespace(target: Target) -> str:
    labels = _core(target).read_namespace(target.namespace).metadata.labels or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "none")
    if level != "restricted":
        raise Failed(f"{target.namespace} enforces pod security {level!r}, not 'restricted'")
    return target.namespace


@check("pod templates", "kubectl apply -k k8s/overlays/YOURS, or set nucleus.pod_templates: off.")
def pod_templates(target: Target) -> str:
    if not target.pod_templates:
        raise Skipped("switched off (nucleus.pod_templates)")
    there = {item.metadata.name for item in _core(target).list_namespaced_pod_template(target.namespace).items}
    wanted = {name for role in TEMPLATES_OF if (name := pod_template(role))}
    if missing := wanted - there:
        raise Failed(f"{target.namespace} lacks {', '.join(sorted(missing))}")
    return ", ".join(sorted(wanted))


@check("service accounts", "kubectl apply -k k8s/overlays/YOURS: accounts without a token of the API server.")
def service_accounts(target: Target) -> str:
    accounts = {a.metadata.name: a for a in _core(target).list_namespaced_service_account(target.namespace).items}
    if missing := set(ACCOUNTS) - accounts.keys():
        raise Failed(f"{target.namespace} lacks {', '.join(sorted(missing))}")
    if mounted := [name for name in ACCOUNTS if accounts[name].automount_service_account_token is not False]:
        raise Failed(f"{', '.join(mounted)} mount a token of the API server into pods that parse strangers' bytes")
    return "without tokens"


@check("network policies", "kubectl apply -k k8s/overlays/YOURS, with a network plugin that enforces policies.")
def network_policies(target: Target) -> str:
    policies = client.NetworkingV1Api(target.api).list_namespaced_network_policy(target.namespace).items
    if not any(not p.spec.pod_selector.match_labels and set(p.spec.policy_types or []) == {"Ingress", "Egress"}
               and not p.spec.ingress and not p.spec.egress for p in policies):  # fmt: skip
        raise Failed(f"nothing closes {target.namespace} by default")
    return f"{len(policies)}, closed by default"


@check("resource quota", "Raise the quota (k8s/base/quota.yaml), or train on fewer nodes.")
def resource_quota(target: Target) -> str:
    needed = {
        f"requests.{GPU}": target.gpus,
        "requests.cpu": target.profile.train.cpu * target.nproc * target.nnodes,
        "requests.memory": target.profile.train.memory_gib * target.nproc * target.nnodes * 2**30,
    }
    quotas = _core(target).list_namespaced_resource_quota(target.namespace).items
    for quota in quotas:
        hard, used = quota.status.hard or {}, quota.status.used or {}
        for name, amount in needed.items():
            if name in hard and parse_quantity(hard[name]) - parse_quantity(used.get(name, "0")) < amount:
                raise Failed(
                    f"{quota.metadata.name}: {name} {hard[name]}, {used.get(name, 0)} used, the job needs {amount}"
                )
    return f"{len(quotas)} quotas leave room" if quotas else "none"


@check("priority classes", "kubectl apply -k k8s/overlays/YOURS.")
def priority_classes(target: Target) -> str:
    there = {item.metadata.name for item in client.SchedulingV1Api(target.api).list_priority_class().items}
    if missing := set(PRIORITIES) - there:
        raise Failed(f"there is no {', '.join(sorted(missing))}")
    return ", ".join(PRIORITIES)


@check("storage class", "Mark one StorageClass as the default: the captioner's weights are on a volume.")
def storage_class(target: Target) -> str:
    default = "storageclass.kubernetes.io/is-default-class"
    for item in client.StorageV1Api(target.api).list_storage_class().items:
        if (item.metadata.annotations or {}).get(default) == "true":
            return item.metadata.name
    raise Failed("none is the default")


@check("hub secret", "Let External Secrets make it (k8s/secrets), with the key HF_TOKEN.")
def hub_secret(target: Target) -> str:
    return _has_key(target, "hub_secret", "HF_TOKEN")


@check("metrics secret", "Let External Secrets make it (k8s/secrets), with the key WANDB_API_KEY.")
def wandb_secret(target: Target) -> str:
    return _has_key(target, "wandb_secret", "WANDB_API_KEY")


def _has_key(target: Target, setting: str, key: str) -> str:
    """Looks for a key of the secret that a setting names; its value is never read."""
    name = getattr(target, setting)
    if not name:
        raise Skipped(f"no secret is configured (nucleus.{setting})")
    secret = _core(target).read_namespaced_secret(name, target.namespace)
    if not (secret.data or {}).get(key):
        raise Failed(f"{name} has no {key}")
    return f"{name} has {key}"
