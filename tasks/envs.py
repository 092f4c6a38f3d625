"""The only place for images, resources, retries, accelerators and cache versions of tasks.

A cache version names the meaning of a task's output: raise it when the code behind a task changes what it
writes for the same inputs. Images are named by role and resolved when the workflows are registered
(`--image trainer=REGISTRY/NAME@sha256:...`); a local run ignores images, resources and retries.
The reasons are in docs/decisions/flyte.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from flytekit import Cache, Resources, Secret
from flytekit.deck import DeckField
from flytekit.extras.accelerators import GPUAccelerator

from tasks import profiles

# flytekit warns that the console has no form for single fields of type tuple; sections are passed whole, as Pydantic
# models.
logging.getLogger("flytekit").addFilter(
    lambda record: "cannot be converted to a literal type" not in record.getMessage()
)

CACHE_VERSIONS = {
    "urls": "2",
    "records": "10",
    "scores": "16",
    "captions": "3",
    "curation": "9",
    "components": "4",
    "texts": "3",
    "encoding": "6",
    "training": "4",
    "merging": "1",
    "prompts": "1",
    "evaluation": "10",
    "publishing": "6",
    "study": "3",
}

# Multi-node training is decided when the workflows are registered, since Flyte fixes a task's type then:
# NUCLEUS_TRAIN_NNODES x NUCLEUS_TRAIN_NPROC processes. Unset means one plain process.
TRAIN_NNODES = int(os.environ.get("NUCLEUS_TRAIN_NNODES", "1"))
TRAIN_NPROC = int(os.environ.get("NUCLEUS_TRAIN_NPROC", "1"))
PROFILE = profiles.chosen()
# Time limits of one attempt: long enough for any recipe, and they end a pod that hangs.
TIMEOUTS = {
    "light": timedelta(hours=1),
    "shard": timedelta(hours=6),
    "captioner": timedelta(days=7),  # mostly waits for an endpoint; each request has its own limit
    "gather": timedelta(days=2),
    "gpu_single": timedelta(days=7),
    "trainer": timedelta(days=60),
}
# After SIGTERM to a node's pod: time for the current step and its checkpoint before the workers are killed.
TRAIN_GRACE_S = int(os.environ.get("NUCLEUS_TRAIN_GRACE_S", "300"))
# Retries of a training stage, each from the last checkpoint. Flyte counts recoverable errors of the task (SIGTERM and
# so each preemption, faults) and each failed PyTorchJob, but not a single pod that is lost with its node: that is
# Propeller's max-node-retries-system-failures (3 by default, the last on a node that is not interruptible). A
# preemption every four hours gives 84 in two weeks.
TRAIN_RETRIES = int(os.environ.get("NUCLEUS_TRAIN_RETRIES", "100"))
# Settings of the registration for pods that also load this module: those that check a recipe, train, or run a dynamic
# workflow.
STORE = {  # all pods: the store of parts, the console that decks link to, and the log level
    name: os.environ[name] for name in ("NUCLEUS_STORE", "NUCLEUS_CONSOLE", "NUCLEUS_LOG_LEVEL") if os.environ.get(name)
}
ENDPOINTS = {name: value for name, value in os.environ.items() if name == "NUCLEUS_ENDPOINTS"}  # allowed endpoints
REGISTERED = (
    {
        "NUCLEUS_TRAIN_NNODES": str(TRAIN_NNODES),
        "NUCLEUS_TRAIN_NPROC": str(TRAIN_NPROC),
        "NUCLEUS_TRAIN_GRACE_S": str(TRAIN_GRACE_S),
        "NUCLEUS_TRAIN_RETRIES": str(TRAIN_RETRIES),
        **{name: os.environ[name] for name in profiles.SETTINGS if name in os.environ},
        **{name: value for name, value in os.environ.items() if name.startswith("NUCLEUS_IMAGE_")},
        **{name: os.environ[name] for name in ("NUCLEUS_CAPTIONER_SECRET", "NUCLEUS_SPARK") if name in os.environ},
    }
    | STORE
    | ENDPOINTS
)
REPORT_S = 30  # from then to the pod's end: the agent writes the error that Flyte retries


def image(role: str) -> str:
    """The container image of a role, resolved at registration by `--image ROLE=...`."""
    return f"{{{{.image.{role}.fqn}}}}:{{{{.image.{role}.version}}}}"


def cache(step: str, ignored_inputs: tuple[str, ...] = ()) -> Cache:
    return Cache(version=CACHE_VERSIONS[step], ignored_inputs=ignored_inputs, serialize=True)


def _options(role: str, kind: str, size: profiles.Size, gpu: int = 0) -> dict[str, Any]:
    """Options of all tasks. Requests equal limits, so that a node is never overcommitted."""
    resources = Resources(
        cpu=str(size.cpu),
        mem=f"{size.memory_gib}Gi",
        gpu=str(gpu) if gpu else None,
        ephemeral_storage=f"{size.ephemeral_gib}Gi",
    )
    template = profiles.pod_template(role)
    if template and role == "trainer" and kind != "trainer":
        template = "nucleus-trainer"  # merges and dynamic workflows need no EFA devices, which CPU nodes lack
    options = {
        "container_image": image(role),
        "retries": 3,
        "timeout": TIMEOUTS[kind],
        "requests": resources,
        "limits": resources,
        "pod_template_name": template,
        "environment": STORE | _own_image(role),
        # Without flytekit's list of packages, which needs a run of pip in each task with a deck: manifests name the
        # image.
        "deck_fields": (DeckField.TIMELINE, DeckField.INPUT, DeckField.OUTPUT),
    }
    return options | ({"accelerator": _accelerator()} if gpu else {})


def _own_image(role: str) -> dict[str, str]:
    """The image by digest, for manifests: a container cannot read its own. tools/register.py sets it."""
    name = os.environ.get(f"NUCLEUS_IMAGE_{role.upper()}")
    return {"NUCLEUS_IMAGE": name} if name else {}


def _accelerator() -> GPUAccelerator:
    """The accelerator of the profile, or the one that NUCLEUS_ACCELERATOR_LABEL names."""
    return GPUAccelerator(os.environ.get("NUCLEUS_ACCELERATOR_LABEL") or PROFILE.accelerator or "")


def _hub_secret(wanted: bool) -> dict[str, Any]:
    """HF_TOKEN in the environment of tasks that read from or publish to the Hub, if the site names a secret."""
    return _secret("NUCLEUS_HUB_SECRET", "HF_TOKEN") if wanted else {}


def _secret(setting: str, key: str) -> dict[str, Any]:
    """A key of the secret that the site's setting names, as an environment variable; empty if it names none."""
    name = os.environ.get(setting)
    if not name:
        return {}
    return {"secret_requests": [Secret(group=name, key=key, mount_requirement=Secret.MountType.ENV_VAR, env_var=key)]}


def recipients() -> list[str]:
    """Who gets a mail about an execution that ended badly: NUCLEUS_NOTIFY, addresses separated by commas."""
    return [word.strip() for word in os.environ.get("NUCLEUS_NOTIFY", "").split(",") if word.strip()]


def light(role: str) -> dict[str, Any]:
    """Options of a task that plans or gathers."""
    return _options(role, "light", PROFILE.light)


def planner() -> dict[str, Any]:
    """Options of a task that checks a recipe or a corpus against the registered number of training processes and the profile."""
    options = dynamic("curation")
    return options | {"environment": options["environment"] | ENDPOINTS}


def dynamic(role: str = "trainer") -> dict[str, Any]:
    """Options of a dynamic workflow: its pod serialises the tasks to run, and ends. For training it needs the trainer's
    image."""
    options = light(role)
    return options | {"environment": options["environment"] | REGISTERED}


def shard(role: str) -> dict[str, Any]:
    """Options of one map task over a shard."""
    return _options(role, "shard", PROFILE.shard) | {"interruptible": True}


def captioner() -> dict[str, Any]:
    """Options of a task that requests captions from an endpoint. Registration sets the allowed endpoints and the name
    of the secret with the key (NUCLEUS_CAPTIONER_SECRET, key CAPTIONER_API_KEY)."""
    options = _options("curation", "captioner", PROFILE.shard) | {"interruptible": True}
    options["environment"] = options["environment"] | ENDPOINTS
    return options | _secret("NUCLEUS_CAPTIONER_SECRET", "CAPTIONER_API_KEY")


def gather(role: str) -> dict[str, Any]:
    """Options of a task that reads every shard."""
    return _options(role, "gather", PROFILE.gather)


def publisher() -> dict[str, Any]:
    """Options of the task that loads the whole pipeline on CPUs and uploads it."""
    return _options("publisher", "gather", PROFILE.publish) | _hub_secret(True)


def merger() -> dict[str, Any]:
    """Options of the task that copies all checkpoints of a stage to its disk and merges them."""
    return _options("trainer", "gather", PROFILE.merge, gpu=_gpus(1))


def tables(role: str) -> dict[str, Any]:
    """Options of the task that decides about all records: a pod, or the driver of a Spark application.

    NUCLEUS_SPARK when registering: JSON of Spark's settings, such as {"spark.executor.instances": "8"}; Flyte's Spark plugin
    and operator run it. NUCLEUS_HOME must then be on a file system that driver and executors share.
    """
    options = _options(role, "gather", PROFILE.tables)
    settings = os.environ.get("NUCLEUS_SPARK")
    if settings:
        # A separate extra: with the plugin installed, every pyflyte command would import pyspark.
        from flytekitplugins.spark import Spark

        options["task_config"] = Spark(spark_conf=json.loads(settings))
    return options


def gpu_single(role: str, reads_hub: bool = False) -> dict[str, Any]:
    """Options of a task on one accelerator, with the Hub's token only for tasks that read the Hub (docs/security.md)."""
    options = _options(role, "gpu_single", PROFILE.gpu, gpu=_gpus(1)) | _hub_secret(reads_hub)
    if _gpus(1):
        options["environment"] = options["environment"] | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return options


@contextlib.contextmanager
def _not_importable(module: str) -> Iterator[None]:
    """Inside the block, importing an optional module fails. If kubernetes_validate is installed (for tests), kubernetes
    imports it, which compiles 39 grammars: 2 s of CPU in each process for an unused validation."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def trainer() -> dict[str, Any]:
    """Options of a training task: a plain pod for one process, a PyTorchJob for more.

    Grace after SIGTERM: of several processes, NUCLEUS_TRAIN_GRACE_S (when registering; 300 s) and the pod's
    terminationGracePeriodSeconds somewhat more; of one process, the cluster's (30 s by default). A cloud may give a
    node that it takes back less than either.
    """
    gpus = _gpus(TRAIN_NPROC)
    share = PROFILE.train
    size = profiles.Size(share.cpu * TRAIN_NPROC, share.memory_gib * TRAIN_NPROC, share.ephemeral_gib * TRAIN_NPROC)
    options = _options("trainer", "trainer", size if gpus else share, gpu=gpus)
    options |= {"retries": TRAIN_RETRIES, "interruptible": True} | _secret("NUCLEUS_WANDB_SECRET", "WANDB_API_KEY")
    environment = dict(options["environment"])
    if port := os.environ.get("NUCLEUS_METRICS_PORT"):
        environment["NUCLEUS_METRICS_PORT"] = port
    if gpus:
        environment |= PROFILE.environment | (profiles.EFA if profiles.fabric() else {})
        # Shapes change from step to step: with segments of fixed size, freed memory would be fragmented. Set another
        # value when registering; an image's PYTORCH_CUDA_ALLOC_CONF overrides it.
        environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # see model/__init__.py: read at the first matrix product
        # For 96 cores and 8 ranks. By default each rank starts as many compilers as the node has cores, up to 32.
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "8"
    if TRAIN_NNODES * TRAIN_NPROC > 1:
        # Imports torch, so only registrations with several processes do it.
        from flytekit import PodTemplate

        with _not_importable("kubernetes_validate"):
            from flytekitplugins.kfpytorch import CleanPodPolicy, RunPolicy
            from kubernetes.client import V1PodSpec

        from tasks.elastic import PreemptibleElastic

        # By default the operator removes no pods: those that outlive a failed job would keep their accelerators.
        policy = RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, ttl_seconds_after_finished=24 * 3600)
        options["task_config"] = PreemptibleElastic(
            nnodes=TRAIN_NNODES, nproc_per_node=TRAIN_NPROC, max_restarts=0, run_policy=policy
        )
        options["shared_memory"] = f"{PROFILE.shared_memory_gib}Gi"
        if queue := os.environ.get("NUCLEUS_QUEUE"):
            options["labels"] = {"kueue.x-k8s.io/queue-name": queue}
        pod = V1PodSpec(containers=[], termination_grace_period_seconds=TRAIN_GRACE_S + REPORT_S)
        level = os.environ.get("NUCLEUS_TOPOLOGY")
        annotations = {"kueue.x-k8s.io/podset-preferred-topology": level} if queue and level else None
        options["pod_template"] = PodTemplate(pod_spec=pod, annotations=annotations)
        environment |= REGISTERED | {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TRAIN_GRACE_S),
        }
    return options | {"environment": environment}


def training_scratch_gib() -> int:
    """Ephemeral storage of a training pod."""
    return PROFILE.train.ephemeral_gib * (TRAIN_NPROC if PROFILE.accelerator else 1)


def _gpus(count: int) -> int:
    """Number of accelerators to request; none if the profile has none, as for a cluster of CPU nodes."""
    return count if PROFILE.accelerator else 0
