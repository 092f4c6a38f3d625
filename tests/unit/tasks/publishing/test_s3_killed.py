"""A publisher that the kernel kills, also in the middle of a multipart upload, leaves the old version or the new one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from object_store import OWN, s3_server
from sealed_pipelines import make

from tasks.manifest import load_manifest, verify
from tasks.publishing import s3

BUCKET, PREFIX = "releases", "nucleus/"
URI = f"s3://{BUCKET}/nucleus"
MIB = 1 << 20
# For each number on standard input: publishes in a process that gets SIGKILL before that request to the store.
PUBLISHER = """
import itertools, os, signal, sys
import boto3
from tasks.publishing import s3
directory, uri, part_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
for line in sys.stdin:
    child = os.fork()
    if not child:
        client, requests = boto3.client("s3"), itertools.count()
        kill = lambda **_: os.kill(os.getpid(), signal.SIGKILL) if next(requests) == int(line) else None
        client.meta.events.register("before-send.s3", kill)
        s3.upload(directory, uri, client, part_bytes=part_bytes)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
def test_a_publisher_that_gets_sigkill_leaves_the_old_version_or_the_new_one(tmp_path, monkeypatch):
    old = make(tmp_path / "old", {"README.md": b"old"})
    new = make(tmp_path / "new", {"README.md": b"new", "transformer/model.safetensors": b"w" * (11 * MIB), "a": b"1"})
    digests = {load_manifest(directory).digest: directory for directory in (old, new)}
    with s3_server() as endpoint:
        for name, value in (OWN | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        s3.upload(old, URI, client)
        command = [sys.executable, "-c", PUBLISHER, str(new), URI, str(5 * MIB)]
        kills, in_multipart, seen = 0, 0, []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as publisher:
            while True:
                publisher.stdin.write(f"{kills}\n")
                publisher.stdin.flush()
                ended = int(publisher.stdout.readline())
                seen.append(s3.latest(URI, client)["digest"])
                check_version(client, seen[-1], digests[seen[-1]], tmp_path / f"back{kills}")
                if ended == 0:
                    break
                assert ended == -9
                kills += 1
                open_uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
                for upload in open_uploads:
                    in_multipart += 1
                    client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    assert kills >= 10 and in_multipart >= 2, (kills, in_multipart)
    assert seen[0] == load_manifest(old).digest and seen[-1] == load_manifest(new).digest


def check_version(client, digest: str, source: Path, back: Path) -> None:
    """The version that the pointer names has all files, and no others."""
    prefix = f"{PREFIX}versions/{digest}/"
    for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        path = back / entry["Key"].removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())
    assert verify(back, digest=digest).files == load_manifest(source).files
