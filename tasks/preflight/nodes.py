"""Checks of the nodes, and of the NodePools from which Karpenter makes nodes."""

from __future__ import annotations

from typing import Any

from kubernetes import client
from kubernetes.utils import parse_quantity

from tasks.preflight.checks import Failed, Skipped, Target, check
from tasks.preflight.cluster import accelerator, core, label, needs_gpus
from tasks.preflight.queues import GPU
from tasks.profiles import Size, pod_template

INTERRUPTIBLE = "flyte.org/interruptible"
TOLERATED = {GPU, INTERRUPTIBLE}  # by training pods
FABRIC = ("vpc.amazonaws.com/efa", "hugepages-2Mi")
AWS = "karpenter.k8s.aws"  # the group of EC2NodeClass
LOCAL_NVME = f"{AWS}/instance-local-nvme"  # a requirement of NodePools; GB
DISK_FOR_PODS = 0.9  # share of it; the kubelet keeps the rest


@check("flyte accelerator label", "Set plugins.k8s.gpu-device-node-label to the nodes' label (k8s/helm).")
def accelerator_label(target: Target) -> str:
    needs_gpus(target)
    key = label(target)
    if any(key in (node.metadata.labels or {}) for node in core(target).list_node().items):
        return key
    if any(key in _template(pool).get("metadata", {}).get("labels", {}) for pool in _node_pools(target)):
        return f"{key}, of NodePools"
    raise Failed(f"Flyte selects nodes by {key}, which no node and no NodePool has")


def _ready(node: Any) -> bool:
    conditions = node.status.conditions or []
    return not node.spec.unschedulable and any(c.type == "Ready" and c.status == "True" for c in conditions)


def _nodes(target: Target) -> list[Any]:
    """Nodes with the accelerator that are ready and not cordoned."""
    selector = f"{label(target)}={accelerator(target)}"
    return [node for node in core(target).list_node(label_selector=selector).items if _ready(node)]


def _of_karpenter(target: Target, group: str, kinds: str) -> list[dict[str, Any]]:
    """Objects of Karpenter; none where it is not installed or this identity may not look."""
    try:
        return client.CustomObjectsApi(target.api).list_cluster_custom_object(group, "v1", kinds)["items"]
    except client.ApiException:
        return []


def _node_pools(target: Target) -> list[dict[str, Any]]:
    return _of_karpenter(target, "karpenter.sh", "nodepools")


def _template(pool: dict[str, Any]) -> dict[str, Any]:
    return pool["spec"]["template"]


@check(
    "accelerator nodes", "Add nodes of the profile's kind, label them, or let a NodePool of k8s/karpenter make them."
)
def accelerator_nodes(target: Target) -> str:
    needs_gpus(target)
    ready = _nodes(target)
    key, value = label(target), accelerator(target)
    if len(ready) >= target.nnodes:
        return f"{len(ready)} ready with {key}={value}"
    pools = [
        pool["metadata"]["name"]
        for pool in _node_pools(target)
        if _template(pool).get("metadata", {}).get("labels", {}).get(key) == value
    ]
    if pools:
        return f"{len(ready)} ready with {key}={value}; Karpenter's {', '.join(pools)} would make more"
    raise Failed(f"{len(ready)} ready with {key}={value}, and the job needs {target.nnodes}")


def _has_room(node: Any, needed: dict[str, Any]) -> bool:
    return all(
        parse_quantity(node.status.allocatable.get(name, "0")) >= parse_quantity(value)
        for name, value in needed.items()
    )


def _fits(target: Target, needed: dict[str, Any], of: str) -> str:
    nodes = _nodes(target)
    if not nodes:
        raise Skipped("no such node is up yet")
    good = [node for node in nodes if _has_room(node, needed)]
    text = _listed(needed)
    if len(good) < min(len(nodes), target.nnodes):
        small = next(node for node in nodes if node not in good)
        least = {name: small.status.allocatable.get(name, "0") for name in needed}
        raise Failed(
            f"{len(good)} of {len(nodes)} nodes have {text} allocatable {of}; {small.metadata.name} has {least}"
        )
    return f"{len(good)} nodes with {text}"


@check(
    "accelerators of a node", "Start the device plugin (k8s/helm/nvidia-device-plugin.yaml), or choose another shape."
)
def node_gpus(target: Target) -> str:
    needs_gpus(target)
    return _fits(target, {GPU: str(target.nproc)}, "for a training pod")


@check(
    "cpu and memory of a node", "Choose the profile of these nodes (tasks/profiles.py): a training pod would not fit."
)
def node_size(target: Target) -> str:
    needs_gpus(target)
    share = target.profile.train
    needed = {"cpu": str(share.cpu * target.nproc), "memory": f"{share.memory_gib * target.nproc}Gi"}
    return _fits(target, needed, "for a training pod")


@check("scratch space of a node", "Put the kubelet's directory on the nodes' NVMe (instanceStorePolicy: RAID0).")
def node_scratch(target: Target) -> str:
    needs_gpus(target)
    return _fits(target, {"ephemeral-storage": f"{target.profile.train.ephemeral_gib * target.nproc}Gi"}, "for scratch")


@check(
    "efa and hugepages of a node",
    "Install the EFA device plugin and reserve hugepages, choose the profile of these nodes, or leave nucleus.fabric out.",
)
def node_fabric(target: Target) -> str:
    """Against the numbers of the PodTemplate that training names, which the pods inherit."""
    if not target.fabric:
        raise Skipped("no fabric is configured (nucleus.fabric)")
    name = pod_template("trainer")
    templates = core(target).list_namespaced_pod_template(target.namespace).items
    found = next((each for each in templates if each.metadata.name == name), None)
    if found is None:
        raise Skipped(f"{target.namespace} has no PodTemplate {name}, which names the number")
    limits: dict[str, str] = {}
    for container in found.template.spec.containers:
        if container.name == "primary" and container.resources:
            limits = container.resources.limits or {}
    needed = {resource: limits[resource] for resource in FABRIC if resource in limits}
    if FABRIC[0] not in needed:
        raise Failed(f"PodTemplate {name} asks for no {FABRIC[0]}: training would use TCP")
    return _fits(target, needed, f"for a pod of {name}")


@check(
    "nodes for tasks on one accelerator",
    "Put the kubelet's directory on the nodes' NVMe (instanceStorePolicy: RAID0), or choose the profile of these nodes.",
)
def single_gpu(target: Target) -> str:
    """Merges need more scratch space than one rank of training."""
    needs_gpus(target)
    nodes = _nodes(target)
    if not nodes:
        raise Skipped("no such node is up yet")
    kinds = (("merging", target.profile.merge), ("scoring, encoding and evaluating", target.profile.gpu))
    for kind, size in kinds:
        needed = {GPU: "1", **_requests(size)}
        if not any(_has_room(node, needed) for node in nodes):
            raise Failed(f"none of {len(nodes)} nodes takes a task of {kind} ({_listed(needed)})")
    return "; ".join(f"{kind}: a node" for kind, _ in kinds)


@check("taints of the nodes", "Remove the taint, or add its toleration to Flyte's resource-tolerations (k8s/helm).")
def taints(target: Target) -> str:
    needs_gpus(target)
    foreign = {
        f"{taint.key} ({node.metadata.name})"
        for node in _nodes(target)
        for taint in node.spec.taints or []
        if taint.effect != "PreferNoSchedule" and taint.key not in TOLERATED
    }
    if foreign:
        raise Failed(f"not tolerated: {', '.join(sorted(foreign))}")
    return "tolerated"


@check(
    "nodes for cpu tasks",
    "Add CPU nodes without taints, or NodePools without taints (nucleus-cpu of k8s/karpenter, and nucleus-tables with NVMe "
    "for deciding): these tasks have no accelerator and may not be interrupted.",
)
def cpu_nodes(target: Target) -> str:
    """Whether the tasks of each size fit somewhere. Of what a NodePool may make, only the disk is compared with the size."""
    profile, observed, is_known = target.profile, [], True
    kinds = (("planning", profile.light, set()), ("gathering", profile.gather, set()),
             ("deciding", profile.tables, set()),
             ("publishing", profile.publish, set()), ("a shard", profile.shard, {INTERRUPTIBLE}))  # fmt: skip
    if not target.gpus:
        kinds += (("merging", profile.merge, set()), ("scoring, encoding and evaluating", profile.gpu, set()))
    ready = [node for node in core(target).list_node().items if _ready(node)]
    pools = _node_pools(target)
    classes = {each["metadata"]["name"]: each["spec"] for each in _of_karpenter(target, AWS, "ec2nodeclasses")}
    disks = {pool["metadata"]["name"]: _disk_gib(pool, classes) for pool in pools}
    for kind, size, tolerated in kinds:
        needed = _requests(size)
        if any(_open([t.to_dict() for t in n.spec.taints or []], tolerated) and _has_room(n, needed) for n in ready):
            observed.append(f"{kind}: a node")
            continue
        untainted = [p["metadata"]["name"] for p in pools if _open(_template(p)["spec"].get("taints", []), tolerated)]
        names = [name for name in untainted if (disks[name] or 0) >= size.ephemeral_gib]
        unknown = [name for name in untainted if disks[name] is None]
        if names:
            observed.append(f"{kind}: NodePool {', '.join(names)}")
        elif unknown:
            observed.append(f"{kind}: no node, and the disk of NodePool {', '.join(unknown)} is not known")
            is_known = False
        else:
            small = ", ".join(f"{name} {disks[name] or 0:.0f}" for name in untainted)
            raise Failed(
                f"no node takes a task of {kind} ({_listed(needed)}), and no NodePool without taints "
                + (f"has such a disk (GiB for pods: {small})" if small else "would make one")
            )
    if not is_known:
        raise Skipped("; ".join(observed))
    return "; ".join(observed)


def _disk_gib(pool: dict[str, Any], classes: dict[str, dict[str, Any]]) -> float | None:
    """What pods get of the least disk of a NodePool's nodes: NVMe that it requires and its EC2NodeClass gives to pods, else
    the root volume. None if the class cannot be read or names no size."""
    spec = classes.get(_template(pool)["spec"].get("nodeClassRef", {}).get("name"), {})
    least = 0.0
    for requirement in _template(pool)["spec"].get("requirements", []):
        values = [float(value) for value in requirement.get("values", []) if requirement["key"] == LOCAL_NVME]
        if values and requirement["operator"] in ("Gt", "Gte", "In"):
            least = max(least, min(values))
    if least and spec.get("instanceStorePolicy") == "RAID0":
        return DISK_FOR_PODS * least * 1e9 / 2**30
    volumes = spec.get("blockDeviceMappings", [])
    roots = [volume for volume in volumes if volume.get("rootVolume")] or volumes
    sizes = [parse_quantity(size) for volume in roots if (size := volume.get("ebs", {}).get("volumeSize"))]
    return DISK_FOR_PODS * float(min(sizes)) / 2**30 if sizes else None


def _requests(size: Size) -> dict[str, str]:
    return {"cpu": str(size.cpu), "memory": f"{size.memory_gib}Gi", "ephemeral-storage": f"{size.ephemeral_gib}Gi"}


def _listed(needed: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in needed.items())


def _open(taints: list[dict[str, Any]], tolerated: set[str]) -> bool:
    return all(taint["effect"] == "PreferNoSchedule" or taint["key"] in tolerated for taint in taints)
