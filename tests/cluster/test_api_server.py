"""The manifests on a real API server: a dry run of every object, which changes nothing. Needs KUBECONFIG."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is unset: no API server to ask"),
    pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed"),
]


def kubectl(*words: str, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("overlay", ["kind-cpu", "eks", "generic"])
def test_the_api_server_accepts_every_object_that_it_knows(overlay):
    """The skip names unknown kinds, whose operators are not installed."""
    documents = list(yaml.safe_load_all(kubectl("kustomize", str(ROOT / "k8s" / "overlays" / overlay)).stdout))
    listed = kubectl("api-resources", "--no-headers")
    assert listed.returncode == 0, listed.stderr
    known = set(re.findall(r"(\S+)\s+(?:true|false)\s+(\S+)\s*$", listed.stdout, flags=re.MULTILINE))
    version = json.loads(kubectl("version", "--output", "json").stdout)["serverVersion"]
    unknown, refused = [], []
    for document in documents:
        group, _, api = document["apiVersion"].rpartition("/")
        if (document["apiVersion"], document["kind"]) not in known:
            unknown.append(f"{document['kind']} ({document['apiVersion']})")
            continue
        document["metadata"].pop("namespace", None)  # a dry run cannot make the namespace for the others
        options = ["--dry-run=server", "--validate=true", "--namespace", "default", "--filename", "-"]
        done = kubectl("create", *options, text=json.dumps(document))
        if done.returncode and "AlreadyExists" not in done.stderr:
            refused.append(f"{document['kind']}/{document['metadata']['name']}: {done.stderr.strip()[:300]}")
    assert not refused, f"of {version['gitVersion']}: " + "\n".join(refused)
    if unknown:
        pytest.skip(f"{version['gitVersion']} does not know {', '.join(sorted(set(unknown)))}; the others are accepted")
