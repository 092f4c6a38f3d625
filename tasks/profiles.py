"""Profiles of a site's nodes, chosen by NUCLEUS_PROFILE when workflows are registered.

NUCLEUS_PROFILE         cpu-small, a10g, l40s, h100 (default), h200, b200; NUCLEUS_ACCELERATOR=none is cpu-small
NUCLEUS_ACCELERATOR_LABEL   the value of the site's own accelerator label, if it differs from the profile's
NUCLEUS_FABRIC          efa, or nothing: selects training's PodTemplate (by the profile) and libfabric's environment
NUCLEUS_QUEUE           Kueue's LocalQueue for training jobs; unset: no queue
NUCLEUS_TOPOLOGY        a level of Kueue's Topology: a job's pods are placed in one domain of it if they fit. Only for queues whose
                        flavors have a topology: with others Kueue would never admit the job
NUCLEUS_METRICS_PORT    port at which training serves its metrics (model/train/metrics.py); k8s opens 9464
NUCLEUS_POD_TEMPLATES   off: the namespace has no PodTemplates (k8s/base has them)
NUCLEUS_HUB_SECRET      name of the secret with HF_TOKEN, for tasks that read from or publish to the Hub
NUCLEUS_WANDB_SECRET    name of the secret with WANDB_API_KEY, for training: its metrics then go to Weights & Biases too
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """Requests of a container, which equal its limits."""

    cpu: int
    memory_gib: int
    ephemeral_gib: int


@dataclass(frozen=True)
class Profile:
    """Sizes of each kind of task. `gpu` is for one accelerator, `train` for one rank of training."""

    name: str
    accelerator: str | None  # value of the label that Flyte's gpu-device-node-label names
    gpus_per_node: int
    gpu: Size
    train: Size
    shared_memory_gib: int
    light: Size = Size(1, 2, 5)
    shard: Size = Size(4, 16, 50)
    gather: Size = Size(16, 64, 500)
    # At 17B the pipeline is loaded in 52 GB (publish.check_memory_bytes), and 16 checkpoints to merge take 1.08 TB: the merge
    # runs on a node with an accelerator, whose disks have room.
    publish: Size = Size(16, 128, 500)
    # Decisions about 700M records: half of the memory is DuckDB's, and tables, scores and captions take 0.9 TB (docs/scale.md).
    tables: Size = Size(16, 128, 1600)
    merge: Size = Size(22, 220, 1600)
    # PodTemplate of training with as many EFA devices as a node has; empty: these nodes have none
    efa_template: str = ""
    environment: dict[str, str] = field(default_factory=dict)


# torch's flight recorder: on a timeout, NCCL reports the state of every rank.
_NCCL = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/nccl_trace_rank_",
}
EFA = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "NCCL_SOCKET_IFNAME": "^lo,docker,veth"}

# Shares of AWS's g5.4xlarge, g6e.8xlarge, p5.48xlarge, p5en.48xlarge and p6-b200.48xlarge, minus resources of the
# system.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "cpu-small", None, 0, gpu=Size(2, 6, 5), train=Size(2, 6, 5), shared_memory_gib=1,
            shard=Size(1, 4, 5), gather=Size(2, 6, 5), publish=Size(2, 6, 5), tables=Size(2, 6, 5), merge=Size(2, 6, 5),
        ),
        Profile(
            "a10g", "nvidia-a10g", 1, Size(12, 48, 200), Size(12, 48, 200), 8, merge=Size(12, 48, 200),
            tables=Size(16, 64, 500), environment=_NCCL,
        ),
        Profile(
            "l40s", "nvidia-l40s", 1, Size(24, 200, 300), Size(24, 200, 300), 16, merge=Size(24, 200, 300),
            tables=Size(16, 64, 500), environment=_NCCL,
        ),
        Profile(
            "h100", "nvidia-h100", 8, Size(22, 220, 800), Size(22, 220, 800), 64,
            efa_template="nucleus-trainer-efa", environment=_NCCL,
        ),
        Profile(
            "h200", "nvidia-h200", 8, Size(22, 220, 800), Size(22, 220, 800), 64,
            efa_template="nucleus-trainer-efa-16", environment=_NCCL,
        ),
        Profile(
            "b200", "nvidia-b200", 8, Size(22, 220, 800), Size(22, 220, 800), 64,
            efa_template="nucleus-trainer-efa-8", environment=_NCCL,
        ),
    )
}  # fmt: skip

SETTINGS = (
    "NUCLEUS_PROFILE",
    "NUCLEUS_ACCELERATOR",
    "NUCLEUS_ACCELERATOR_LABEL",
    "NUCLEUS_FABRIC",
    "NUCLEUS_QUEUE",
    "NUCLEUS_TOPOLOGY",
    "NUCLEUS_METRICS_PORT",
    "NUCLEUS_POD_TEMPLATES",
    "NUCLEUS_HUB_SECRET",
    "NUCLEUS_WANDB_SECRET",
)


def chosen() -> Profile:
    """The profile of the environment.

    Raises:
        ValueError: NUCLEUS_PROFILE is unknown.
    """
    default = "cpu-small" if os.environ.get("NUCLEUS_ACCELERATOR") == "none" else "h100"
    name = os.environ.get("NUCLEUS_PROFILE") or default
    if name not in PROFILES:
        raise ValueError(f"NUCLEUS_PROFILE={name!r} is unknown; use one of {', '.join(PROFILES)}")
    return PROFILES[name]


def fabric() -> str:
    """ "efa" or "".

    Raises:
        ValueError: NUCLEUS_FABRIC has another value.
    """
    name = os.environ.get("NUCLEUS_FABRIC", "")
    if name not in ("", "efa"):
        raise ValueError(f"NUCLEUS_FABRIC={name!r} is unknown; use efa, or leave it unset")
    return name


def pod_template(role: str) -> str | None:
    """Name of the namespace's PodTemplate for a role, as in k8s/base/podtemplates.yaml and k8s/efa.

    Raises:
        ValueError: EFA is configured, and the profile's nodes have none.
    """
    if os.environ.get("NUCLEUS_POD_TEMPLATES") == "off":
        return None
    if role == "trainer":
        if not fabric():
            return "nucleus-trainer"
        profile = chosen()
        if not profile.efa_template:
            having = ", ".join(name for name, each in PROFILES.items() if each.efa_template)
            raise ValueError(
                f"NUCLEUS_FABRIC='efa', but nodes of the profile {profile.name} have no EFA: use {having}, or leave it unset"
            )
        return profile.efa_template
    return {"curation": "nucleus-curation", "scorer": "nucleus-curation", "publisher": "nucleus-publisher"}.get(
        role, "nucleus-gpu"
    )
