"""Checks of the namespace: the objects of k8s/base, its quota and its secrets."""

from __future__ import annotations

from kubernetes import client
from kubernetes.utils import parse_quantity

from tasks.preflight.checks import Failed, Skipped, Target, check
from tasks.preflight.cluster import core
from tasks.preflight.queues import GPU
from tasks.profiles import pod_template

TEMPLATES_OF = ("curation", "encoder", "trainer", "publisher")
PRIORITIES = ("nucleus-training", "nucleus-batch")
ACCOUNTS = ("nucleus-curation", "nucleus-training", "nucleus-publisher")


@check("namespace", "Create the project in Flyte, and kubectl apply -k k8s/overlays/YOURS.")
def namespace(target: Target) -> str:
    labels = core(target).read_namespace(target.namespace).metadata.labels or {}
    level = labels.get("pod-security.kubernetes.io/enforce", "none")
    if level != "restricted":
        raise Failed(f"{target.namespace} enforces pod security {level!r}, not 'restricted'")
    return target.namespace


@check("pod templates", "kubectl apply -k k8s/overlays/YOURS, or set nucleus.pod_templates: off.")
def pod_templates(target: Target) -> str:
    if not target.pod_templates:
        raise Skipped("switched off (nucleus.pod_templates)")
    there = {item.metadata.name for item in core(target).list_namespaced_pod_template(target.namespace).items}
    wanted = {name for role in TEMPLATES_OF if (name := pod_template(role))} | {
        "nucleus-trainer"
    }  # merges: without EFA
    if missing := wanted - there:
        raise Failed(f"{target.namespace} lacks {', '.join(sorted(missing))}")
    return ", ".join(sorted(wanted))


@check("service accounts", "kubectl apply -k k8s/overlays/YOURS: accounts without a token of the API server.")
def service_accounts(target: Target) -> str:
    accounts = {a.metadata.name: a for a in core(target).list_namespaced_service_account(target.namespace).items}
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


@check(
    "resource quota",
    "Raise the quota (k8s/base/quota.yaml; project-quota is Flyte's: k8s/helm), or train on fewer nodes.",
)
def resource_quota(target: Target) -> str:
    """Requests and limits, which are equal, of all pods of training together."""
    ranks, share = target.nproc * target.nnodes, target.profile.train
    amounts = {
        "cpu": share.cpu * ranks,
        "memory": share.memory_gib * ranks * 2**30,
        "ephemeral-storage": share.ephemeral_gib * ranks * 2**30,
    }
    needed = {"pods": target.nnodes, f"requests.{GPU}": target.gpus, f"limits.{GPU}": target.gpus} | amounts
    needed |= {f"{kind}.{name}": amount for kind in ("requests", "limits") for name, amount in amounts.items()}
    quotas = core(target).list_namespaced_resource_quota(target.namespace).items
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
    secret = core(target).read_namespaced_secret(name, target.namespace)
    if not (secret.data or {}).get(key):
        raise Failed(f"{name} has no {key}")
    return f"{name} has {key}"
