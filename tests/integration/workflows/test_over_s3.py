"""Tasks run as on a cluster, each in a separate process and home over S3's protocol, make what a local run makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from object_store import OWN, s3_server
from recipe_home import ROOT, Home
from small_propeller import SmallPropeller, text

from containers.lock import ROLES

BUCKET = "nucleus-test"
BIN = Path(sys.executable).parent


@pytest.mark.slow
def test_curation_through_an_object_store_ends_in_the_digests_of_a_local_run(tmp_path):
    package = tmp_path / "package.tgz"
    images = [word for role in ROLES for word in ("--image", f"{role}=registry.example/nucleus-{role}:v1")]
    command = [str(BIN / "pyflyte"), "--pkgs", "workflows", "package", *images, "--output", str(package), "-f"]
    site = {"NUCLEUS_STORE": f"s3://{BUCKET}/store", "NUCLEUS_ACCELERATOR": "none"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | site)
    with s3_server() as endpoint:
        access = OWN | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        s3 = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=OWN["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=OWN["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        s3.create_bucket(Bucket=BUCKET)
        pods = iter(range(1000))

        def run(role: str, args: list[str], environment: dict[str, str]) -> None:
            pod = tmp_path / f"pod{next(pods)}"
            pod.mkdir()
            own = {"HOME": str(pod), "NUCLEUS_HOME": str(pod / "nucleus"), "TMPDIR": str(pod)}
            done = subprocess.run(
                [str(BIN / args[0]), *args[1:]],
                cwd=pod,
                env=os.environ | environment | access | own | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

        propeller = SmallPropeller(package, s3, BUCKET, run)
        propeller.execute("workflows.curate.curate", recipe=text("smoke"))
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        keys = [entry["Key"] for page in pages for entry in page["Contents"] if entry["Key"].endswith("/manifest.json")]
        manifests = [json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()) for key in keys]
    home = Home(tmp_path / "local")
    done = home.run("--recipe", "smoke", workflow="curate")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = home.listing()
    made: dict[str, set[str]] = {}
    for manifest in manifests:
        made.setdefault(manifest["kind"], set()).add(manifest["digest"])
    assert made == expected
    assert {"records", "corpus", "scores", "decisions", "selections", "curated"} <= made.keys()
