"""A published version never looks complete too early and is never changed, and one of two publishers fails."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from sealed_pipelines import make

from tasks.manifest import MANIFEST, load_manifest, seal, verify
from tasks.publishing import s3

BUCKET = "nucleus-artifacts-eu-west-1"
URI = f"s3://{BUCKET}/nucleus/pipeline"
PREFIX = "nucleus/pipeline/"


@pytest.fixture
def client(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FLYTE_AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        client = boto3.client("s3", region_name="eu-west-1")
        client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        yield client


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return make(tmp_path / "pipeline", {"README.md": b"card", "transformer/model.safetensors": b"w" * 1000})


def objects(client, prefix: str = PREFIX) -> dict[str, bytes]:
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in listed
    }


def version(directory: Path) -> str:
    return f"{PREFIX}versions/{load_manifest(directory).digest}/"


def download(client, directory: Path, prefix: str) -> Path:
    for name, content in objects(client, prefix).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


class Killed(Exception):
    """Stands for a SIGKILL at a call of the client."""


class Recorder:
    """A client that lists what it writes, and can stop before its n-th call, or damage an upload."""

    CALLS = ("head_bucket", "get_object", "head_object", "put_object", "upload_file", "get_paginator")

    def __init__(self, client, kill_at: int = -1, damage: str = "", before=None) -> None:
        self._client, self.kill_at, self.damage, self.before = client, kill_at, damage, before
        self.calls, self.written = 0, []

    def __getattr__(self, name):
        if name not in self.CALLS:
            return getattr(self._client, name)

        def call(*args, **options):
            if self.calls == self.kill_at:
                raise Killed
            self.calls += 1
            return getattr(self, f"_{name}", getattr(self._client, name))(*args, **options)

        return call

    def _put_object(self, **options):
        key = options["Key"].removeprefix(PREFIX)
        if self.before:
            self.before(key)
        result = self._client.put_object(**options)
        self.written.append(key)
        return result

    def _upload_file(self, path, bucket, key, **options):
        if self.damage and key.endswith(self.damage):
            content = b"!" + Path(path).read_bytes()[1:]
            extra = dict(options["ExtraArgs"])
            self._client.put_object(Bucket=bucket, Key=key, Body=content, **extra)
        else:
            self._client.upload_file(path, bucket, key, **options)
        self.written.append(key.removeprefix(PREFIX))


def test_a_published_version_can_be_downloaded_and_verifies(client, pipeline, tmp_path):
    report = s3.upload(pipeline, URI, client)
    assert report["uploaded"] == 3 and report["skipped"] == 0
    pointer = s3.latest(URI, client)
    assert pointer["digest"] == verify(pipeline).digest and pointer["uri"] == report["uri"]
    back = download(client, tmp_path / "back", version(pipeline))
    assert verify(back, digest=pointer["digest"])
    assert hashlib.sha256((back / MANIFEST).read_bytes()).hexdigest() == pointer["manifest_sha256"]


def test_the_published_manifest_names_no_place_and_no_machine(client, tmp_path, monkeypatch):
    monkeypatch.setenv("FLYTE_INTERNAL_IMAGE", "registry.internal/trainer:1")
    parent = make(tmp_path / "secret-project/parent", {"a": b"1"})
    directory = tmp_path / "pipeline"
    directory.mkdir()
    (directory / "README.md").write_bytes(b"card")
    seal(directory, "pipeline", parents=[parent])
    s3.upload(directory, URI, client)
    text = objects(client, version(directory))[MANIFEST].decode()
    assert "secret-project" not in text and "registry.internal" not in text and str(tmp_path) not in text
    assert load_manifest(parent).digest in text


def test_before_the_first_publication_there_is_no_latest_version(client):
    assert s3.latest(URI, client) is None


def test_the_manifest_follows_the_files_and_the_pointer_follows_the_manifest(client, pipeline):
    recorder = Recorder(client)
    s3.upload(pipeline, URI, recorder)
    assert [name.rpartition("/")[2] for name in recorder.written[-2:]] == [MANIFEST, s3.LATEST]
    assert len(recorder.written) == 4


def test_a_publisher_killed_anywhere_leaves_the_old_version_or_the_new_one(client, pipeline, tmp_path):
    s3.upload(pipeline, URI, client)
    old = s3.latest(URI, client)
    other = make(tmp_path / "other", {"README.md": b"new!", "vae/model.safetensors": b"v" * 10, "a": b"1", "b": b"2"})
    new_digest = load_manifest(other).digest
    whole = Recorder(client)
    kills, seen = 0, set()
    while True:
        try:
            s3.upload(other, URI, Recorder(client, kill_at=kills))
            break
        except Killed:
            kills += 1
        pointer = s3.latest(URI, client)
        seen.add(pointer["digest"])
        back = download(client, tmp_path / f"back{kills}", f"{PREFIX}versions/{pointer['digest']}/")
        assert verify(back, digest=pointer["digest"])
    assert kills >= 10 and old["digest"] in seen
    assert s3.latest(URI, client)["digest"] == new_digest
    s3.upload(other, URI, whole)
    assert whole.written == []


def test_running_it_again_writes_nothing(client, pipeline):
    s3.upload(pipeline, URI, client)
    recorder = Recorder(client)
    report = s3.upload(pipeline, URI, recorder)
    assert recorder.written == [] and (report["uploaded"], report["skipped"], report["bytes"]) == (0, 3, 0)


def test_object_metadata_is_not_believed(client, pipeline):
    """Other bytes of the same length were uploaded, with the right digest in their metadata."""
    digest = verify(pipeline).files["README.md"]
    client.put_object(
        Bucket=BUCKET,
        Key=version(pipeline) + "README.md",
        Body=b"cart",
        Metadata={"sha256": digest},
        ChecksumAlgorithm="SHA256",
    )
    s3.upload(pipeline, URI, client)
    assert objects(client, version(pipeline))["README.md"] == b"card"


def test_of_two_publishers_at_once_one_fails_and_the_pointer_is_the_others(client, pipeline, tmp_path):
    other = make(tmp_path / "other", {"README.md": b"new!"})

    def meanwhile(key):
        if key == s3.LATEST:
            s3.upload(other, URI, client)

    with pytest.raises(ValueError, match="changed by another publisher"):
        s3.upload(pipeline, URI, Recorder(client, before=meanwhile))
    assert s3.latest(URI, client)["digest"] == load_manifest(other).digest
    s3.upload(pipeline, URI, client)
    assert s3.latest(URI, client)["digest"] == load_manifest(pipeline).digest


def test_another_version_leaves_the_older_one_in_place(client, pipeline, tmp_path):
    s3.upload(pipeline, URI, client)
    other = make(tmp_path / "other", {"README.md": b"new!"})
    s3.upload(other, URI, client)
    assert s3.latest(URI, client)["digest"] == load_manifest(other).digest
    verify(download(client, tmp_path / "back", version(pipeline)))


def test_somebody_elses_objects_are_never_touched(client, pipeline):
    client.put_object(Bucket=BUCKET, Key=PREFIX + "thesis.pdf", Body=b"years of work")
    s3.upload(pipeline, URI, client)
    assert objects(client)["thesis.pdf"] == b"years of work"
    client.put_object(Bucket=BUCKET, Key=version(pipeline) + "stray.bin", Body=b"x")
    with pytest.raises(ValueError, match="stray.bin is not a file of this version"):
        s3.upload(pipeline, URI, client)


def test_a_latest_that_is_not_ours_is_refused(client, pipeline):
    client.put_object(Bucket=BUCKET, Key=PREFIX + s3.LATEST, Body=b"[1, 2]")
    with pytest.raises(ValueError, match="is not a pointer to a published version"):
        s3.upload(pipeline, URI, client)
    assert set(objects(client)) == {s3.LATEST}


def test_a_damaged_directory_is_not_uploaded(client, pipeline):
    (pipeline / "README.md").write_bytes(b"cart")
    with pytest.raises(ValueError, match="README.md was changed"):
        s3.upload(pipeline, URI, client)
    assert objects(client) == {}


def test_an_object_that_arrived_changed_is_refused_and_no_manifest_follows(client, pipeline):
    with pytest.raises(ValueError, match="model.safetensors has the checksum"):
        s3.upload(pipeline, URI, Recorder(client, damage="model.safetensors"))
    assert MANIFEST not in objects(client, version(pipeline)) and s3.latest(URI, client) is None


def test_large_files_go_in_parts_and_are_checked_as_such(client, tmp_path):
    content = b"".join(hashlib.sha256(bytes([i])).digest() * 1024 for i in range(200)) * 2  # 12.5 MiB
    directory = make(tmp_path / "large", {"model.safetensors": content})
    s3.upload(directory, URI, client, part_bytes=5 * s3.MIB)
    head = client.head_object(Bucket=BUCKET, Key=version(directory) + "model.safetensors")
    assert head["ETag"].strip('"').endswith("-3") and head["ContentLength"] == len(content)
    assert s3.upload(directory, URI, client, part_bytes=5 * s3.MIB)["skipped"] == 2


def test_every_request_of_an_upload_names_the_account_that_must_own_the_bucket(client, tmp_path):
    """S3 refuses a request to a bucket of another account than the one in ExpectedBucketOwner; moto does not look."""
    requests: dict[str, list[str | None]] = {}

    def note(params, model, **_):
        requests.setdefault(model.name, []).append(params.get("ExpectedBucketOwner"))

    directory = make(tmp_path / "large", {"README.md": b"card", "model.safetensors": bytes(6 * s3.MIB)})
    client.meta.events.register("before-parameter-build.s3", note)
    s3.upload(directory, URI, client, part_bytes=5 * s3.MIB, bucket_owner="123456789012")
    s3.upload(directory, URI, client, part_bytes=5 * s3.MIB, bucket_owner="123456789012")
    assert set(requests) == {
        "HeadBucket", "GetObject", "ListObjectsV2", "HeadObject", "PutObject",
        "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload",
    }  # fmt: skip
    assert {owner for owners in requests.values() for owner in owners} == {"123456789012"}, requests


@pytest.mark.parametrize("size", [1, 4096, 4097, 10000])
def test_the_checksum_of_parts_is_that_of_their_digests(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "x").write_bytes(content)
    parts = [content[i : i + 4096] for i in range(0, size, 4096)]
    want = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    assert s3._composite(tmp_path / "x", 4096) == base64.b64encode(want).decode()


@pytest.mark.parametrize("uri", ["s3://", "http://bucket/x", "bucket/x", "s3:///x"])
def test_something_that_is_no_s3_uri_is_refused(pipeline, uri):
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        s3.upload(pipeline, uri)


def test_a_bucket_that_is_not_there_is_named(client, pipeline):
    with pytest.raises(ValueError, match="there is no bucket 'nucleus-missing'"):
        s3.upload(pipeline, "s3://nucleus-missing/x", client)


def test_missing_credentials_are_one_message(pipeline, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FLYTE_AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    with pytest.raises(ValueError, match=f"{URI}: Unable to locate credentials"):
        s3.upload(pipeline, URI)


def test_a_whole_bucket_is_a_place_as_well(client, pipeline):
    s3.upload(pipeline, f"s3://{BUCKET}", client)
    assert s3.LATEST in objects(client, "")
