"""The manifests, a training job and preflight on a real API server: dry runs of every object, which change nothing, and a run of
preflight, which reads. Needs KUBECONFIG."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaged_jobs import pytorch_job, training_template

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is unset: no API server to ask"),
    pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed"),
]
LEAST = {
    "overlays/kind-cpu": 20,
    "overlays/eks": 40,
    "overlays/generic": 30,
    "captioner": 3,
    "preflight": 6,
}  # documents


def kubectl(*words: str, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True, timeout=120)


def rendered(folder: str) -> list[dict]:
    done = kubectl("kustomize", str(ROOT / "k8s" / folder))
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert len(documents) >= LEAST[folder]
    return documents


def known_kinds() -> set[tuple[str, str]]:
    """(apiVersion, kind) that the server has."""
    listed = kubectl("api-resources", "--no-headers")
    assert listed.returncode == 0, listed.stderr
    known = set(re.findall(r"(\S+)\s+(?:true|false)\s+(\S+)\s*$", listed.stdout, flags=re.MULTILINE))
    assert ("v1", "Pod") in known, listed.stdout[:2000]
    return known


def refusal(document: dict) -> str:
    """What the server says against an object in a dry run; empty if it would take it."""
    document = json.loads(json.dumps(document))
    document["metadata"].pop("namespace", None)  # a dry run cannot make the namespace for the others
    options = ["--dry-run=server", "--validate=true", "--namespace", "default", "--filename", "-"]
    done = kubectl("create", *options, text=json.dumps(document))
    if done.returncode and "AlreadyExists" not in done.stderr:
        return f"{document['kind']}/{document['metadata']['name']}: {done.stderr.strip()[:300]}"
    return ""


def server_version() -> str:
    done = kubectl("version", "--output", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["serverVersion"]["gitVersion"]


@pytest.mark.parametrize("folder", LEAST)
def test_the_api_server_accepts_every_object_that_it_knows(folder):
    """The skip names unknown kinds, whose operators are not installed."""
    documents, known, version = rendered(folder), known_kinds(), server_version()
    unknown = {f"{d['kind']} ({d['apiVersion']})" for d in documents if (d["apiVersion"], d["kind"]) not in known}
    refused = [why for d in documents if (d["apiVersion"], d["kind"]) in known and (why := refusal(d))]
    assert not refused, f"of {version}: " + "\n".join(refused)
    if unknown:
        pytest.skip(f"{version} does not know {', '.join(sorted(unknown))}; the others are accepted")


def test_the_api_server_accepts_the_registered_training_task_as_a_pod_and_as_a_job():
    known, version = known_kinds(), server_version()
    templates = {d["metadata"]["name"]: d["template"] for d in rendered("overlays/eks") if d["kind"] == "PodTemplate"}
    site = {"NUCLEUS_PROFILE": "h100", "NUCLEUS_FABRIC": "efa", "NUCLEUS_STORE": "s3://bucket/store"}
    job = pytorch_job(training_template(8, 8, **site), templates)
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    for name in ("serviceAccountName", "priorityClassName"):  # neither exists before the overlay is applied
        pod["spec"].pop(name)
    alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train-stage-worker-0"}, "spec": pod["spec"]}
    assert not refusal(alone), version
    if ("kubeflow.org/v1", "PyTorchJob") not in known:
        pytest.skip(f"{version} does not know PyTorchJob (training-operator is not installed); the pod is accepted")
    assert not refusal(job), version


def test_preflight_looks_at_a_real_server_without_an_error_of_its_own(tmp_path):
    config = {
        "admin": {"endpoint": "dns:///127.0.0.1:1", "insecure": True},
        "nucleus": {"project": "nucleus", "domain": "production", "store": "s3://bucket/store", "profile": "h100",
                    "fabric": "efa", "queue": "training"},
    }  # fmt: skip
    (tmp_path / "flyte.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tasks.preflight", "--recipe", "nucleus_17b", "--shape", "8x8", "--json"]
    command += ["--config", str(tmp_path / "flyte.yaml"), "--lock", str(tmp_path / "none.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr[-2000:]  # no endpoint and no store are there
    results = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert server_version() in results["api server"]["detail"]
    mistakes = ("TypeError", "AttributeError", "KeyError", "IndexError", "ValueError", "AssertionError")
    assert not [entry for entry in results.values() if entry["detail"].startswith(mistakes)]
