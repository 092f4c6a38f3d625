"""The only place for images, resources, retries, accelerators and cache versions of tasks.

A cache version names the meaning of a task's output: raise it when the code behind a task changes what it
writes for the same inputs. Images are named by role and resolved when the workflows are registered
(`--image trainer=REGISTRY/NAME@sha256:...`); a local run ignores images, resources and retries.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from flytekit import Cache, Resources
from flytekit.extras.accelerators import H100

# flytekit warns that it offers no console form for single fields of type tuple; the sections themselves travel
# whole, as Pydantic models.
logging.getLogger("flytekit").addFilter(
    lambda record: "cannot be converted to a literal type" not in record.getMessage()
)

CACHE_VERSIONS = {
    "records": "2",
    "curation": "2",
    "components": "1",
    "encoding": "2",
    "training": "3",
    "merging": "1",
    "evaluation": "2",
    "publishing": "1",
}

# Multi-node training is decided when the workflows are registered, since Flyte fixes a task's type then:
# NUCLEUS_TRAIN_NNODES x NUCLEUS_TRAIN_NPROC processes. Unset means one plain process.
TRAIN_NNODES = int(os.environ.get("NUCLEUS_TRAIN_NNODES", "1"))
TRAIN_NPROC = int(os.environ.get("NUCLEUS_TRAIN_NPROC", "1"))
# For pods that load this module too, and must see what was registered.
REGISTERED = {"NUCLEUS_TRAIN_NNODES": str(TRAIN_NNODES), "NUCLEUS_TRAIN_NPROC": str(TRAIN_NPROC)}
# After SIGTERM to a node's pod: for the step under way and its checkpoint, before the workers are killed.
TRAIN_GRACE_S = int(os.environ.get("NUCLEUS_TRAIN_GRACE_S", "300"))
# Attempts beyond the first at a training stage, each from the last checkpoint. Flyte counts here what the task itself
# calls recoverable (SIGTERM and with it each preemption, faults) and each PyTorchJob that fails, but not a single pod
# that ends without a word, as its node does: that is Propeller's max-node-retries-system-failures (3 by default, the
# last on a node that is not interruptible). Two weeks of a preemption every four hours are 84.
TRAIN_RETRIES = int(os.environ.get("NUCLEUS_TRAIN_RETRIES", "100"))
REPORT_S = 30  # from there to the pod's end: the agent writes the error that Flyte retries


def image(role: str) -> str:
    """The container image of a role, resolved at registration by `--image ROLE=...`."""
    return f"{{{{.image.{role}.fqn}}}}:{{{{.image.{role}.version}}}}"


def cache(step: str, ignored_inputs: tuple[str, ...] = ()) -> Cache:
    return Cache(version=CACHE_VERSIONS[step], ignored_inputs=ignored_inputs, serialize=True)


def _sized(cpu: str, memory_gib: int, gpu: int = 0) -> dict[str, Any]:
    """Equal requests and limits, so that a node is never overcommitted."""
    size = Resources(cpu=cpu, mem=f"{memory_gib}Gi", gpu=str(gpu) if gpu else None)
    return {"requests": size, "limits": size}


def light(role: str) -> dict[str, Any]:
    """Options of a task that plans or gathers."""
    return {"container_image": image(role), "retries": 3, **_sized("1", 2)}


def planner() -> dict[str, Any]:
    """Options of the task that checks a recipe, also against the processes that training was registered for."""
    return light("curation") | {"environment": REGISTERED}


def shard(role: str) -> dict[str, Any]:
    """Options of one map task over a shard."""
    return {"container_image": image(role), "retries": 3, "interruptible": True, **_sized("4", 16)}


def gather(role: str) -> dict[str, Any]:
    """Options of a task that reads every shard."""
    return {"container_image": image(role), "retries": 3, **_sized("16", 64)}


def gpu_single(role: str) -> dict[str, Any]:
    """Options of a task on one accelerator."""
    options = {"container_image": image(role), "retries": 3, **_sized("16", 128, gpu=_gpus(1))}
    return options | ({"accelerator": H100} if _gpus(1) else {})


def trainer() -> dict[str, Any]:
    """Options of a training task: a plain pod for one process, a PyTorchJob for more.

    Grace after SIGTERM: of several processes, NUCLEUS_TRAIN_GRACE_S (when registering; 300 s) and the pod's
    terminationGracePeriodSeconds somewhat more; of one process, the cluster's (30 s by default). A cloud may give a
    node that it takes back less than either.
    """
    gpus = _gpus(TRAIN_NPROC)
    options = {"container_image": image("trainer"), "retries": TRAIN_RETRIES, "interruptible": True}
    options |= _sized("96" if gpus else "2", 1024 if gpus else 8, gpu=gpus)
    environment = {}
    if gpus:
        options["accelerator"] = H100
        # Shapes change from step to step: in segments of fixed size, freed memory would lie about in parts too small
        # for the next. Set it when registering for something else; an image's PYTORCH_CUDA_ALLOC_CONF goes before it.
        environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # see model/__init__.py: read at the first matrix product
        # Of 96 cores for 8 ranks. By default each rank starts as many compilers as the node has cores, up to 32.
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "8"
    if TRAIN_NNODES * TRAIN_NPROC > 1:
        # Imports torch: only registrations that ask for several processes pay for it.
        from flytekit import PodTemplate
        from kubernetes.client import V1PodSpec

        from tasks.training.elastic import PreemptibleElastic

        options["task_config"] = PreemptibleElastic(nnodes=TRAIN_NNODES, nproc_per_node=TRAIN_NPROC, max_restarts=0)
        options["shared_memory"] = "64Gi"
        pod = V1PodSpec(containers=[], termination_grace_period_seconds=TRAIN_GRACE_S + REPORT_S)
        options["pod_template"] = PodTemplate(pod_spec=pod)
        environment |= REGISTERED | {
            "NUCLEUS_TRAIN_GRACE_S": str(TRAIN_GRACE_S),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TRAIN_GRACE_S),
        }
    return options | {"environment": environment}


def _gpus(count: int) -> int:
    """Accelerators asked for: none when NUCLEUS_ACCELERATOR=none, as for a cluster of CPU nodes."""
    return 0 if os.environ.get("NUCLEUS_ACCELERATOR", "h100") == "none" else count
