"""Checks of the API server, of the training operator and of Flyte's deployment, and what other checks share."""

from __future__ import annotations

import re
from typing import Any

import yaml
from kubernetes import client

from tasks.preflight.checks import Failed, Skipped, Target, check

OLDEST = (1, 30)
FLYTE_DEPLOYMENTS = (
    "flyte-binary",
    "flytepropeller",
)  # of the charts flyte-binary and flyte-core, with k8s/helm's values
FLYTE_NAMESPACE = "flyte"
JOB_VERBS = ("get", "list", "watch", "create", "update", "patch", "delete")  # what propeller does with PyTorchJobs
DEFAULT_LABEL = "k8s.amazonaws.com/accelerator"  # Flyte's gpu-device-node-label, if its configuration has none


def core(target: Target) -> client.CoreV1Api:
    return client.CoreV1Api(target.api)


def needs_gpus(target: Target) -> None:
    if not target.gpus:
        raise Skipped(f"profile {target.profile.name} has no accelerators")


def needs_queue(target: Target) -> None:
    if not target.queue:
        raise Skipped("no queue is configured (nucleus.queue)")


def needs_job(target: Target) -> None:
    if target.nnodes * target.nproc == 1:
        raise Skipped("one process trains in a plain pod")


@check("api server", "Use a kubeconfig of the cluster, and a Kubernetes of 1.30 or later.")
def api_server(target: Target) -> str:
    version = client.VersionApi(target.api).get_code()
    numbers = tuple(int(re.sub(r"\D", "", part)) for part in (version.major, version.minor))
    if numbers < OLDEST:
        raise Failed(f"Kubernetes {version.git_version} is older than {OLDEST[0]}.{OLDEST[1]}")
    return f"Kubernetes {version.git_version}"


def crd(target: Target, name: str, version: str) -> str:
    """Checks that the API server serves a custom resource in this version."""
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
    needs_job(target)
    return crd(target, "pytorchjobs.kubeflow.org", "v1")


@check("training operator", "Install training-operator 1.9.4 and wait for its deployment to be available.")
def training_operator(target: Target) -> str:
    needs_job(target)
    return available(target, "kubeflow", "training-operator", r"1\.9\.", "1.9")


def available(target: Target, namespace: str, name: str, version: str, tested: str) -> str:
    """Checks that a deployment has an available replica of a tested version; returns its image.

    Args:
        version: a regular expression that the image's name must match.
        tested: the same for people.
    """
    deployment = _deployment(target, namespace, name)
    images = [container.image for container in deployment.spec.template.spec.containers]
    if not (deployment.status and deployment.status.available_replicas):
        raise Failed(f"{namespace}/{name} ({', '.join(images)}) has no available replica")
    for image in images:
        if re.search(version, image):
            return image
    raise Failed(f"{namespace}/{name} runs {', '.join(images)}; tested is {tested}")


def _deployment(target: Target, namespace: str, name: str) -> Any:
    try:
        return client.AppsV1Api(target.api).read_namespaced_deployment(name, namespace)
    except client.ApiException as error:
        if error.status == 404:
            raise Failed(f"there is no deployment {namespace}/{name}") from None
        raise


@check("flyte deployment", "Install flyte-binary or flyte-core 1.16.8 with the values of k8s/helm.")
def flyte_deployment(target: Target) -> str:
    findings = []
    for name in FLYTE_DEPLOYMENTS:
        try:
            return available(target, FLYTE_NAMESPACE, name, r"1\.16\.", "1.16")
        except Failed as finding:
            findings.append(str(finding))
    raise Failed("; ".join(findings))


@check("flyte rights on pytorchjobs", "Merge k8s/helm/flyte-binary.yaml into the chart's values: rbac.extraRules.")
def flyte_rights(target: Target) -> str:
    needs_job(target)
    account = _flyte_account(target)
    user = f"system:serviceaccount:{FLYTE_NAMESPACE}:{account}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{FLYTE_NAMESPACE}", "system:authenticated"]
    denied = []
    for verb in JOB_VERBS:
        # In all namespaces, as propeller's informer watches.
        attributes = client.V1ResourceAttributes(group="kubeflow.org", resource="pytorchjobs", verb=verb)
        review = client.V1SubjectAccessReview(
            spec=client.V1SubjectAccessReviewSpec(user=user, groups=groups, resource_attributes=attributes)
        )
        answer = client.AuthorizationV1Api(target.api).create_subject_access_review(review)
        if not answer.status.allowed:
            denied.append(verb)
    if denied:
        raise Failed(f"{FLYTE_NAMESPACE}/{account} may not {', '.join(denied)} pytorchjobs in all namespaces")
    return f"{FLYTE_NAMESPACE}/{account} manages them in all namespaces"


def _flyte_account(target: Target) -> str:
    """The service account of the pod that runs propeller."""
    for name in FLYTE_DEPLOYMENTS:
        try:
            return _deployment(target, FLYTE_NAMESPACE, name).spec.template.spec.service_account_name or "default"
        except Failed:
            continue
    raise Skipped("Flyte is not deployed")


def flyte_config(target: Target) -> dict[str, Any]:
    """All of Flyte's configuration maps, merged in the order of their names and files: flyte-core's have parts of
    `plugins` each."""
    merged: dict[str, Any] = {}
    maps = core(target).list_namespaced_config_map(FLYTE_NAMESPACE).items
    for config in sorted(maps, key=lambda each: each.metadata.name):
        for _, text in sorted((config.data or {}).items()):
            try:
                parsed = yaml.safe_load(text)
            except yaml.YAMLError:
                continue
            if isinstance(parsed, dict):
                _merge(merged, parsed)
    if not merged:
        raise Failed(f"namespace {FLYTE_NAMESPACE} has no configuration map with YAML in it")
    return merged


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def section(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A nested section of a configuration, empty if it is absent or not a mapping."""
    for key in keys:
        config = config.get(key) or {}
        if not isinstance(config, dict):
            return {}
    return config


@check("flyte plugins", "Merge k8s/helm/flyte-binary.yaml or flyte-core.yaml into the chart's values: enabled-plugins.")
def flyte_plugins(target: Target) -> str:
    plugins = section(flyte_config(target), "tasks", "task-plugins")
    enabled = {name.lower() for name in plugins.get("enabled-plugins") or []}
    wanted = {"container", "sidecar", "k8s-array"} | ({"pytorch"} if target.nnodes * target.nproc > 1 else set())
    if missing := wanted - enabled:
        raise Failed(f"not enabled: {', '.join(sorted(missing))}")
    return ", ".join(sorted(wanted))


@check("flyte error aggregation", "Set plugins.k8s.enable-distributed-error-aggregation (k8s/helm).")
def error_aggregation(target: Target) -> str:
    needs_job(target)
    if not section(flyte_config(target), "plugins", "k8s").get("enable-distributed-error-aggregation"):
        raise Failed("off: a job's retries would depend on whichever pod's error is seen first")
    return "on"


def label(target: Target) -> str:
    """The label by which Flyte selects nodes with an accelerator."""
    return section(flyte_config(target), "plugins", "k8s").get("gpu-device-node-label", DEFAULT_LABEL)


def accelerator(target: Target) -> str:
    """The value of the label that tasks select."""
    return target.accelerator or target.profile.accelerator or ""
