"""The only place for images, resources, retries, accelerators and cache versions of tasks.

A cache version names the meaning of a task's output: raise it when the code behind a task changes what it
writes for the same inputs. Images are named by role and resolved when the workflows are registered
(`--image trainer=REGISTRY/NAME@sha256:...`); a local run ignores images, resources and retries.
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

# flytekit warns that it offers no console form for single fields of type tuple; the sections themselves travel
# whole, as Pydantic models.
logging.getLogger("flytekit").addFilter(
    lambda record: "cannot be converted to a literal type" not in record.getMessage()
)

CACHE_VERSIONS = {
    "urls": "2",
    "records": "8",
    "scores": "9",
    "captions": "1",
    "curation": "7",
    "components": "3",
    "texts": "3",
    "encoding": "5",
    "training": "3",
    "merging": "1",
    "prompts": "1",
    "evaluation": "5",
    "publishing": "2",
    "study": "1",
}

# Multi-node training is decided when the workflows are registered, since Flyte fixes a task's type then:
# NUCLEUS_TRAIN_NNODES x NUCLEUS_TRAIN_NPROC processes. Unset means one plain process.
TRAIN_NNODES = int(os.environ.get("NUCLEUS_TRAIN_NNODES", "1"))
TRAIN_NPROC = int(os.environ.get("NUCLEUS_TRAIN_NPROC", "1"))
PROFILE = profiles.chosen()
# Limits of one attempt: long enough for any recipe, and an end for a pod that hangs.
TIMEOUTS = {
    "light": timedelta(hours=1),
    "shard": timedelta(hours=6),
    "gather": timedelta(days=2),
    "gpu_single": timedelta(days=7),
    "trainer": timedelta(days=60),
}
# After SIGTERM to a node's pod: for the step under way and its checkpoint, before the workers are killed.
TRAIN_GRACE_S = int(os.environ.get("NUCLEUS_TRAIN_GRACE_S", "300"))
# Attempts beyond the first at a training stage, each from the last checkpoint. Flyte counts here what the task itself
# calls recoverable (SIGTERM and with it each preemption, faults) and each PyTorchJob that fails, but not a single pod
# that ends without a word, as its node does: that is Propeller's max-node-retries-system-failures (3 by default, the
# last on a node that is not interruptible). Two weeks of a preemption every four hours are 84.
TRAIN_RETRIES = int(os.environ.get("NUCLEUS_TRAIN_RETRIES", "100"))
# For pods that load this module too, and must see what was registered: those that check a recipe, train, or lay out a
# dynamic workflow.
STORE = {  # all pods: the place of parts, the console that decks link to, and what is logged
    name: os.environ[name] for name in ("NUCLEUS_STORE", "NUCLEUS_CONSOLE", "NUCLEUS_LOG_LEVEL") if os.environ.get(name)
}
ENDPOINTS = {name: value for name, value in os.environ.items() if name == "NUCLEUS_ENDPOINTS"}  # that may be asked
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
REPORT_S = 30  # from there to the pod's end: the agent writes the error that Flyte retries


def image(role: str) -> str:
    """The container image of a role, resolved at registration by `--image ROLE=...`."""
    return f"{{{{.image.{role}.fqn}}}}:{{{{.image.{role}.version}}}}"


def cache(step: str, ignored_inputs: tuple[str, ...] = ()) -> Cache:
    return Cache(version=CACHE_VERSIONS[step], ignored_inputs=ignored_inputs, serialize=True)


def _options(role: str, kind: str, size: profiles.Size, gpu: int = 0) -> dict[str, Any]:
    """What tasks of all kinds have. Equal requests and limits, so that a node is never overcommitted."""
    resources = Resources(
        cpu=str(size.cpu),
        mem=f"{size.memory_gib}Gi",
        gpu=str(gpu) if gpu else None,
        ephemeral_storage=f"{size.ephemeral_gib}Gi",
    )
    options = {
        "container_image": image(role),
        "retries": 3,
        "timeout": TIMEOUTS[kind],
        "requests": resources,
        "limits": resources,
        "pod_template_name": profiles.pod_template(role),
        "environment": STORE | _own_image(role),
        # Without flytekit's list of packages, for which it runs pip in each task with a deck: manifests name the image.
        "deck_fields": (DeckField.TIMELINE, DeckField.INPUT, DeckField.OUTPUT),
    }
    return options | ({"accelerator": _accelerator()} if gpu else {})


def _own_image(role: str) -> dict[str, str]:
    """The image by digest, for manifests: a container cannot read it from inside. tools/register.py names it."""
    name = os.environ.get(f"NUCLEUS_IMAGE_{role.upper()}")
    return {"NUCLEUS_IMAGE": name} if name else {}


def _accelerator() -> GPUAccelerator:
    """By the site's own label where NUCLEUS_ACCELERATOR_LABEL has its value."""
    return GPUAccelerator(os.environ.get("NUCLEUS_ACCELERATOR_LABEL") or PROFILE.accelerator or "")


def _hub_secret(wanted: bool) -> dict[str, Any]:
    """HF_TOKEN in the environment of tasks that read from or publish to the Hub, where the site names a secret."""
    return _secret("NUCLEUS_HUB_SECRET", "HF_TOKEN") if wanted else {}


def _secret(setting: str, key: str) -> dict[str, Any]:
    """A key of the secret that the site's setting names, as an environment variable; nothing where it names none."""
    name = os.environ.get(setting)
    if not name:
        return {}
    return {"secret_requests": [Secret(group=name, key=key, mount_requirement=Secret.MountType.ENV_VAR, env_var=key)]}


def light(role: str) -> dict[str, Any]:
    """Options of a task that plans or gathers."""
    return _options(role, "light", PROFILE.light)


def planner() -> dict[str, Any]:
    """Options of the task that checks a recipe, also against the processes that training was registered for."""
    options = dynamic("curation")
    return options | {"environment": options["environment"] | ENDPOINTS}


def dynamic(role: str = "trainer") -> dict[str, Any]:
    """Options of a dynamic workflow: its pod writes down the tasks to run, and ends. Of training that is the trainer's."""
    options = light(role)
    return options | {"environment": options["environment"] | REGISTERED}


def shard(role: str) -> dict[str, Any]:
    """Options of one map task over a shard."""
    return _options(role, "shard", PROFILE.shard) | {"interruptible": True}


def captioner() -> dict[str, Any]:
    """Options of a task that asks a captioner's endpoint: which it may ask is decided at registration, as is the name of
    the secret with its key (NUCLEUS_CAPTIONER_SECRET, key CAPTIONER_API_KEY)."""
    options = shard("curation")
    options["environment"] = options["environment"] | ENDPOINTS
    return options | _secret("NUCLEUS_CAPTIONER_SECRET", "CAPTIONER_API_KEY")


def gather(role: str) -> dict[str, Any]:
    """Options of a task that reads every shard."""
    return _options(role, "gather", PROFILE.gather) | _hub_secret(role == "publisher")


def tables(role: str) -> dict[str, Any]:
    """Options of the task that decides about all records: a pod, or the driver of a Spark application.

    NUCLEUS_SPARK when registering: JSON of Spark's settings, such as {"spark.executor.instances": "8"}; Flyte's Spark plugin
    and operator run it. NUCLEUS_HOME must then be on a file system that driver and executors share.
    """
    options = gather(role)
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
    """Within it, importing an optional module fails. kubernetes imports kubernetes_validate where it is installed (here for
    tests), and that compiles 39 grammars: 2 s of CPU in each process for a validation that nothing asks for."""
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
    if gpus:
        environment |= PROFILE.environment | (profiles.EFA if profiles.fabric() else {})
        # Shapes change from step to step: in segments of fixed size, freed memory would lie about in parts too small
        # for the next. Set it when registering for something else; an image's PYTORCH_CUDA_ALLOC_CONF goes before it.
        environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # see model/__init__.py: read at the first matrix product
        # Of 96 cores for 8 ranks. By default each rank starts as many compilers as the node has cores, up to 32.
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "8"
    if TRAIN_NNODES * TRAIN_NPROC > 1:
        # Imports torch: only registrations that ask for several processes pay for it.
        from flytekit import PodTemplate

        with _not_importable("kubernetes_validate"):
            from flytekitplugins.kfpytorch import CleanPodPolicy, RunPolicy
            from kubernetes.client import V1PodSpec

        from tasks.elastic import PreemptibleElastic

        # The operator's default cleans no pods: those that outlive a failed job would keep their accelerators.
        policy = RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, ttl_seconds_after_finished=24 * 3600)
        options["task_config"] = PreemptibleElastic(
            nnodes=TRAIN_NNODES, nproc_per_node=TRAIN_NPROC, max_restarts=0, run_policy=policy
        )
        options["shared_memory"] = f"{PROFILE.shared_memory_gib}Gi"
        if queue := os.environ.get("NUCLEUS_QUEUE"):
            options["labels"] = {"kueue.x-k8s.io/queue-name": queue}
        pod = V1PodSpec(containers=[], termination_grace_period_seconds=TRAIN_GRACE_S + REPORT_S)
        options["pod_template"] = PodTemplate(pod_spec=pod)
        environment |= REGISTERED | {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TRAIN_GRACE_S),
        }
    return options | {"environment": environment}


def _gpus(count: int) -> int:
    """Accelerators to ask for: none where the profile has none, as for a cluster of CPU nodes."""
    return count if PROFILE.accelerator else 0
