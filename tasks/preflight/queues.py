"""Checks of Kueue: its version, its configuration, the queue and its quota."""

from __future__ import annotations

from typing import Any

import yaml
from kubernetes import client
from kubernetes.utils import parse_quantity

from tasks.preflight.checks import Failed, Target, check
from tasks.preflight.cluster import accelerator, available, core, crd, label, needs_gpus, needs_queue

GROUP, VERSION = "kueue.x-k8s.io", "v1beta1"  # of the manifests in k8s/kueue; Kueue 0.20 no longer serves it
GPU = "nvidia.com/gpu"


@check("kueue definitions", "Install Kueue 0.14 (docs/cluster.md), or leave nucleus.queue out.")
def kueue_crds(target: Target) -> str:
    needs_queue(target)
    names = ("clusterqueues", "localqueues", "resourceflavors")
    return ", ".join(crd(target, f"{name}.{GROUP}", VERSION) for name in names)


@check("kueue deployment", "Install Kueue 0.14 (docs/cluster.md) and wait for its deployment to be available.")
def kueue_deployment(target: Target) -> str:
    needs_queue(target)
    return available(
        target, "kueue-system", "kueue-controller-manager", r"kueue:v0\.1[4-9]\.", "0.14; 0.15 to 0.19 have its API"
    )


@check("kueue pytorchjob integration", "Add kubeflow.org/pytorchjob to integrations.frameworks (k8s/helm/kueue.yaml).")
def kueue_integration(target: Target) -> str:
    needs_queue(target)
    config = core(target).read_namespaced_config_map("kueue-manager-config", "kueue-system")
    manager = yaml.safe_load(next(iter(config.data.values())))
    if "kubeflow.org/pytorchjob" not in manager.get("integrations", {}).get("frameworks", []):
        raise Failed("off: training jobs would start pod by pod, past the queue")
    return "on"


def _queue(target: Target) -> dict[str, Any]:
    custom = client.CustomObjectsApi(target.api)
    local = custom.get_namespaced_custom_object(GROUP, VERSION, target.namespace, "localqueues", target.queue)
    name = local["spec"]["clusterQueue"]
    return custom.get_cluster_custom_object(GROUP, VERSION, "clusterqueues", name)


@check("queue", "kubectl apply -k k8s/kueue, and see kubectl describe clusterqueue for what it lacks.")
def queue(target: Target) -> str:
    needs_queue(target)
    cluster_queue = _queue(target)
    conditions = {c["type"]: c for c in cluster_queue.get("status", {}).get("conditions", [])}
    active = conditions.get("Active", {})
    if active.get("status") != "True":
        raise Failed(
            f"cluster queue {cluster_queue['metadata']['name']} is not active: {active.get('message', 'no status')}"
        )
    return f"{target.queue} -> {cluster_queue['metadata']['name']}"


@check(
    "queue quota",
    "Raise nominalQuota of the profile's flavor (k8s/kueue/queues.yaml), add a flavor with the nodes' label "
    "(k8s/kueue/flavors.yaml), or train on fewer nodes.",
)
def queue_quota(target: Target) -> str:
    """Of the flavors whose nodes the job selects: Kueue gives a job no other."""
    needs_queue(target)
    needs_gpus(target)
    key, value = label(target), accelerator(target)
    custom = client.CustomObjectsApi(target.api)
    flavors = custom.list_cluster_custom_object(GROUP, VERSION, "resourceflavors")["items"]
    # Kueue adds a flavor's labels to a job's node selector: with another label, nodes would need both.
    labels = {flavor["metadata"]["name"]: flavor.get("spec", {}).get("nodeLabels", {key: value}) for flavor in flavors}
    quotas = {
        flavor["name"]: parse_quantity(resource["nominalQuota"])
        for group in _queue(target)["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == GPU
    }
    fitting = {name: quota for name, quota in quotas.items() if labels.get(name, {}).get(key) == value}
    if not fitting:
        raise Failed(
            f"no flavor of the queue has nodes with {key}={value}; its flavors are {', '.join(sorted(quotas))}"
        )
    largest = max(fitting.values())  # all pods of a job get the same flavor
    if largest < target.gpus:
        raise Failed(f"{largest} GPUs of {', '.join(sorted(fitting))}, and the job needs {target.gpus}")
    return f"{largest} GPUs of {', '.join(sorted(fitting))}"
