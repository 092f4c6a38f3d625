"""The pod and the job that come out of the registered training task and the namespace's PodTemplate."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml
from packaged_jobs import pytorch_job, training_template

ROOT = Path(__file__).resolve().parents[3]
EFA = {"h100": "32", "h200": "16"}


@pytest.mark.slow
@pytest.mark.parametrize("profile", EFA)
def test_a_ranks_pod_is_valid_hardened_and_has_gpus_and_efa_devices(profile):
    import kubernetes_validate

    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: kustomize does not run")
    overlay = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / "eks")]
    documents = list(yaml.safe_load_all(subprocess.run(overlay, capture_output=True, text=True, check=True).stdout))
    templates = {d["metadata"]["name"]: d["template"] for d in documents if d["kind"] == "PodTemplate"}
    site = {
        "NUCLEUS_PROFILE": profile,
        "NUCLEUS_FABRIC": "efa",
        "NUCLEUS_QUEUE": "training",
        "NUCLEUS_STORE": "s3://b/s",
    }
    job = pytorch_job(training_template(8, 8, **site), templates)
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": worker["template"]["spec"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kubernetes_validate.validate(json.loads(json.dumps(pod)), "1.37", strict=True)
    (container,) = pod["spec"]["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["vpc.amazonaws.com/efa"] == EFA[profile]
        assert container["resources"][kind]["nvidia.com/gpu"] == "8"
    assert container["securityContext"]["readOnlyRootFilesystem"] and not pod["spec"]["automountServiceAccountToken"]
    assert "/scratch" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert pod["spec"]["terminationGracePeriodSeconds"] == 330  # the task's grace, and time for the agent to report
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"] == 8
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] == "All"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
